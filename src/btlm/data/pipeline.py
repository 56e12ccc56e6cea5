"""The commands of `btlm data`: one stage, or all of them, and a report of what they did."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    with _command(inputs, output, execution, last="shards") as (folder, run):
        clean_documents(inputs, folder / "clean", recipe.read, recipe.clean, run)
        deduplicate(folder / "clean", folder / "dedup", recipe.dedup, run)
        mix(folder / "dedup", folder / "mix", recipe.mix, run)
        tokenize(folder / "mix", folder / "shards", run)


def run_clean(inputs: Inputs, output: Path | str, read: Read, clean: Clean, execution: Execution) -> None:
    """Only the stage ``clean``, see :func:`btlm.data.clean.clean_documents`."""
    with _command(inputs, output, execution) as (folder, run):
        clean_documents(inputs, folder, read, clean, run)


def run_dedup(inputs: Inputs, output: Path | str, read: Read, dedup: Dedup, execution: Execution) -> None:
    """Only the stage ``dedup``, of documents or of the output of another stage."""
    with _command(inputs, output, execution) as (folder, run):
        deduplicate(_documents(inputs, folder, read, run), folder, dedup, run)


def run_mix(inputs: Inputs, output: Path | str, read: Read, settings: Mix, execution: Execution) -> None:
    """Only the stage ``mix``, of documents or of the output of another stage."""
    with _command(inputs, output, execution) as (folder, run):
        mix(_documents(inputs, folder, read, run), folder, settings, run)


def run_tokenize(inputs: Inputs, output: Path | str, read: Read, execution: Execution) -> None:
    """Only the stage ``tokenize``, of documents or of the output of another stage."""
    with _command(inputs, output, execution) as (folder, run):
        tokenize(_documents(inputs, folder, read, run), folder, run)


@contextmanager
def _command(inputs: Inputs, output: Path | str, execution: Execution, last: str = "") -> Iterator[tuple[Path, Run]]:
    """The output, which no other command works in, and a report of its stage ``last`` at the end."""
    output = Path(output)
    for path in map(Path, inputs):
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            # Its files would be input of the next attempt.
            raise ValueError(f"{output} lies within the input {path}; give an output elsewhere.")
    with open_run(output, execution) as run:
        yield output, run
        write_report(output / last, output, run)


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
