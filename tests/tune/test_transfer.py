import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from btlm.errors import NotFinite
from btlm.plots import pyplot
from btlm.settings import to_yaml
from btlm.train import loop
from btlm.train.recipe import Checkpoints, Optimizer, Recipe, Stage
from btlm.train.recipe_file import load_recipe
from btlm.tune.options import SearchSpace
from btlm.tune.transfer import JOURNAL, RESULT, finished_trials, run_transfer
from btlm.tune.transfer_report import plot_trials
from btlm.tune.transfer_trials import Job, Setting, run_job, run_jobs
from tests.data.tiny import write_streams
from tests.train.tiny import MODEL, TOKEN_BYTES, VOCAB_SIZE, tiny_recipe, tiny_shards

SPACE = SearchSpace(lr=(3e-3, 3e-2))


class Killed(BaseException):
    """An exception that no code handles: everything stays as it is, as after a signal that cannot be caught."""


def proxy_recipe(**overrides) -> Recipe:
    model = {key: value for key, value in MODEL.items() if key != "mup_width_scale"}
    stages = [Stage(16, 64, 192)]
    return replace(tiny_recipe(), model=model, stages=stages, mup_base_width=32, **overrides)


@pytest.fixture
def files(tmp_path):
    """The proxy's recipe, the shards, and an output folder that does not exist yet."""
    tiny_shards(tmp_path / "shards")
    (tmp_path / "proxy.yaml").write_text(to_yaml(proxy_recipe()))
    return tmp_path / "proxy.yaml", tmp_path / "shards", tmp_path / "out"


def run(files, trials, **options):
    given: dict[str, Any] = {"space": SPACE, "device": "cpu", "token_bytes": TOKEN_BYTES}
    proxy, shards, output = files
    return run_transfer(proxy, shards, output, trials, **given | options)


def study_in(output: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(output / JOURNAL)))
    return optuna.load_study(study_name="transfer", storage=storage)


def trials_of(output: Path) -> dict[int, Any]:
    return dict(finished_trials(study_in(output)))


def states_in(output: Path) -> list[str]:
    return [trial.state.name for trial in study_in(output).get_trials()]


def watch_training(monkeypatch) -> list[Recipe]:
    """List of the recipes that are trained from now on."""
    original, recipes = loop.train, []

    def watched(recipe, *rest):
        recipes.append(recipe)
        return original(recipe, *rest)

    monkeypatch.setattr(loop, "train", watched)
    return recipes


def test_values_are_log_uniform_and_follow_from_seed_and_number():
    space = SearchSpace()
    draws = [space.draw(1, number) for number in range(200)]
    assert draws[:3] == [SearchSpace().draw(1, number) for number in range(3)]
    assert draws[0] != draws[1]
    assert space.draw(2, 0) != draws[0]
    # The values are uniform on [0, 1], with mean 1/2, standard deviation 1/sqrt(12) and no correlation, within 4
    # standard errors.
    unit = np.array(
        [
            [math.log(draw[name] / low) / math.log(high / low) for name, (low, high) in space.ranges.items()]
            for draw in draws
        ]
    )
    assert abs(unit.mean(0) - 0.5).max() < 4 / math.sqrt(12 * 200)
    assert abs(unit.std(0) - 1 / math.sqrt(12)).max() < 0.05
    assert abs(np.corrcoef(unit.T) - np.eye(4)).max() < 4 / math.sqrt(200)
    assert unit.min() > -1e-3
    assert unit.max() < 1 + 1e-3


def test_a_search_finds_its_best_trial_and_goes_on(files, monkeypatch):
    output = files[2]
    result = run(files, 3)
    trials = trials_of(output)
    assert list(trials) == [0, 1, 2]
    for number, trial in trials.items():
        lines = (output / f"trials/{number:04d}/metrics.jsonl").read_text().splitlines()
        assert trial.value == json.loads(lines[-1])["bits_per_byte"]["mean"]
        assert not list((output / f"trials/{number:04d}").glob("*/")), "checkpoints of a finished trial are left"
    best = min(trials, key=lambda number: trials[number].value)
    values = SPACE.draw(1, best)
    assert result == load_recipe(output / RESULT)
    assert result.optimizer.lr == values["lr"]
    assert result == replace(
        proxy_recipe(),
        optimizer=replace(proxy_recipe().optimizer, lr=values["lr"]),
        model=result.model,
    )
    assert {key: result.model[key] for key in values if key != "lr"} == {k: v for k, v in values.items() if k != "lr"}
    assert f"trial {best}" in (output / RESULT).read_text().splitlines()[0]
    assert (output / "transfer.png").stat().st_size > 10_000

    begun = watch_training(monkeypatch)
    run(files, 4)
    assert [recipe.optimizer.lr for recipe in begun] == [SPACE.draw(1, 3)["lr"]], "finished trials ran again"
    assert run(files, 2) == load_recipe(output / RESULT)
    assert len(trials_of(output)) == 4
    assert len(begun) == 1


