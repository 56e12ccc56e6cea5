import pytest

from btlm.engine.speculation import PromptLookup


@pytest.mark.parametrize(
    ("ids", "most", "guess"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 3, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 1, 2], 1, [3]),
        ([1, 2, 3, 4, 5, 1, 2], 9, [3, 4, 5, 1, 2]),  # guesses reach to the end of the text
        ([1, 2, 3, 4, 5, 1, 2], 0, []),
        ([1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),  # the latest match wins
        ([9, 1, 2, 3, 7, 1, 2, 8, 9, 1, 2], 1, [3]),  # the longest match wins
        ([5, 5, 5], 3, [5]),
        ([1, 2, 3, 4], 3, []),
        ([1, 3, 4, 1], 3, []),  # a match of a single token is not enough
        ([1], 3, []),
        ([1, 1], 3, []),
        ([4, 1, 2, 3, 4, 6, 0, 0, 4, 1, 2, 3, 4], 2, [6, 0]),
    ],
)
def test_guesses(ids, most, guess):
    assert PromptLookup(most).guess(ids) == guess


def test_wrong_guesses_are_given_up_for_a_while():
    lookup, text = PromptLookup(3), [1, 2, 3, 1, 2]
    tries = 0
    while lookup.guess(text):
        lookup.learn(3, 0)
        tries += 1
        assert tries < 30
    assert tries > 5
    assert lookup.guessed == 3 * tries
    pause = 1
    while not lookup.guess(text):
        pause += 1
        assert pause < 100
    assert pause == 32


def test_right_guesses_go_on():
    lookup = PromptLookup(3)
    for _ in range(200):
        assert lookup.guess([1, 2, 3, 1, 2]) == [3, 1, 2]
        lookup.learn(3, 1)
    assert lookup.accepted == 200
