"""Tasks of lm-evaluation-harness by name, on their data from the Hugging Face Hub or on local files."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from btlm.console import one_line, warn
from btlm.errors import OptionError
from btlm.files import file_sha256
from btlm.settings import did_you_mean

from .suites import SUITES, TASKS, PaperTask
from .tasks.humaneval import KS

# Tasks whose local rows may be the output of their own `process_docs`: a key that only such rows have, and the changes
# to the task.
_PROCESSED = {"hellaswag": ("gold", {"process_docs": None, "doc_to_target": "gold"})}
_OWN = Path(__file__).parent / "tasks"  # of this project
_FEW_SHOT_SEED = 1234  # that of the harness


@dataclass(frozen=True)
class Loaded:
    """Tasks that are ready to be asked.

    Args:
        tasks: What the harness evaluates: its keys ``tasks``, ``groups`` and ``group_map``.
        leaves: What was asked for, in this order, with the names of the tasks that each stands for.
        data_sha256: Digests of the local files of each leaf.
    """

    tasks: dict[str, Any]
    leaves: dict[str, list[str]]
    data_sha256: dict[str, list[str]]


@contextmanager
def quiet_harness() -> Iterator[None]:
    """In this context, the harness and ``datasets`` show only errors, and no progress bars."""
    import datasets
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, init = [logger.level for logger in loggers], tqdm.__init__
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)

    def hidden(bar: Any, *args: Any, **options: Any) -> None:
        init(bar, *args, **{**options, "disable": True})  # the harness often asks for a bar explicitly

    tqdm.__init__ = hidden
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        tqdm.__init__ = init
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def offline() -> Iterator[None]:
    """In this context, ``datasets`` and ``huggingface_hub`` do not ask the Hub, and say so where they would."""
    import datasets
    import huggingface_hub

    # These read the environment once, when they are imported.
    homes: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [home.HF_HUB_OFFLINE for home in homes]
    for home in homes:
        home.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value


@contextmanager
def load_tasks(
    names: Sequence[str],
    *,
    data: Path | None = None,
    include: Path | None = None,
    shots: int | None = None,
    samples: int = 1,
) -> Iterator[Loaded]:
    """Load tasks; their local data are there as long as the context is.

    Args:
        names: Suites, and tasks, groups and tags of the harness.
        data: Folder of local files ``TASK_SPLIT.jsonl``, such as ``piqa_validation.jsonl``; without it, data come from
            the Hub. A file of a group, such as ``mmlu_test.jsonl``, has the key ``subject``. Tasks of a suite that have
            no files are left out, with a warning.
        include: Folder of further tasks, as YAML files of the harness.
        shots: Number of examples before a question, where a task does not fix it; that of the paper by default.
        samples: Number of programs per problem of humaneval; more than one are drawn at random.

    Raises:
        OptionError: A name is unknown, or data are missing.
        ValueError: A file is malformed; the message has its name and line.
    """
    if data is not None and not data.is_dir():
        raise OptionError("{data} is {}, which is not a folder.", data)
    manager = _manager(names, include)
    index, before = manager.task_index, dict(manager.task_index)
    loaded = Loaded({"tasks": {}, "groups": {}, "group_map": {}}, {}, {})
    without_files = []
    with tempfile.TemporaryDirectory(prefix="btlm-eval-", ignore_cleanup_errors=True) as folder:
        try:
            for asked in _papers(names, index):
                paper = _sampled(asked, index, samples) if asked.name == "humaneval" and samples > 1 else asked
                if paper.stock:
                    index[paper.name] = replace(index[paper.stock], name=paper.name)
                try:
                    _change(index, paper, paper.shots if shots is None else shots, data, Path(folder), loaded)
                except _NoFileError:
                    if paper.name in names:
                        raise
                    without_files.append(paper.name)
                    continue
                _load(manager, paper, shots, data, loaded)
        finally:
            index.clear()
            index.update(before)
        if without_files:
            if not loaded.leaves:
                raise OptionError(
                    "{data} is {}, which has files of none of the tasks: {}.", data, ", ".join(without_files)
                )
            warn(f"{data} has no files of {', '.join(without_files)}, which are left out.")
        yield loaded


def _sampled(paper: PaperTask, index: Mapping[str, Any], samples: int) -> PaperTask:
    """HumanEval with several programs per problem, for pass@k."""
    kwargs = {**index[paper.stock].cfg["generation_kwargs"], "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    metrics = [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in KS if k <= samples]
    changes: dict[str, Any] = {"repeats": samples, "generation_kwargs": kwargs, "metric_list": metrics}
    changes["filter_list"] = [{"name": "samples", "filter": [{"function": "take_first_k", "k": samples}]}]
    return replace(paper, changes={**paper.changes, **changes})


class _NoFileError(OptionError):
    """A task that has no file among the local data."""


def _change(
    index: dict[str, Any], paper: PaperTask, shots: int, data: Path | None, folder: Path, loaded: Loaded
) -> None:
    """Put what is special about a task, its local files among them, into the index."""
    leaves = list(_leaves(index, paper.name))
    changes = {leaf: {**paper.changes, **({"task": paper.name} if paper.stock else {})} for leaf in leaves}
    if data is not None:
        for leaf in leaves:
            local, files = _local(leaf, {**index[leaf].cfg, **changes[leaf]}, data, shots, folder)
            changes[leaf] |= local
            loaded.data_sha256[leaf] = [file_sha256(file) for file in files]
    for leaf, of_leaf in changes.items():
        if of_leaf:
            path = folder / f"{leaf}.yaml"
            path.write_text(yaml.safe_dump({"include": str(index[leaf].yaml_path), **of_leaf}), encoding="utf-8")
            index[leaf] = replace(index[leaf], yaml_path=path)
    loaded.leaves[paper.name] = leaves


def _load(manager: Any, paper: PaperTask, shots: int | None, data: Path | None, loaded: Loaded) -> None:
    try:
        found = manager.load([paper.name])
    except Exception as error:  # of the harness, of `datasets`, or of the code of the task
        if data is not None:
            raise ValueError(
                f"The rows of {paper.name} in {data} are not those that the task reads ({one_line(error)})."
            ) from error
        raise OptionError(
            "The data of {} cannot be loaded ({}). Without a network, give local files with {data}.",
            paper.name,
            one_line(error),
        ) from error
    for task in found["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # otherwise the examples are part of its prompt
            default = paper.shots if paper.name in TASKS else own or 0
            task.set_config(key="num_fewshot", value=default if shots is None else shots)
        task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    for key in loaded.tasks:
        loaded.tasks[key] |= found.get(key) or {}


# Names


@cache
def _stock() -> Any:
    """The tasks of the harness and ours; it reads thousands of files for them."""
    return TaskManager(include_path=str(_OWN))


def _manager(names: Sequence[str], include: Path | None) -> Any:
    if include is None:
        return _stock()
    if not include.is_dir():
        raise OptionError("{include} is {}, which is not a folder.", include)
    own = TaskManager(include_defaults=False, include_path=str(include))
    if all(name in own.task_index for name in names):
        return own
    return TaskManager(include_path=[str(_OWN), str(include)])


def _papers(names: Sequence[str], index: Mapping[str, Any]) -> list[PaperTask]:
    """What is asked for, each task once."""
    papers: dict[str, PaperTask] = {}
    for name in names:
        for task in SUITES.get(name, (name,)):
            paper = TASKS.get(task) or PaperTask(task, "")
            if (paper.stock or task) not in index:
                near = did_you_mean(task, [*SUITES, *TASKS, *index])
                known = f"; the suites are {', '.join(SUITES)}, and `lm_eval ls tasks` lists the tasks."
                raise OptionError("{suite} has {}, which is neither a suite nor a task{}", task, near or known)
            papers[paper.name] = paper
    return list(papers.values())


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of a group or a tag, or the task itself."""
    entry = index[name]
    if entry.kind.name == "TAG":
        for tagged in sorted(entry.tags):
            yield from _leaves(index, tagged)
    elif entry.kind.name == "GROUP":
        items = (entry.cfg or {}).get("task") or []
        for item in [items] if isinstance(items, str) else items:
            below = item if isinstance(item, str) else item.get("group") or item.get("task")
            if isinstance(below, str) and below in index:
                yield from _leaves(index, below)
    else:
        yield name