def test_a_trial_trains_with_its_values(files, monkeypatch):
    recipes = watch_training(monkeypatch)
    run(files, 2)
    for number, recipe in enumerate(recipes):
        values = SPACE.draw(1, number)
        assert recipe.optimizer.lr == values.pop("lr")
        assert recipe.model == proxy_recipe().model | values
        assert recipe.stages == proxy_recipe().stages


def test_a_killed_trial_goes_on_from_its_checkpoint_with_the_same_values(files, tmp_path, monkeypatch):
    (tmp_path / "reference").mkdir()
    run((files[0], files[1], tmp_path / "reference"), 2)

    original = loop.train

    def killed(recipe, shards, output, *rest):
        for record in original(recipe, shards, output, *rest):
            if recipe.optimizer.lr == SPACE.draw(1, 1)["lr"] and record["step"] == 2:
                raise Killed
            yield record

    monkeypatch.setattr(loop, "train", killed)
    with pytest.raises(Killed):
        run(files, 2)
    assert states_in(files[2]) == ["COMPLETE", "RUNNING"]
    assert not (files[2] / RESULT).exists()

    with (files[2] / JOURNAL).open("a") as journal:
        journal.write('{"op_code": 4, "wor')  # like a kill in the middle of a line
    steps = []

    def watched(*arguments):
        for record in original(*arguments):
            steps.append(record["step"])
            yield record

    monkeypatch.setattr(loop, "train", watched)
    run(files, 2)
    assert steps == [3], "the trial did not continue from its checkpoint"
    states = states_in(files[2])
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    losses = [[trial.value for trial in trials_of(folder).values()] for folder in (files[2], tmp_path / "reference")]
    assert losses[0] == losses[1]


def test_a_trial_that_was_complete_before_it_was_told_is_told(files, monkeypatch):
    original = loop.train

    def killed(*arguments):
        yield from original(*arguments)
        raise SystemExit

    monkeypatch.setattr(loop, "train", killed)
    with pytest.raises(SystemExit):
        run(files, 1)
    monkeypatch.setattr(loop, "train", original)
    run(files, 1)
    assert trials_of(files[2])[0].value > 0


def test_a_diverged_trial_is_pruned_with_its_reason(files, monkeypatch):
    original = loop.train

    def diverges(recipe, *rest):
        if recipe.optimizer.lr == SPACE.draw(1, 0)["lr"]:
            raise NotFinite("Step 2: loss nan.", [])
        yield from original(recipe, *rest)

    monkeypatch.setattr(loop, "train", diverges)
    run(files, 2)
    trials = trials_of(files[2])
    assert trials[0].state.name == "PRUNED"
    assert trials[0].user_attrs["reason"] == "Step 2: loss nan."
    assert load_recipe(files[2] / RESULT).optimizer.lr == SPACE.draw(1, 1)["lr"]


def test_a_trial_whose_held_out_loss_is_not_finite_diverged(tmp_path, monkeypatch):
    """Training can be finite to the end, and the last update too large."""

    def train(recipe, shards, folder, *rest):
        folder.mkdir()
        step = recipe.total_steps
        record = {"step": step, "bits_per_byte": {"mean": losses.pop(0)}}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return iter([record])

    monkeypatch.setattr(loop, "train", train)
    tiny_shards(tmp_path / "shards")
    losses = [math.inf, math.nan, 2.5]
    jobs = [Job(i, proxy_recipe(), tmp_path / str(i)) for i in range(3)]
    events = [event for job in jobs for event in run_job(job, Setting(tmp_path / "shards", TOKEN_BYTES, "cpu"))]
    assert [(event.kind, event.value) for event in events if event.kind != "step"] == [
        ("diverged", "Step 3: held-out loss inf."),
        ("diverged", "Step 3: held-out loss nan."),
        ("loss", 2.5),
    ]


def test_a_search_whose_trials_all_diverge_is_an_error(files, monkeypatch):
    def diverges(*arguments):
        raise NotFinite("Step 1: loss nan.", [])

    monkeypatch.setattr(loop, "train", diverges)
    with pytest.raises(ValueError, match="All 2 trials diverged"):
        run(files, 2)
    assert not (files[2] / RESULT).exists()


