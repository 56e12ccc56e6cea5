"""The stage `mix`: decontaminates, holds out documents, weights the sources, and shuffles all documents.

Every random choice is a function of the seed and a document's SHA-256, so that it depends neither on the order of the
input nor on the tasks. For the shuffle, each document has such a number as its key: some tasks distribute their
documents over ranges of keys, called *partitions*, and other tasks sort one partition each, which becomes one shard.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btlm.files import file_sha256, whole_file
from btlm.settings import did_you_mean, plain

from .database import open_database, parquet, write_query
from .minhash import normalize, shingle_hashes
from .parts import (
    PARQUET,
    first_in,
    part_name,
    read_groups,
    read_rows,
    read_table,
    rows_of,
    sum_counts,
    write_part,
    write_table,
)
from .recipe import Mix
from .shards import SPLITS
from .stage import DOCUMENTS, Documents, Run, begin, finish, load_stage, stage_digest
from .tasks import Advance, run_tasks

CONTAMINATED, NGRAMS, HELD_OUT = "contaminated", "ngrams.npy", "held_out.parquet"
SCATTERED, SCRATCH = "scattered", "scratch"

# Keys are numbers below this.
_KEYS = 1 << 63


def mix(source: Path, folder: Path, settings: Mix, run: Run) -> dict[str, Any]:
    """Split documents into train, validation and test, weight and shuffle them.

    Args:
        source: Folder of the previous stage.
        folder: Folder that receives the shuffled documents, as parts of each split.
        settings: Weights, seed, holdout and decontamination.
        run: How to execute the tasks.

    Returns:
        The stage's result: ``parts`` with the ``splits`` they belong to, and ``sources`` with the counts per source.

    Raises:
        ValueError: A weight names an unknown source, no document is left for training, or an evaluation set cannot be
            read.
    """
    before = Documents(source)
    check_weights(settings, {name for entry in before.stage["history"].values() for name in entry["sources"]})
    check_evaluation_sets(settings)
    files = [[Path(file).name, file_sha256(Path(file))] for file in settings.decontaminate]
    plain_settings = {key: value for key, value in plain(settings).items() if key != "decontaminate"}
    if begin(folder, "mix", {"mix": plain_settings, "decontaminate": files, "input": stage_digest(source)}, run):
        return load_stage(folder)
    if settings.decontaminate:
        ngrams = _evaluation_ngrams(settings)
        with whole_file(folder / NGRAMS) as partial_file, partial_file.open("wb") as file:
            np.save(file, ngrams)
        run.say(f"  {len(ngrams):,} n-grams of {settings.decontaminate_words} words in the evaluation sets")
        run_tasks(folder, "decontaminate", partial(_decontaminate, before, folder, settings), before.sizes, run)
    plan = partial(_plan, before, folder, settings, run.execution.memory_gb / 2)
    (counts,) = run_tasks(folder, "plan", plan, [0], run)
    if settings.holdout and not counts["split_bytes"]["validation"]:
        run.say("  No document is held out for validation, since there is only one.")
    partitions = {split: max(1, math.ceil(counts["split_bytes"][split] / settings.partition_bytes)) for split in SPLITS}
    scatter = partial(_scatter, before, folder, settings, partitions)
    scattered = run_tasks(folder, "scatter", scatter, before.sizes, run)
    slots = [f"{split}/{index}" for split in SPLITS for index in range(partitions[split])]
    slot_sizes = [sum(result["slots"].get(slot, 0) for result in scattered) for slot in slots]
    results = run_tasks(folder, "order", partial(_order, before, folder, slots), slot_sizes, run)
    sources = sum_counts(result["sources"] for result in [counts, *scattered])
    if not any(entry.get("train_documents") for entry in sources.values()):
        raise ValueError(
            "No document is left for training; lower mix.holdout or mix.min_holdout, or raise mix.weights."
        )
    result = {
        "parts": [part for part in results if part],
        "splits": [slot.split("/")[0] for slot, part in zip(slots, results, strict=True) if part],
        "sources": sources,
    }
    return finish(folder, result, source, scratch=(SCATTERED, SCRATCH))


def check_weights(settings: Mix, sources: Iterable[str]) -> None:
    """Check that there are documents of every source that has a weight.

    Raises:
        ValueError: A weight names another source.
    """
    if unknown := sorted(set(settings.weights) - set(sources)):
        near = [did_you_mean(name, sources).removeprefix(": ") for name in unknown]
        names = [f"{name} ({hint})" if hint else name for name, hint in zip(unknown, near, strict=True)]
        raise ValueError(
            f"mix.weights names {', '.join(names)}, which the documents do not have; their sources are "
            f"{', '.join(sorted(sources))}."
        )


def check_evaluation_sets(settings: Mix) -> None:
    """Check that the evaluation sets can be read.

    Raises:
        ValueError: One cannot.
    """
    for _ in _evaluation_texts(settings):
        pass


# Decontamination


def _evaluation_ngrams(settings: Mix) -> NDArray[np.uint64]:
    """Sorted hashes of the word n-grams of all texts in the evaluation sets, in any field."""
    hashes = [np.empty(0, dtype=np.uint64)]
    for text in _evaluation_texts(settings):
        hashes += shingle_hashes(normalize(text), "words", settings.decontaminate_words)
    return np.unique(np.concatenate(hashes))


def _evaluation_texts(settings: Mix) -> Iterator[str]:
    import orjson

    for file in settings.decontaminate:
        try:
            lines = Path(file).read_bytes().splitlines()
        except OSError as error:
            raise ValueError(f"mix.decontaminate: {file}: {error.strerror}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield from texts_in(orjson.loads(line))
                except orjson.JSONDecodeError as error:
                    raise ValueError(f"mix.decontaminate: {file}, line {number}: not JSON ({error}).") from error


def texts_in(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def _decontaminate(before: Documents, folder: Path, settings: Mix, task: int, advance: Advance) -> None:
    """Write the numbers of the documents of a part that share an n-gram with the evaluation sets."""
    import pyarrow as pa

    ngrams = np.load(folder / NGRAMS)
    found: list[int] = []
    for group in read_groups(before.path(task), ["text", "document"]):
        for text, document in rows_of(group, "text", "document"):
            hashes = shingle_hashes(normalize(text), "words", settings.decontaminate_words)
            if any(_any_in(part, ngrams) for part in hashes):
                found.append(document)
            advance(len(text))
    write_table(folder / CONTAMINATED / before.names[task], pa.table({"document": pa.array(found, pa.int64())}))


def _any_in(values: NDArray[np.uint64], sorted_values: NDArray[np.uint64]) -> bool:
    places = np.searchsorted(sorted_values, values)
    return len(sorted_values) > 0 and bool((sorted_values.take(places, mode="clip") == values).any())


# Plan: which documents are held out or dropped


def _plan(
    before: Documents, folder: Path, settings: Mix, memory_gb: float, task: int, advance: Advance
) -> dict[str, Any]:
    """Write which documents are held out or dropped, and count the rest.

    From each source, the documents with the smallest SHA-256 of seed and text are held out, alternately for validation
    and test; one document at least, if any are to be held out. Training documents with the same text as one of them are
    dropped.
    """
    with open_database(folder / SCRATCH, memory_gb) as database:
        documents = parquet(before.paths(), "document, source, id, bytes, sha256")
        contaminated = "(SELECT NULL::BIGINT AS document WHERE false)"
        if settings.decontaminate:
            contaminated = parquet([folder / CONTAMINATED / name for name in before.names])
        database.execute(f"CREATE TABLE contaminated AS SELECT * FROM {contaminated}")
        database.execute(
            f"""
            CREATE VIEW candidates AS
            SELECT *, sha256('holdout:{settings.seed}:' || sha256) AS place
            FROM {documents} WHERE document NOT IN (SELECT document FROM contaminated)
            """
        )
        database.execute(
            """
            CREATE TABLE held_out AS
            SELECT document, sha256, CASE rank % 2 WHEN 1 THEN 'validation' ELSE 'test' END AS split FROM (
                SELECT *, count(*) OVER (PARTITION BY source) AS number, row_number() OVER (
                    PARTITION BY source ORDER BY place, id, document
                ) AS rank
                FROM candidates
            )
            WHERE $holdout > 0 AND rank <= least(greatest(round(number * $holdout), $least), number - 1)
            """,
            {"holdout": settings.holdout, "least": settings.min_holdout},
        )
        if settings.holdout and not database.execute("SELECT count(*) FROM held_out").fetchone()[0]:
            # All sources are so small that their shares round to zero: one document of all is held out.
            database.execute("""
                INSERT INTO held_out SELECT document, sha256, 'validation' FROM candidates
                WHERE (SELECT count(*) FROM candidates) > 1 ORDER BY place, id, document LIMIT 1
            """)
        query = f"""
            SELECT document, split FROM held_out
            UNION ALL SELECT document, 'contaminated' FROM contaminated
            UNION ALL SELECT document, 'copy of held out' FROM {documents}
            WHERE sha256 IN (SELECT sha256 FROM held_out) AND document NOT IN (SELECT document FROM held_out)
              AND document NOT IN (SELECT document FROM contaminated)
            ORDER BY document
        """
        write_query(database, query, folder / HELD_OUT)
        plan = parquet([folder / HELD_OUT])
        rows = database.execute(
            f"""
            SELECT source, coalesce(split, 'train'), count(*), sum(bytes)::BIGINT
            FROM {documents} LEFT JOIN {plan} USING (document) GROUP BY ALL ORDER BY ALL
            """
        ).fetchall()
    sources: dict[str, dict[str, int]] = {}
    split_bytes = dict.fromkeys(SPLITS, 0.0)
    for name, result, documents_, size in rows:
        if result in SPLITS:
            split_bytes[result] += size * (settings.weights.get(name, 1.0) if result == "train" else 1.0)
        else:
            key = result.replace(" ", "_")
            sources.setdefault(name, {}).update({f"{key}_documents": documents_, f"{key}_bytes": size})
    return {"sources": sources, "split_bytes": split_bytes}


# Shuffle


def _scatter(
    before: Documents, folder: Path, settings: Mix, partitions: dict[str, int], task: int, advance: Advance
) -> dict[str, Any]:
    """Write the documents of a part, repeated by weight, with one row group per split and partition."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, table = before.names[task], read_table(before.path(task))
    fate = dict(rows_of(read_rows(folder / HELD_OUT, first_in(name), len(table)), "document", "split"))
    slots: dict[str, list[tuple[int, int]]] = {}
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row, (document, source, sha256, size) in enumerate(rows_of(table, "document", "source", "sha256", "bytes")):
        split = fate.get(document, "train")
        if split not in SPLITS:
            continue
        for copy in range(_copies(settings, source, sha256) if split == "train" else 1):
            key = _key(settings.seed, f"order:{copy}", sha256)
            slots.setdefault(f"{split}/{key * partitions[split] // _KEYS}", []).append((row, key))
            sources[source].update({f"{split}_documents": 1, f"{split}_bytes": size})
    schema = table.schema.append(pa.field("key", pa.int64()))
    sizes = table["bytes"].to_numpy()
    slot_bytes = {}
    (folder / SCATTERED).mkdir(exist_ok=True)
    with whole_file(folder / SCATTERED / name) as file, pq.ParquetWriter(file, schema, **PARQUET) as writer:
        for slot, rows_and_keys in slots.items():
            rows, keys = (np.array(column, dtype=np.int64) for column in zip(*rows_and_keys, strict=True))
            writer.write_table(table.take(rows).append_column("key", pa.array(keys)), row_group_size=len(rows))
            slot_bytes[slot] = int(sizes[rows].sum())
        writer.add_key_value_metadata({"slots": json.dumps(list(slots))})
    advance(int(sizes.sum()))
    return {"slots": slot_bytes, "sources": sources}


