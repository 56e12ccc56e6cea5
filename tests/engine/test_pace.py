import pytest

from btlm.engine.pace import Pace


def test_a_prompt_that_is_read_beside_others_makes_them_wait_a_bounded_time():
    pace = Pace(2.5)
    pace.learn(0, 8, 0.1)  # what eight requests usually wait
    assert pace.prompt_tokens is None
    pace.learn(100, 8, 0.1 + 100 * 0.008)
    assert pace.prompt_tokens == 18  # 1.5 usual steps beside the one that they wait in any case


def test_prompts_alone_tell_what_a_token_costs():
    pace = Pace(2.5)
    pace.learn(200, 0, 2.0)
    assert pace.prompt_tokens is None  # nobody has written yet
    pace.learn(0, 1, 0.1)
    assert pace.prompt_tokens == 15


def test_the_latest_steps_count_most():
    pace = Pace(2.5)
    pace.learn(100, 0, 1.0)
    for _ in range(100):
        pace.learn(0, 1, 0.1)
    slow = pace.prompt_tokens
    for _ in range(100):
        pace.learn(0, 64, 0.4)
    assert slow == 15
    assert pace.prompt_tokens == pytest.approx(60, abs=1)


def test_something_is_always_read():
    pace = Pace(2.5)
    pace.learn(100, 0, 1e6)
    pace.learn(0, 1, 1e-6)
    assert pace.prompt_tokens == 1


def test_few_tokens_and_clocks_that_stand_still_tell_nothing():
    pace = Pace(2.5)
    pace.learn(0, 1, 0.1)
    pace.learn(7, 1, 5.0)
    assert pace.prompt_tokens is None
    pace.learn(100, 1, 0.1)
    assert pace.prompt_tokens is None


def test_a_cost_that_was_too_high_is_corrected_by_steps_with_few_tokens():
    pace = Pace(2.5)
    pace.learn(100, 0, 10.0)  # such as the first step, which gets its memory from the system
    pace.learn(0, 1, 0.1)
    assert pace.prompt_tokens == 1
    for _ in range(400):
        number = pace.prompt_tokens
        assert number is not None
        pace.learn(number, 1, 0.1 + 0.01 * number)
    assert pace.prompt_tokens == pytest.approx(15, abs=1)


@pytest.mark.parametrize("patience", [1, 0.5, -1, float("nan")])
def test_no_patience(patience):
    with pytest.raises(ValueError, match="usual steps leaves no time to read prompts"):
        Pace(patience)


def test_without_a_limit():
    pace = Pace()
    pace.learn(0, 1, 0.1)
    pace.learn(100, 0, 100.0)
    assert pace.prompt_tokens is None