def test_a_trial_that_is_told_to_stop_is_not_finished(files, monkeypatch):
    original = loop.train

    def stopped(recipe, *rest):
        records = original(recipe, *rest)
        yield next(records)
        signal.raise_signal(signal.SIGTERM)
        yield from records

    monkeypatch.setattr(loop, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(files, 1)
    assert trials_of(files[2]) == {}
    monkeypatch.setattr(loop, "train", original)
    run(files, 1)
    assert list(trials_of(files[2])) == [0]


TARGET = """
model: {vocab_size: 200, n_positions: 32, n_embd: 128, n_layer: 3, n_head: 8, n_inner: 344, activation_function: swiglu,
  position_embedding_type: alibi, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}
optimizer: {lr: 0.5, weight_decay: 0.05}
schedule: {warmup_tokens: 64}
stages: [{sequence_length: 32, batch_tokens: 128, tokens: 1280}]
micro_batch_tokens: 128
"""


def test_the_target_gets_the_values_at_its_own_width(files, tmp_path):
    (tmp_path / "target.yaml").write_text(TARGET)
    result = run(files, 2, target=tmp_path / "target.yaml")
    trials = trials_of(files[2])
    values = SPACE.draw(1, min(trials, key=lambda number: trials[number].value))
    config = load_recipe(files[2] / RESULT).config
    assert (config.n_embd, config.n_layer, config.n_inner) == (128, 3, 344)
    assert config.mup_width_scale == 32 / 128
    assert config.mup_scale_qk_dot_by_d
    assert config.initializer_range == values["initializer_range"]
    assert config.mup_embeddings_scale == values["mup_embeddings_scale"]
    assert config.mup_output_alpha == values["mup_output_alpha"]
    assert result.mup_base_width == 32
    assert result.optimizer == Optimizer(lr=values["lr"], weight_decay=0.05)
    assert result.total_tokens == 1280


@pytest.mark.slow
def test_two_workers_find_what_one_finds(files, tmp_path):
    run(files, 4, workers=2)
    run((files[0], files[1], tmp_path / "one"), 4)
    two, one = trials_of(files[2]), trials_of(tmp_path / "one")
    assert list(two) == [0, 1, 2, 3]
    for number in two:
        assert two[number].params == one[number].params
        assert two[number].value == pytest.approx(one[number].value, rel=1e-3)  # they differ by the number of threads
    assert load_recipe(files[2] / RESULT) == load_recipe(tmp_path / "one" / RESULT)


@pytest.mark.slow
def test_workers_end_with_the_search_that_was_killed_and_their_trials_run_again(files):
    proxy, shards, output = files
    proxy.write_text(to_yaml(proxy_recipe(checkpoints=Checkpoints(every_steps=1))))
    code = (
        "from btlm.tune.transfer import run_transfer, SearchSpace\nfrom tests.train.tiny import TOKEN_BYTES\n"
        "if __name__ == '__main__':\n"
        f"    run_transfer({str(proxy)!r}, {str(shards)!r}, {str(output)!r}, 60, 2, space=SearchSpace(lr=(3e-3, 3e-2)),"
        " device='cpu', token_bytes=TOKEN_BYTES)\n"
    )
    script = output.parent / "search.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    search = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(output.glob("trials/0002/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert search.poll() is None
        time.sleep(0.1)
    with pytest.raises(ValueError, match=f"{output} is being written by process {search.pid} on "):
        run(files, 60)
    children = Path(f"/proc/{search.pid}/task/{search.pid}/children").read_text().split()
    assert len(children) >= 2
    search.kill()
    search.wait()
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline, "workers outlive the search"
        time.sleep(0.1)
    before = trials_of(output)
    run(files, len(before) + 2)
    states = states_in(output)
    assert "RUNNING" not in states
    assert "FAIL" in states
    assert list(trials_of(output)) == list(range(len(before) + 2))
    for number, trial in before.items():
        assert trials_of(output)[number].value == trial.value


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_a_killed_worker_is_told(tmp_path):
    job: Any = KillsItself()
    with pytest.raises(ChildProcessError, match="process of trial 5 was killed"):
        list(run_jobs(iter([job]), Setting(tmp_path, TOKEN_BYTES, "cpu"), workers=2))


class KillsItself:
    """Stands in for a job: the process that receives it ends."""

    number = 5

    def __reduce__(self):
        return signal.raise_signal, (signal.SIGKILL,)


# Bad input


def refused(files, match, *, exists=False, **options):
    trials = options.pop("trials", 1)
    with pytest.raises(ValueError, match=match) as caught:
        run(files, trials, **options)
    assert "\n" not in str(caught.value)
    assert files[2].exists() == exists


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"trials": 0}, "trials is 0, not a whole number of at least 1"),
        ({"workers": 0}, "workers is 0, not a whole number of at least 1"),
        ({"seed": -1}, "seed is -1, not a whole number of at least 0"),
        ({"device": "abacus"}, "The device 'abacus' is unknown"),
        ({"token_bytes": np.ones(201, dtype=np.int64)}, "vocab_size is 200"),
    ],
)
def test_bad_numbers_are_refused(files, options, match):
    refused(files, match, **options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mup_base_width": None, "model": MODEL}, "has no mup_base_width"),
        ({"stages": [Stage(4096, 4096, 4096)], "micro_batch_tokens": 4096}, "fewer than one row"),
    ],
)
def test_a_bad_proxy_is_refused(files, change, match):
    files[0].write_text(to_yaml(replace(proxy_recipe(), **change)))
    refused(files, match)


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ("n_embd: 128, ", "", "mup_base_width needs model.n_embd"),
        ("n_head: 8", "n_head: 7", "does not divide n_embd"),
        ("model:", "mdel:", "mdel is not a key"),
        ("micro_batch", "start: {model: runs/x}\nmicro_batch", "start.model"),
    ],
)
def test_a_bad_target_is_refused(files, tmp_path, before, after, match):
    assert before in TARGET
    (tmp_path / "target.yaml").write_text(TARGET.replace(before, after))
    refused(files, match, target=tmp_path / "target.yaml")


