"""How documents become token shards, as data: the settings of every stage, with SlimPajama's as defaults.

Sources of the defaults: Cerebras modelzoo, ``data_preparation/nlp/slimpajama``.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from btlm.errors import OptionError


@dataclass(frozen=True)
class Read:
    """What a document is in the input.

    Args:
        text_field: Field that holds the text; dots lead into nested objects.
        id_field: Field that holds the id; without it the id is ``file:line``.
        source_fields: The first of these fields that holds a name is the source; else the name of the file up to its
            first dot, or of its folder for text files.
        source: One name for the source of all documents, in place of these.
        split: Of Hugging Face data sets.
        config: Configuration of a Hugging Face data set, where it has several.
        revision: Branch, tag or commit of a Hugging Face data set.
        max_document_bytes: Longer documents are bad input.
        max_bad_documents: More bad input than this ends the stage with an error.
        part_bytes: Text in one file of the documents that stages hand on, and in one task.
    """

    text_field: str = "text"
    id_field: str = "id"
    source_fields: list[str] = field(default_factory=lambda: ["source", "meta.redpajama_set_name"])
    source: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    max_document_bytes: int = 32_000_000
    max_bad_documents: int = 100
    part_bytes: int = 32_000_000

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(self, "read", max_document_bytes=1, max_bad_documents=0, part_bytes=1)


@dataclass(frozen=True)
class Clean:
    """Normalization and the filter of short documents.

    Args:
        normalization: Unicode normal form of the text; ``none`` leaves it.
        min_characters: Of the text in lower case, without punctuation, with white space collapsed; 0 keeps everything.
    """

    normalization: Literal["NFC", "NFD", "NFKC", "NFKD", "none"] = "NFC"
    min_characters: int = 200

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(self, "clean", min_characters=0)


@dataclass(frozen=True)
class Dedup:
    """Near-duplicates: MinHash, banded.

    Args:
        shingle: Windows of characters, or n-grams of words, of the normalized text.
        shingle_size: Characters or words of one.
        permutations: Of MinHash.
        bands: Documents that agree in one of them are duplicates.
        rows: Permutations of a band.
        threshold: Jaccard similarity to choose bands and rows for.
        seed: Of the permutations.
    """

    shingle: Literal["characters", "words"] = "characters"
    shingle_size: int = 13
    permutations: int = 128
    bands: int = 9
    rows: int = 13
    threshold: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        """Check the values, and derive bands and rows where a threshold is given."""
        _at_least(self, "dedup", shingle_size=1, permutations=1, bands=1, rows=1, seed=0)
        if self.threshold is not None:
            from .bands import bands_for_threshold

            if not 0 < self.threshold < 1:
                raise ValueError(f"dedup.threshold is {self.threshold}; give a Jaccard similarity between 0 and 1.")
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
        min_holdout: Documents held out of each source at least, if it has more than that; 1 lets a small corpus be
            measured source by source.
        seed: Of the order of documents, and of what is held out.
        decontaminate: Files of evaluation sets (JSON lines); documents that share an n-gram with them are dropped.
        decontaminate_words: Words of that n-gram.
        partition_bytes: Text of one shard, about; a worker holds it in memory to put it in order.
    """

    weights: dict[str, float] = field(default_factory=dict)
    holdout: float = 0.0017
    min_holdout: int = 0
    seed: int = 1
    decontaminate: list[str] = field(default_factory=list)
    decontaminate_words: int = 13
    partition_bytes: int = 64_000_000

    def __post_init__(self) -> None:
        """Check the values."""
        _at_least(self, "mix", min_holdout=0, seed=0, decontaminate_words=1, partition_bytes=1)
        if not 0 <= self.holdout < 1:
            raise ValueError(f"mix.holdout is {self.holdout}; give a share of the documents in [0, 1).")
        for source, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"mix.weights of {source} is {weight}; give a number of at least 0.")


@dataclass(frozen=True)
class Execution:
    """Where and how the tasks of a stage run. The output does not depend on it.

    Args:
        executor: Processes of this machine, or a Slurm or Ray cluster that shares the output folder.
        workers: Tasks at a time; every core of this machine by default.
        memory_gb: Of a worker: what a cluster reserves for it; DuckDB's queries take half.
        slurm_partition: Of the jobs.
        slurm_time: Time limit of a job.
        slurm_setup: Shell command that a job starts with, such as one that activates the Python environment.
        force: Start over where the output holds the work of another recipe or input.
    """

    executor: Literal["local", "slurm", "ray"] = "local"
    workers: int | None = None
    memory_gb: float = 2.0
    slurm_partition: str | None = None
    slurm_time: str = "24:00:00"
    slurm_setup: str = ""
    force: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.executor not in ("local", "slurm", "ray"):
            raise ValueError(f"executor is {self.executor!r}; give local, slurm or ray.")
        if self.workers is not None:
            _at_least(self, "", workers=1)
        if not 0.5 <= self.memory_gb < math.inf:
            raise ValueError(f"memory_gb is {self.memory_gb}; a worker needs at least 0.5.")
        if self.executor == "slurm" and not self.slurm_partition:
            raise OptionError("{executor} is slurm; name the partition of its jobs in {slurm_partition}.")


@dataclass(frozen=True)
class DataRecipe:
    """All stages from documents to token shards."""

    read: Read = field(default_factory=Read)
    clean: Clean = field(default_factory=Clean)
    dedup: Dedup = field(default_factory=Dedup)
    mix: Mix = field(default_factory=Mix)


def _at_least(settings: object, prefix: str, **least: int) -> None:
    name = f"{prefix}." if prefix else ""
    problems = [
        f"{name}{key} is {getattr(settings, key)}; give a whole number of at least {value}."
        for key, value in least.items()
        if getattr(settings, key) < value
    ]
    if problems:
        raise ValueError(" ".join(problems))


def as_settings(settings: object) -> dict[str, object]:
    """The fields of one of the classes above as plain values."""
    return dataclasses.asdict(settings)  # type: ignore[call-overload, no-any-return]  # one of the dataclasses above
