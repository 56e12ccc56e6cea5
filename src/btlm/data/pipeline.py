"""The commands of `btlm data`: each runs one stage or all of them, and reports what was done."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from btlm.console import gigabytes
from btlm.plots import need_matplotlib

from .clean import clean_documents
from .dedup import deduplicate, earlier_stages
from .documents import HUB, list_units
from .mix import check_evaluation_sets, check_weights, mix
from .recipe import Clean, DataRecipe, Dedup, Execution, Mix, Read
from .report import write_report
from .stage import COMPLETE, Run, load_stage, open_run
from .tokenize import tokenize

Inputs = Sequence[Path | str]
# How a stage that is given documents reads them.
_AS_READ = Clean(normalization="none", min_characters=0)


def run_prepare(inputs: Inputs, output: Path | str, recipe: DataRecipe, execution: Execution) -> None:
    """Run the stages ``clean``, ``dedup``, ``mix`` and ``shards`` on raw documents, each into a folder of ``output``.

    The same call continues an interrupted run; complete stages are not repeated.

    Raises:
        ValueError: An input or a setting cannot be used, or the output holds other work.
    """
    _check_beforehand(recipe.read, recipe.mix)
    earlier_stages(recipe.dedup, recipe.clean.normalization)
    with _command(inputs, output, execution, last="shards") as (folder, run):
        _warn_of_full_disk(inputs, folder, recipe.read, run)
        cleaned = clean_documents(inputs, folder / "clean", recipe.read, recipe.clean, run)
        check_weights(recipe.mix, cleaned["sources"])
        deduplicate(folder / "clean", folder / "dedup", recipe.dedup, run)
        mix(folder / "dedup", folder / "mix", recipe.mix, run)
        tokenize(folder / "mix", folder / "shards", run)


def run_clean(inputs: Inputs, output: Path | str, read: Read, clean: Clean, execution: Execution) -> None:
    """Run only the stage ``clean``; see :func:`btlm.data.clean.clean_documents`."""
    with _command(inputs, output, execution) as (folder, run):
        clean_documents(inputs, folder, read, clean, run)


def run_dedup(inputs: Inputs, output: Path | str, read: Read, dedup: Dedup, execution: Execution) -> None:
    """Run only the stage ``dedup``, on documents or on the output of another stage."""
    if not any((Path(given) / COMPLETE).exists() for given in inputs):
        earlier_stages(dedup, _AS_READ.normalization)
    with _command(inputs, output, execution) as (folder, run):
        deduplicate(_documents(inputs, folder, read, run), folder, dedup, run)


def run_mix(inputs: Inputs, output: Path | str, read: Read, settings: Mix, execution: Execution) -> None:
    """Run only the stage ``mix``, on documents or on the output of another stage."""
    _check_beforehand(read, settings)
    with _command(inputs, output, execution) as (folder, run):
        mix(_documents(inputs, folder, read, run), folder, settings, run)


def run_tokenize(inputs: Inputs, output: Path | str, read: Read, execution: Execution) -> None:
    """Run only the stage ``tokenize``, on documents or on the output of another stage."""
    with _command(inputs, output, execution) as (folder, run):
        tokenize(_documents(inputs, folder, read, run), folder, run)


def _check_beforehand(read: Read, settings: Mix) -> None:
    """Find what would end the stage ``mix`` before the stages ahead of it have worked for hours."""
    check_evaluation_sets(settings)
    if read.source is not None:
        check_weights(settings, [read.source])


@contextmanager
def _command(inputs: Inputs, output: Path | str, execution: Execution, last: str = "") -> Iterator[tuple[Path, Run]]:
    """Lock the output folder for one command, and write the report of its stage ``last`` at the end."""
    need_matplotlib()
    for library in ("duckdb", "orjson", "pyarrow", "tiktoken"):
        if find_spec(library) is None:  # before hours of work, not after them
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    output = Path(output)
    for path in map(Path, inputs):
        if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
            # The next attempt would read the output as input.
            raise ValueError(f"{output} lies within the input {path}; give an output elsewhere.")
    with open_run(output, execution) as run:
        yield output, run
        write_report(output / last, output, run)


def _warn_of_full_disk(inputs: Inputs, folder: Path, read: Read, run: Run) -> None:
    if (folder / "clean").exists():
        return  # a part of it is on the disk already
    units, _, _ = list_units((given for given in inputs if not str(given).startswith(HUB)), read)
    sizes = [(file, Path(file).stat().st_size) for unit in units for file in unit.paths]
    # By the sizes in docs/data.md, with another copy of the documents during the shuffle.
    needed = sum(size * (7 if Path(file).suffix in (".gz", ".zst", ".parquet") else 2) for file, size in sizes)
    if needed > (free := shutil.disk_usage(folder).free):
        run.say(f"warning: all stages take about {gigabytes(needed)}, and the disk has {gigabytes(free)} free")


def _documents(inputs: Inputs, output: Path, read: Read, run: Run) -> Path:
    """Folder of the stage to work on: the one given as input, or a new stage ``read`` with the documents."""
    given = [Path(path) for path in inputs]
    stages = [path for path in given if (path / COMPLETE).exists()]
    if stages and len(given) > 1:
        raise ValueError(f"{stages[0]} is the output of a stage, which must be the only input; leave out the others.")
    if stages:
        if "parts" not in load_stage(stages[0]):
            raise ValueError(
                f"{stages[0]} holds token shards; give documents, or the output of a stage before `tokenize`."
            )
        if read != Read():
            raise ValueError(
                f"{stages[0]} is the output of a stage, to which the settings of `read` do not apply; leave them out."
            )
        return stages[0]
    folder = output / "read"
    clean_documents(inputs, folder, read, _AS_READ, run, name="read")
    return folder
