"""A few of the changed files of `fuzz.py`, always the same ones; the slow test takes thousands."""

import pytest

from tests.checkpoint.fuzz import make_forms, problem_of


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return make_forms(tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("first", [0, 20, 40])
def test_a_changed_file_ends_in_one_line_or_works(forms, tmp_path, first):
    assert [found for seed in range(first, first + 20) if (found := problem_of(seed, forms, tmp_path))] == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 13_000, 500))
def test_thousands_of_changed_files(forms, tmp_path, first):
    assert [found for seed in range(first, first + 500) if (found := problem_of(seed, forms, tmp_path))] == []