def test_a_missing_target_is_refused(files, tmp_path):
    refused(files, "not a readable recipe", target=tmp_path / "missing.yaml")


def test_shards_without_held_out_text_are_refused(files):
    manifest = files[1] / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["splits"]["validation"]
    manifest.write_text(json.dumps(content))
    refused(files, "no held-out text")


def test_another_study_in_the_folder_is_refused(files, tmp_path):
    run(files, 1)
    result = (files[2] / RESULT).read_bytes()
    refused(files, "search with another seed", exists=True, seed=2)
    refused(files, "search with another space", exists=True, space=SearchSpace(lr=(1e-3, 2e-3)))
    files[0].write_text(to_yaml(proxy_recipe(seed=9)))
    refused(files, "search with another proxy", exists=True)
    files[0].write_text(to_yaml(proxy_recipe()))
    shutil.rmtree(files[1])
    rng = np.random.default_rng(1)
    write_streams(files[1], {"books": (rng.integers(0, VOCAB_SIZE, 3000), rng.integers(0, VOCAB_SIZE, 100))})
    refused(files, "search with another data", exists=True)
    assert (files[2] / RESULT).read_bytes() == result


def test_a_folder_of_something_else_is_refused(files):
    files[2].mkdir()
    (files[2] / "notes.txt").write_text("mine")
    refused(files, "files that no search wrote", exists=True)
    assert [path.name for path in files[2].iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("limits", [(0.1, 0.01), (0.1, 0.1), (0.0, 0.1), (-1.0, 0.1), (0.1, math.inf), (math.nan, 1.0)])
def test_an_impossible_range_is_refused(limits):
    with pytest.raises(ValueError, match="lr is searched from"):
        SearchSpace(lr=limits)


# The plot


def test_every_mark_of_the_plot_is_explained_and_trials_are_whole(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("btlm.tune.transfer_report.save_figure", lambda figure, _: figures.append(figure))
    space = SearchSpace()
    losses = [2.5, 2.2, None, 9.0, 2.1, 2.3]
    trials: Any = {i: SimpleNamespace(params=space.draw(1, i), value=loss) for i, loss in enumerate(losses)}
    plot_trials(trials, space.ranges, tmp_path / "transfer.png")
    (figure,) = figures
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [
        "trial",
        "trial with a higher loss than the axis shows",
        "trial that diverged",
        "best trial",
        "best trial so far",
    ]
    ticks = figure.axes[-1].get_xticks()
    assert list(ticks) == [round(tick) for tick in ticks]
    for axis in figure.axes:
        drawn = {line.get_marker(): len(line.get_xdata()) for line in axis.lines if line.get_label() != "best trial"}
        assert (drawn["o"], drawn["^"], drawn["x"]) == (4, 1, 1)
    pyplot().close(figure)
