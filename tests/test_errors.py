import pickle

import pytest

from btlm import errors
from btlm.errors import NotFinite, OptionError


def flag(name):
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(
    ("template", "values", "plain", "with_flags"),
    [
        ("{max_new_tokens} is {}.", (0,), "max_new_tokens is 0.", "--max-new-tokens is 0."),
        ("{:,} {} {!r} for {seed}", (1000, "a", "b"), "1,000 a 'b' for seed", "1,000 a 'b' for --seed"),
        ("{top_k} is {}", ("{seed} {",), "top_k is {seed} {", "--top-k is {seed} {"),
    ],
)
def test_options_are_called_as_the_caller_knows_them(template, values, plain, with_flags):
    error = pickle.loads(pickle.dumps(OptionError(template, *values)))
    assert str(error) == plain
    assert error.text(flag) == with_flags


def test_every_error_can_be_caught_as_a_mistake_of_the_user():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 6
    assert all(issubclass(kind, ValueError) for kind in kinds)


def test_a_step_that_is_not_finite_crosses_processes():
    error = pickle.loads(pickle.dumps(NotFinite("loss nan", [[1.0, 2.0]])))
    assert issubclass(NotFinite, FloatingPointError)
    assert (str(error), error.losses) == ("loss nan", [[1.0, 2.0]])
