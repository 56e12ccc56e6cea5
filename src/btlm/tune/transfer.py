"""The command `btlm transfer`: tunes hyperparameters on a narrow proxy, and writes a wide model's recipe with them.

Under muP, the best learning rate, initialization, embedding multiplier and output multiplier at base width are the best
at every width (arXiv 2203.03466). A random search on a small model therefore finds them, as BTLM's authors did.

The values of trial ``i`` depend only on ``seed`` and ``i``. The study is an Optuna journal in the output folder; a
trial that was killed runs again with the same values, from its last checkpoint.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from btlm.data.shards import TokenShards
from btlm.files import is_empty, locked, write_text
from btlm.plots import need_matplotlib
from btlm.settings import plain, to_yaml
from btlm.train.distributed import join_ranks
from btlm.train.loop import training_batches
from btlm.train.recipe import Recipe, Watching
from btlm.train.recipe_file import load_recipe

from .options import Search, SearchSpace, rounded, sampler
from .transfer_trials import Job, Setting, run_jobs

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "study.journal"
RESULT = "recipe.yaml"


def run_transfer(
    proxy: Path | str,
    data: Path | str,
    output: Path | str,
    trials: int,
    workers: int = Search.workers,
    target: Path | str | None = None,
    space: SearchSpace | None = None,
    seed: int = Search.seed,
    device: str = "auto",
    token_bytes: NDArray[np.int64] | None = None,
) -> Recipe:
    """Search on the proxy until ``trials`` trials are finished; the same call continues an interrupted search.

    Args:
        proxy: YAML file of the proxy's recipe, with ``mup_base_width``.
        data: Folder of token shards with held-out text.
        output: Folder that receives the journal, ``recipe.yaml`` with the best values, ``transfer.png``, and one
            ``trials/*/metrics.jsonl`` per trial.
        trials: Number of finished trials to reach, including those that diverged and those of earlier calls.
        workers: Number of trials that run at the same time.
        target: YAML file of the recipe that gets the values; by default the proxy's.
        space: Ranges to search; by default those of :class:`SearchSpace`.
        seed: Seed of the random values.
        device: Torch device; with ``cuda``, workers take the GPUs in turn, one each.
        token_bytes: Bytes of text per token id, int64 ``[vocab]``; by default of the GPT-2 vocabulary.

    Returns:
        The recipe that was written.

    Raises:
        ValueError: A recipe, the shards or a number cannot be used, ``output`` holds another study, another command
            works in it, or every trial diverged.
        ChildProcessError: The process of a trial was killed.
        KeyboardInterrupt: A trial was stopped by a signal; its checkpoint has been written.
    """
    from rich.console import Console

    from btlm.train.held_out import token_bytes as gpt2_token_bytes

    from .transfer_report import plot_trials, trials_table, watch

    Search(trials, workers, seed=seed)  # checks them
    need_matplotlib()
    space = space or SearchSpace()
    recipe = _read_proxy(proxy)
    # Raises errors of the target's recipe before anything is trained.
    _result(target or proxy, recipe, space.draw(seed, 0))
    shards = TokenShards(data)
    training_batches(recipe, shards, join_ranks(device))
    if not shards.num_tokens("validation"):
        raise ValueError(
            f"{data} holds no held-out text to compare trials by; prepare it with a holdout (mix.holdout)."
        )
    sizes = gpt2_token_bytes() if token_bytes is None else token_bytes
    if recipe.config.vocab_size < len(sizes):
        raise ValueError(f"vocab_size is {recipe.config.vocab_size}; the shards need at least {len(sizes)}.")

    settings = {
        "proxy": plain(recipe),
        "space": {name: list(limits) for name, limits in space.ranges.items()},
        "seed": seed,
        "data": [shards.fingerprint(split) for split in ("train", "validation")],
    }
    output = Path(output)
    console = Console(stderr=True)
    with open_study(output, settings) as study:
        running: dict[int, Trial] = {}
        jobs = _jobs(study, running, recipe, space, seed, trials, output)
        with watch(console, len(finished_trials(study)), trials, recipe.total_steps) as show:
            for event in run_jobs(jobs, Setting(Path(data), sizes, device), workers):
                show(event)
                if event.kind == "stopped":
                    raise KeyboardInterrupt
                if event.kind == "error":
                    raise ValueError(f"Trial {event.number}: {event.value}")
                if event.kind != "step":
                    _tell(study, running.pop(event.number), event.value)
                    _clean(output, event.number)
        finished = finished_trials(study)
        best = [trial for trial in finished.values() if trial.value is not None]
        if not best:
            raise ValueError(f"All {len(finished)} trials diverged; search lower learning rates.")
        chosen = min(best, key=lambda trial: trial.value or 0.0)
        result = _result(target or proxy, recipe, rounded(chosen.params))
        heading = (
            f"# Values of trial {chosen.user_attrs['number']}, the best of {len(finished)} on "
            f"{Path(proxy).name}: held-out loss {chosen.value:.4f} bits per byte.\n"
        )
        write_text(output / RESULT, heading + to_yaml(result))
        plot_trials(finished, space.ranges, output / "transfer.png")
        console.print(trials_table(finished))
        console.print(f"Wrote {output / RESULT} and {output / 'transfer.png'}")
    return result


# The study


@contextmanager
def open_study(output: Path, settings: Mapping[str, Any]) -> Iterator["Study"]:
    """Open a new or continued study in a folder, locked against other commands.

    Raises:
        ValueError: The folder holds other files, a study with other settings, or a study that is running.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = output / JOURNAL
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder.")
    if output.exists() and not is_empty(output) and not journal.exists():
        raise ValueError(f"{output} holds files that no search wrote; give a new or empty folder.")
    optuna.logging.set_verbosity(logging.WARNING)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        with journal.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # Drops a last line that was only partly written.
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(storage=storage, study_name="transfer", load_if_exists=True)
        kept = study.user_attrs.get("settings")
        if kept is None:
            study.set_user_attr("settings", dict(settings))
        elif kept != settings:
            differ = ", ".join(key for key in settings if kept.get(key) != settings[key])
            raise ValueError(f"{output} holds a search with another {differ}; give a new output folder.")
        for trial in study.get_trials(deepcopy=False):
            if not trial.state.is_finished():
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # It was killed, and will run again.
        yield study


def finished_trials(study: "Study") -> dict[int, "FrozenTrial"]:
    """Finished trials, by number; those that diverged are pruned, with ``reason`` in ``user_attrs``."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return dict(sorted((trial.user_attrs["number"], trial) for trial in trials))


def _jobs(
    study: "Study",
    running: dict[int, "Trial"],
    proxy: Recipe,
    space: SearchSpace,
    seed: int,
    trials: int,
    output: Path,
) -> Iterator[Job]:
    """The missing trials; each is begun in the study and put into ``running`` when the iterator reaches it."""
    finished = finished_trials(study)
    for number in finished:
        _clean(output, number)
    # An earlier call may have finished more trials than this one asks for.
    for number in range(trials):
        if number not in finished:
            study.sampler = sampler(seed, number)
            running[number] = trial = study.ask(space.distributions)
            trial.set_user_attr("number", number)
            yield Job(number, _with_values(proxy, rounded(trial.params)), _folder(output, number))


def _tell(study: "Study", trial: "Trial", value: float | str) -> None:
    """Record the loss of a trial, or why it has none."""
    from optuna.trial import TrialState

    if isinstance(value, str):
        trial.set_user_attr("reason", value)
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, value)


def _folder(output: Path, number: int) -> Path:
    return output / "trials" / f"{number:04d}"


def _clean(output: Path, number: int) -> None:
    """Remove the checkpoints and the model of a finished trial."""
    for path in _folder(output, number).glob("*/"):
        shutil.rmtree(path)


