"""The commands of `btlm data`: one stage, or all of them, and a report of what they did."""

from collections.abc import Sequence
from pathlib import Path

from .clean import clean_documents
from .dedup import deduplicate
from .mix import mix
from .recipe import Clean, DataRecipe, Dedup, Execution, Mix, Read
from .report import write_report
from .stage import COMPLETE, Run, load_stage, open_run
from .tokenize import tokenize

Inputs = Sequence[Path | str]


def run_prepare(inputs: Inputs, output: Path | str, recipe: DataRecipe, execution: Execution) -> None:
    """Raw documents to token shards: the stages ``clean``, ``dedup``, ``mix`` and ``shards``, in folders of ``output``.

    The same call continues an interrupted run and does nothing that is done.

    Raises:
        ValueError: What can be put right: an input, a setting, or an output that holds other work.
    """
    output = _outside(inputs, output)
    with open_run(output, execution) as run:
        clean_documents(inputs, output / "clean", recipe.read, recipe.clean, run)
        deduplicate(output / "clean", output / "dedup", recipe.dedup, run)
        mix(output / "dedup", output / "mix", recipe.mix, run)
        tokenize(output / "mix", output / "shards", run)
        write_report(output / "shards", output, run)


def run_clean(inputs: Inputs, output: Path | str, read: Read, clean: Clean, execution: Execution) -> None:
    """Only the stage ``clean``, see :func:`btlm.data.clean.clean_documents`."""
    output = _outside(inputs, output)
    with open_run(output, execution) as run:
        clean_documents(inputs, output, read, clean, run)
        write_report(output, output, run)


def run_dedup(inputs: Inputs, output: Path | str, read: Read, dedup: Dedup, execution: Execution) -> None:
    """Only the stage ``dedup``, of documents or of the output of another stage."""
    output = _outside(inputs, output)
    with open_run(output, execution) as run:
        deduplicate(_documents(inputs, output, read, run), output, dedup, run)
        write_report(output, output, run)


def run_mix(inputs: Inputs, output: Path | str, read: Read, settings: Mix, execution: Execution) -> None:
    """Only the stage ``mix``, of documents or of the output of another stage."""
    output = _outside(inputs, output)
    with open_run(output, execution) as run:
        mix(_documents(inputs, output, read, run), output, settings, run)
        write_report(output, output, run)


def run_tokenize(inputs: Inputs, output: Path | str, read: Read, execution: Execution) -> None:
    """Only the stage ``tokenize``, of documents or of the output of another stage."""
    output = _outside(inputs, output)
    with open_run(output, execution) as run:
        tokenize(_documents(inputs, output, read, run), output, run)
        write_report(output, output, run)


def _outside(inputs: Inputs, output: Path | str) -> Path:
    """The output as a path, which no input may contain: its files would become input of the next attempt."""
    output = Path(output)
    for path in map(Path, inputs):
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{output} lies within the input {path}; give an output elsewhere.")
    return output


def _documents(inputs: Inputs, output: Path, read: Read, run: Run) -> Path:
    """The folder of a stage: the one that was given, or one that has read the input."""
    given = [Path(path) for path in inputs]
    stages = [path for path in given if (path / COMPLETE).exists()]
    if stages and len(given) > 1:
        raise ValueError(f"{stages[0]} is the output of a stage, which is read alone; give nothing else.")
    if stages:
        if "parts" not in load_stage(stages[0]):
            raise ValueError(f"{stages[0]} holds token shards; give documents, or a stage that ends in documents.")
        if read != Read():
            raise ValueError(f"{stages[0]} is the output of a stage, which has no settings of `read`; leave them out.")
        return stages[0]
    folder = output / "read"
    clean_documents(inputs, folder, read, Clean(normalization="none", min_characters=0), run, name="read")
    return folder