def _copies(settings: Mix, source: str, sha256: str) -> int:
    """How often a training document is repeated: its weight, rounded up or down at random to keep the mean."""
    whole, rest = divmod(settings.weights.get(source, 1.0), 1.0)
    return int(whole) + (_key(settings.seed, "copies", sha256) < rest * _KEYS)


def _key(seed: int, purpose: str, sha256: str) -> int:
    digest = hashlib.sha256(f"{purpose}:{seed}:{sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _order(before: Documents, folder: Path, slots: list[str], task: int, advance: Advance) -> list[Any] | None:
    """Write one slot, which is a partition of a split: the documents from all tasks, sorted by their keys."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    tables = []
    for name in before.names:
        with pq.ParquetFile(folder / SCATTERED / name) as file:
            groups = json.loads(file.metadata.metadata[b"slots"])
            if slots[task] in groups:
                tables.append(file.read_row_group(groups.index(slots[task]), use_threads=False))
    if not tables:
        return None
    table = pa.concat_tables(tables)
    by = [("key", "ascending"), ("source", "ascending"), ("id", "ascending")]
    order = pc.sort_indices(table.drop_columns("text"), sort_keys=by).to_numpy().astype(np.int64)
    advance(pc.sum(table["bytes"]).as_py())
    return write_part(folder / DOCUMENTS, part_name(task, 0), table.drop_columns("key"), order)
