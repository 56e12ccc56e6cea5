"""What lm-evaluation-harness returns or writes, as rows of `results.json`."""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from btlm.console import one_line, warn
from btlm.errors import ResultsError

from .results import Origin, Result

_VERSION = "0.4."


def harness_rows(
    found: Mapping[str, Any],
    origin: Origin,
    settings: Mapping[str, Any],
    data: Mapping[str, list[str]] | None = None,
    *,
    partial: bool = False,
) -> Iterator[Result]:
    """One row per task or group, metric and filter.

    Args:
        found: What `lm_eval.evaluate` returned.
        origin: The model and the machine.
        settings: What the numbers depend on.
        data: Digests of the local files of each task.
        partial: Whether all rows are partial; otherwise the numbers of questions tell.
    """
    sizes, children = found["n-samples"], found.get("group_subtasks", {})

    def is_partial(name: str) -> bool:
        below = children.get(name)
        return any(map(is_partial, below)) if below else sizes[name]["effective"] < sizes[name]["original"]

    def shots(name: str) -> int | None:
        of = {shots(one) for one in children.get(name, ())} or {found["n-shot"].get(name)}
        return of.pop() if len(of) == 1 else None

    def number(name: str) -> int:
        below = children.get(name)
        return sum(map(number, below)) if below else int(sizes[name]["effective"])

    for name, figures in {**found["results"], **found.get("groups", {})}.items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                warn(f"{metric} of {name} is {value}, which is no result; it is left out.")
                continue
            error = figures.get(f"{metric}_stderr,{filtered}")
            of = {**settings, "task_version": found["versions"].get(name)}
            of |= {"filter": filtered} if filtered != "none" else {}
            of |= {"data_sha256": data[name]} if data and name in data else {}
            yield origin.result(
                name,
                metric,
                float(value),
                "",
                number(name),
                standard_error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                shots=shots(name),
                partial=partial or is_partial(name),
                settings=of,
            )


def read_harness_file(path: Path, content: Mapping[str, Any]) -> list[Result]:
    """Rows of a file ``results_*.json`` that the harness wrote, for any model.

    Args:
        path: The file, for messages.
        content: Its content.

    Raises:
        ResultsError: It was written by another version of the harness, or is damaged.
    """
    written = content.get("lm_eval_version")
    if not isinstance(written, str) or not written.startswith(_VERSION):
        version = "an unknown version" if written is None else f"version {written}"
        raise ResultsError(
            f"{path} was written by {version} of lm-evaluation-harness, and {_VERSION}x is read; evaluate again."
        )
    try:
        config = content["config"]
        arguments = config.get("model_args") or {}
        if isinstance(arguments, str):
            arguments = dict(one.partition("=")[::2] for one in arguments.split(","))
        name = str(content.get("model_name") or arguments.get("pretrained") or config["model"])
        versions = {"lm_eval": written} | {
            package: str(content[key])
            for package, key in (("transformers", "transformers_version"),)
            if content.get(key)
        }
        origin = Origin(
            name,
            str(config.get("model_sha") or ""),
            versions,
            f"lm_eval with the model {config['model']}",
            _processor(str(content.get("pretty_env_info", ""))),
        )
        settings = {"model": config["model"], "dtype": str(config.get("model_dtype") or "")}
        rows = list(harness_rows(content, origin, settings, partial=config.get("limit") is not None))
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(float(content["date"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{path} is no whole file of lm-evaluation-harness ({one_line(error)}).") from error
    return [Result(**{**vars(row), "time": when}) for row in rows]


def _processor(info: str) -> str:
    return next((line.partition(":")[2].strip() for line in info.splitlines() if "Model name" in line), "unknown")