# Local data


def _local(
    task: str, config: Mapping[str, Any], data: Path, shots: int, folder: Path
) -> tuple[dict[str, Any], list[Path]]:
    """The changes that make a task read local files, and these files."""
    asked = config.get("test_split") or config.get("validation_split")
    examples = config.get("fewshot_split") or config.get("training_split")
    wanted = [str(split) for split in {asked: None, examples: None} if split]
    changes: dict[str, Any] = {"dataset_path": "json", "dataset_name": None}
    changes |= dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    files: dict[str, str] = {}
    sources = []
    for split in wanted:
        found = _find(data, task, split, config.get("dataset_name"))
        if found is None:
            if split != asked and not shots:
                continue
            raise _NoFileError("{data} {} has no file {}_{}.jsonl.", data, task, split)
        path, rows = found
        if task in _PROCESSED and _PROCESSED[task][0] in rows[0]:
            changes |= _PROCESSED[task][1]
        copy = folder / f"{task}_{split}.jsonl"
        copy.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(copy)
        sources.append(path)
    changes["test_split"] = asked
    if examples in files and examples != asked:
        changes["fewshot_split"] = examples
    changes["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    return changes, sources


def _find(data: Path, task: str, split: str, subject: object) -> tuple[Path, list[dict[str, Any]]] | None:
    """The file of a task, or the rows of its subject in the file of a group."""
    own = data / f"{task}_{split}.jsonl"
    if own.is_file():
        return own, _rows(own)
    parts = task.split("_")
    for number in range(len(parts) - 1, 0, -1):
        path = data / f"{'_'.join(parts[:number])}_{split}.jsonl"
        if path.is_file() and (rows := [row for row in _rows(path) if row.get("subject", _MISSING) == subject]):
            return path, rows
    return None


_MISSING = object()


@cache
def _rows_at(path: Path, _changed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    kinds: dict[str, type] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not JSON ({one_line(error)}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place} is not an object.")  # noqa: TRY004
            if rows and (missing := [key for key in rows[0] if key not in row]):
                raise ValueError(f"{place} has no {missing[0]}, which the rows before it have.")
            for key, value in row.items():
                kind = float if type(value) is int else type(value)
                if value is not None and kinds.setdefault(key, kind) is not kind:
                    raise ValueError(f"{place}: {key} is {value!r}, and of another type in the rows before it.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, checked; they are read once, however many subjects it has."""
    return _rows_at(path, path.stat().st_mtime_ns)