# Recipes


def _read_proxy(path: Path | str) -> Recipe:
    recipe = load_recipe(path)
    if recipe.start is not None:
        raise ValueError(
            f"{path} continues from start.model; a search needs a model that is trained from random weights."
        )
    if recipe.mup_base_width is None:
        raise ValueError(f"{path} has no mup_base_width; give the width at which the values are to hold, its n_embd.")
    if not recipe.config.mup_scale_qk_dot_by_d:
        raise ValueError(f"{path} sets model.mup_scale_qk_dot_by_d to false; muP divides scores by the head dimension.")
    return recipe


def _with_values(recipe: Recipe, values: Mapping[str, float]) -> Recipe:
    """The proxy's recipe with the values of a trial, without TensorBoard and W&B."""
    model = {name: value for name, value in values.items() if name != "lr"}
    optimizer = replace(recipe.optimizer, lr=values["lr"])
    return replace(recipe, optimizer=optimizer, model=recipe.model | model, watching=Watching(tensorboard=False))


def _result(path: Path | str, proxy: Recipe, values: Mapping[str, float]) -> Recipe:
    """A file's recipe with the values of a trial, which hold at the proxy's base width."""
    changes = {"optimizer.lr" if name == "lr" else f"model.{name}": value for name, value in values.items()}
    base = {"mup_base_width": proxy.mup_base_width, "model.mup_scale_qk_dot_by_d": True}
    return load_recipe(path, changes | base)
