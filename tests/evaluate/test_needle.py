"""`btlm eval-needle`: where facts are, what is right, and what controls show."""

from typing import Any

import numpy as np
import pytest

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.cli.main import main
from btlm.engine.engine import Engine
from btlm.evaluate import needle
from btlm.evaluate.needle import FILLER, KINDS, Cell, Trials, ask, credit, log_likelihoods
from btlm.evaluate.needle_command import run_needle
from btlm.evaluate.options import Needle
from btlm.evaluate.results import read_results
from tests.checkpoint.tiny import END, change_tensors, save_tiny

ANSWERS = 5


@pytest.fixture(scope="module")
def tokenizer():
    return Checkpoint.open(BUNDLED_MODEL).tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), n_positions=256, initializer_range=0.2)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_fact_is_where_it_should_be(tokenizer, depth):
    trial = Trials(tokenizer, 50256, FILLER, ANSWERS, 0).trial("text", 300, depth, 7)
    assert len(trial.ids) + max(map(len, trial.answers)) == 300
    assert len({tuple(answer) for answer in trial.answers}) == ANSWERS
    assert trial.ids[0] == 50256
    text = tokenizer.decode(trial.ids[1:])
    answer = tokenizer.decode(trial.answers[0])
    fact, question = text.partition("\nThe secret number")[2].partition(".\n")[0], text.rpartition("\n")[2]
    assert fact == f"{question.removeprefix('The secret number')}{answer}"
    before = len(tokenizer.encode(text.partition("\nThe secret number")[0]).ids)
    rest = len(tokenizer.encode(text).ids) - len(tokenizer.encode(f"\nThe secret number{fact}.\n\n{question}").ids)
    assert abs(before - depth * rest) <= 2  # a word may be cut
    assert text.count(answer) == 1


def test_random_tokens_occur_once(tokenizer):
    trial = Trials(tokenizer, 50256, FILLER, ANSWERS, 0).trial("random", 200, 0.5, 1)
    (right,), *wrong = trial.answers
    assert len(trial.ids) == 199
    place = trial.ids.index(right)
    assert trial.ids[place - 1] == trial.ids[-1]
    assert place == 1 + round(0.5 * 195) + 1
    assert trial.ids.count(trial.ids[-1]) == 2
    assert not any(one in trial.ids for (one,) in wrong)


def test_the_control_has_no_fact_and_the_same_question(tokenizer):
    trials = Trials(tokenizer, 50256, FILLER, ANSWERS, 0)
    with_fact, without = (trials.trial(kind, 300, 0.5, 3) for kind in ("text", "absent"))
    assert with_fact.answers == without.answers
    text = tokenizer.decode(without.ids[1:])
    assert text.count("The secret number") == 1
    assert text.rpartition("\n")[2] == tokenizer.decode(with_fact.ids).rpartition("\n")[2]


def test_questions_follow_from_the_seed(tokenizer):
    first, again = (Trials(tokenizer, 50256, FILLER, ANSWERS, 1).trial("text", 200, 0.5, 3) for _ in range(2))
    other = Trials(tokenizer, 50256, FILLER, ANSWERS, 2).trial("text", 200, 0.5, 3)
    assert first == again != other


def test_likelihoods_are_those_of_each_answer_alone(model):
    checkpoint = Checkpoint.open(model)
    trial = Trials(checkpoint.tokenizer, 256, FILLER, ANSWERS, 0).trial("text", 250, 0.5, 0)
    engine = Engine.open(checkpoint, context=251, num_requests=ANSWERS, cache_tokens=1200)
    expected = [engine.score([*trial.ids, *answer], len(trial.ids)).sum() for answer in trial.answers]
    np.testing.assert_allclose(log_likelihoods(engine, trial), expected, atol=1e-5)


@pytest.mark.parametrize(("oracle", "share"), [(True, 1.0), (False, 0.2)])
def test_who_finds_facts_is_right_and_who_does_not_is_right_by_chance(model, monkeypatch, oracle, share):
    rng = np.random.default_rng(0)

    def answer(engine, trial):
        scores = rng.normal(size=len(trial.answers))
        asked = trial.ids[-1]
        if oracle and trial.answers[0][0] in trial.ids and asked in trial.ids[:-1]:
            scores[0] = 10.0
        return scores

    monkeypatch.setattr(needle, "log_likelihoods", answer)
    given: dict[str, Any] = {"haystack": FILLER, "lengths": [64], "depths": [0.0, 1.0], "number": 400}
    given |= {"answers": ANSWERS, "seed": 0}
    cells = list(ask(Checkpoint.open(model), kinds=("random",), **given))
    assert [(cell.kind, cell.length, cell.depth) for cell in cells] == [("random", 64, 0.0), ("random", 64, 1.0)]
    assert all(abs(cell.share - share) < 4 * cell.error for cell in cells)


def test_a_model_that_says_nothing_is_right_by_chance(tmp_path):
    """All answers are equally likely to it, and the right one is the first."""
    folder = save_tiny(tmp_path / "model", n_positions=256)
    change_tensors(folder, lambda tensors: {name: 0 * t if "wte" in name else t for name, t in tensors.items()})
    given: dict[str, Any] = {"haystack": FILLER, "lengths": [200], "depths": [0.5], "number": 3, "seed": 0}
    cells = list(ask(Checkpoint.open(folder), kinds=KINDS, answers=ANSWERS, **given))
    assert [cell.share for cell in cells] == [pytest.approx(1 / ANSWERS)] * len(KINDS)


def test_equally_likely_answers_share_the_credit():
    scores = [[-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-1.0, -1.0, -3.0], [-2.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]
    assert [credit(np.array(one)) for one in scores] == [1, 0, 0.5, 0, pytest.approx(1 / 3)]


def test_end_of_text_is_no_random_fact(model):
    trials = Trials(Checkpoint.open(model).tokenizer, END, FILLER, 40, 0)
    for number in range(20):
        trial = trials.trial("random", 64, 0.5, number)
        assert trial.ids.index(END) == len(trial.ids) - 1 - trial.ids[::-1].index(END) == 0
        assert [END] not in trial.answers


def test_errors_are_never_zero():
    assert Cell("text", 10, 0.0, 0, 20).error == pytest.approx(np.sqrt(2 / 24 * 22 / 24 / 24))
    assert Cell("text", 10, 0.0, 20, 20).error == pytest.approx(Cell("text", 10, 0.0, 0, 20).error)


def test_results_plot_and_table(model, tmp_path, capsys):
    output, plot = tmp_path / "results.json", tmp_path / "needle.png"
    run_needle(
        model, Needle(lengths=(160, 240), depths=(0, 100), trials=2, answers=3, output=str(output), plot=str(plot))
    )
    rows = read_results(output)
    assert len(rows) == 2 * 2 + 2 * 2 + 2
    assert rows[0].name == "needle text, 160 tokens at 0%"
    assert rows[0].settings["chance"] == 1 / 3
    assert rows[-1].settings["depth"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "control: the fact is not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lengths 10", "10 tokens are too few for a fact, a question and an answer; give at least"),
        ("--depths 101", "--depths"),
        ("--answers 1", "--answers is 1"),
        ("--text {empty}", "which holds no text"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(model, tmp_path, arguments, message, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert main(["eval-needle", str(model), *arguments.format(empty=empty).split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
