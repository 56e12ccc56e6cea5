"""How documents become token shards, as data: the settings of every stage, with SlimPajama's as defaults.

Sources of the defaults: Cerebras modelzoo, ``data_preparation/nlp/slimpajama``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from btlm.errors import OptionError
from btlm.settings import Count, Number, Range, Whole, apply_changes, check, hints, read_fields, read_yaml


@dataclass(frozen=True)
class Read:
    """What a document is in the input.

    Args:
        text_field: Field that holds the text; dots lead into nested objects.
        id_field: Field that holds the id; a document without it is called ``file:line``.
        source_fields: Fields that may hold the name of the source; the first one that does is used. Without any, the
            source is the name of the file up to its first dot, or of its folder for text files.
        source: One name for the source of all documents, in place of these.
        split: Split of a Hugging Face data set.
        config: Configuration of a Hugging Face data set that has several.
        revision: Branch, tag or commit of a Hugging Face data set.
        max_document_bytes: Longest document in bytes; longer ones are bad input.
        max_bad_documents: Bad documents that a stage passes over; one more is an error.
        part_bytes: Bytes of text per task, and per file of the documents that stages hand on.
    """

    text_field: str = "text"
    id_field: str = "id"
    source_fields: list[str] = field(default_factory=lambda: ["source", "meta.redpajama_set_name"])
    source: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    max_document_bytes: Count = 32_000_000
    max_bad_documents: Whole = 100
    part_bytes: Count = 32_000_000

    def __post_init__(self) -> None:
        check(self, "read")


@dataclass(frozen=True)
class Clean:
    """Normalization, and the filter of short documents.

    Args:
        normalization: Normal form of Unicode for the text; ``none`` leaves it as it is.
        min_characters: Fewest characters of a document, counted in lower case, without punctuation, and with white
            space collapsed; 0 keeps everything.
    """

    normalization: Literal["NFC", "NFD", "NFKC", "NFKD", "none"] = "NFC"
    min_characters: Whole = 200

    def __post_init__(self) -> None:
        check(self, "clean")


@dataclass(frozen=True)
class Dedup:
    """Near-duplicates: MinHash, banded.

    Args:
        shingle: Unit that texts are compared by: windows of characters, or n-grams of words, of the normalized text.
        shingle_size: Characters or words per shingle.
        permutations: Number of permutations of MinHash.
        bands: Number of bands; documents that agree in one of them are duplicates.
        rows: Permutations per band.
        threshold: Similarity (Jaccard's) to choose bands and rows for, in place of these two.
        seed: Seed of the permutations.
        against: Outputs of earlier runs of `btlm data prepare` or `dedup`; near-duplicates of their documents are left
            out, too. Their text is not read again.
    """

    shingle: Literal["characters", "words"] = "characters"
    shingle_size: Count = 13
    permutations: Count = 128
    bands: Count = 9
    rows: Count = 13
    threshold: Annotated[float, Range(above=0, below=1)] | None = None
    seed: Whole = 1
    against: list[Annotated[str, "FOLDER"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the values, and derive bands and rows where a threshold is given."""
        check(self, "dedup")
        if self.threshold is not None:
            from .bands import bands_for_threshold

            bands, rows = bands_for_threshold(self.threshold, self.permutations)
            if (self.bands, self.rows) not in ((Dedup.bands, Dedup.rows), (bands, rows)):
                raise ValueError(
                    f"dedup.threshold is {self.threshold}, which means {bands} bands of {rows} rows, and dedup.bands "
                    f"and dedup.rows are {self.bands} and {self.rows}; give one or the other."
                )
            object.__setattr__(self, "bands", bands)
            object.__setattr__(self, "rows", rows)
        if self.bands * self.rows > self.permutations:
            raise ValueError(
                f"dedup.bands x dedup.rows is {self.bands * self.rows}, more than dedup.permutations "
                f"({self.permutations}); lower one or raise the other."
            )


@dataclass(frozen=True)
class Mix:
    """Shares of the sources, order, held-out documents and decontamination.

    Args:
        weights: How often each training document of a source is read: 0.5 takes half of them, 2 each one twice. Sources
            that are not named have 1.
        holdout: Share of each source's documents for validation and test together.
        min_holdout: Fewest documents held out per source, if it has more than that; 1 lets a small corpus be measured
            source by source.
        seed: Seed of the order of documents, and of the choice of held-out ones.
        decontaminate: Files of evaluation sets (JSON lines); documents that share an n-gram with them are dropped.
        decontaminate_words: Words of that n-gram.
        partition_bytes: Bytes of text per shard, roughly; a worker holds them in memory to put them in order.
    """

    weights: dict[str, Number] = field(default_factory=dict)
    holdout: Annotated[float, Range(0, below=1)] = 0.0017
    min_holdout: Whole = 0
    seed: Whole = 1
    decontaminate: list[Annotated[str, "FILE"]] = field(default_factory=list)
    decontaminate_words: Count = 13
    partition_bytes: Count = 64_000_000

    def __post_init__(self) -> None:
        check(self, "mix")


@dataclass(frozen=True)
class Execution:
    """Where and how the tasks of a stage run. The output does not depend on it.

    Args:
        executor: Where tasks run: processes of this machine, or a Slurm or Ray cluster that shares the output folder.
        workers: Tasks at a time (default: one per core of this machine).
        memory_gb: Memory per worker in GB: what a cluster reserves for it; DuckDB's queries take half.
        slurm_partition: Partition of the jobs; Slurm needs one.
        slurm_time: Time limit of a job.
        slurm_setup: Shell command that a job starts with, such as one that activates the Python environment.
        force: Start over where the output holds the work of another recipe or input.
    """

    executor: Literal["local", "slurm", "ray"] = "local"
    workers: Count | None = None
    memory_gb: Annotated[float, Range(0.5)] = 2.0
    slurm_partition: str | None = None
    slurm_time: str = "24:00:00"
    slurm_setup: str = ""
    force: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.executor == "slurm" and not self.slurm_partition:
            raise OptionError("{executor} is slurm; name the partition of its jobs in {slurm_partition}.")


@dataclass(frozen=True)
class Inspection:
    """What `btlm data inspect` shows.

    Args:
        stage: Stage to show: clean, dedup, mix or tokenize (default: all there are).
        examples: Examples of each kind.
        seed: Seed of the choice.
    """

    stage: str | None = None
    examples: Count = 3
    seed: Whole = 1

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class DataRecipe:
    """All stages from documents to token shards."""

    read: Read = field(default_factory=Read)
    clean: Clean = field(default_factory=Clean)
    dedup: Dedup = field(default_factory=Dedup)
    mix: Mix = field(default_factory=Mix)


def load_data_recipe(
    path: Path | str | None, changes: dict[str, Any] | None = None, sections: Sequence[str] = ()
) -> tuple[DataRecipe, Execution]:
    """Read and check a recipe of data, which may also say how its tasks run.

    Args:
        path: YAML file with the sections of :class:`DataRecipe` and the keys of :class:`Execution`, or the name of one
            that comes with btlm; the defaults without it.
        changes: Values to set on top of the file, by dotted key (``{"mix.holdout": 0.01, "workers": 3}``).
        sections: Sections that will be used; others in the file are an error. All of them if empty.

    Raises:
        ValueError: Names every problem at once.
    """
    raw, problems = {} if path is None else read_yaml(path, "data"), list[str]()
    apply_changes(raw, changes or {}, problems)
    run = {key: raw.pop(key) for key in hints(Execution) if key in raw} if isinstance(raw, dict) else {}
    execution, values = read_fields(Execution, run, problems), read_fields(DataRecipe, raw, problems)
    problems += [
        f"{name} is not used here (only {', '.join(sections)}): leave it out"
        for name in values
        if sections and name not in sections
    ]
    if problems:
        raise ValueError(f"{'' if path is None else f'{path}: '}{'; '.join(problems)}.")
    return DataRecipe(**values), Execution(**execution)
