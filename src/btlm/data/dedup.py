"""The stage `dedup`: finds near-duplicates by MinHash, and keeps one document of each connected component.

Signatures are computed in one task per part of the documents, candidate pairs in one task per band. The components,
like everything that concerns all documents at once, are found by queries that sort and join on disk.

The longest document of a component is kept (in bytes of UTF-8). Ties go to the first by source, then SHA-256 of the
text, then id, so that the choice does not depend on files, their order or tasks.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from btlm.settings import plain

from .database import open_database, parquet, write_query
from .minhash import band_keys, signatures
from .parts import add_counts, first_document, part_number, read_groups, read_table, write_part, write_table
from .recipe import Dedup
from .stage import DOCUMENTS, Run, begin, finish, load_stage, stage_digest
from .tasks import run_tasks

BANDS, PAIRS, SCRATCH, CLUSTERS = "bands", "pairs", "scratch", "clusters.parquet"


def deduplicate(source: Path, folder: Path, dedup: Dedup, run: Run) -> dict[str, Any]:
    """Keep one document of each component of near-duplicates.

    Args:
        source: Folder of the previous stage.
        folder: Folder that receives the kept documents and ``clusters.parquet``, which has one row per document of a
            component, with its number in ``source`` (``document``) and the number of the kept one (``kept``).
        dedup: Settings of the stage.
        run: How to execute the tasks.

    Returns:
        The stage's result: ``parts``, and ``sources`` with the counts per source.
    """
    before = load_stage(source)
    if begin(folder, "dedup", {"dedup": plain(dedup), "input": stage_digest(source)}, run):
        return load_stage(folder)
    parts = [name for name, _, _ in before["parts"]]
    sizes = [size for _, _, size in before["parts"]]
    total = sum(sizes)
    memory_gb = run.execution.memory_gb / 2
    run_tasks(folder, "signatures", partial(_signatures, source, folder, parts, dedup), sizes, run)
    band_size = sum(documents for _, documents, _ in before["parts"]) * 16
    run_tasks(folder, "pairs", partial(_pairs, folder, parts, memory_gb), [band_size] * dedup.bands, run)
    pairs_size = sum(path.stat().st_size for path in (folder / PAIRS).glob("*.parquet"))
    components = partial(_components, source, folder, parts, dedup.bands, memory_gb)
    run_tasks(folder, "components", components, [pairs_size], run)
    results = run_tasks(folder, "keep", partial(_keep, source, folder, parts), sizes, run)

    sources: dict[str, dict[str, int]] = {}
    for result in results:
        add_counts(sources, result["sources"].items())
    kept = [result["part"] for result in results if result["part"]]
    removed = sum(counts.get("duplicate_bytes", 0) for counts in sources.values())
    run.say(f"  {removed / 1e6:,.1f} of {total / 1e6:,.1f} MB removed as duplicates")
    stage = finish(folder, {"parts": kept, "sources": dict(sorted(sources.items()))}, source)
    for scratch in (BANDS, PAIRS, SCRATCH):
        shutil.rmtree(folder / scratch, ignore_errors=True)
    return stage


# Tasks


def _signatures(
    source: Path, folder: Path, parts: list[str], dedup: Dedup, task: int, advance: Callable[[int], None]
) -> None:
    """Write the band keys of a part: the column ``document``, and one column per band."""
    import pyarrow as pa

    name = parts[task]
    keys, has_shingles = [], []
    for group in read_groups(source / DOCUMENTS / name, ["text"]):
        texts = group["text"].to_pylist()
        signature, num_shingles = signatures(texts, dedup)
        keys.append(band_keys(signature, dedup.bands, dedup.rows))
        has_shingles.append(num_shingles > 0)
        advance(sum(map(len, texts)))
    # A text without shingles, of only punctuation and spaces, is a duplicate of nothing.
    rows = np.flatnonzero(np.concatenate(has_shingles))
    table = {"document": pa.array(rows + first_document(*part_number(name)), pa.int64())}
    table |= {f"band{i}": pa.array(column) for i, column in enumerate(np.concatenate(keys)[rows].T)}
    write_table(folder / BANDS / name, pa.table(table))


def _pairs(folder: Path, parts: list[str], memory_gb: float, task: int, advance: Callable[[int], None]) -> None:
    """Write the pairs of one band: each document with the first one that has the same key."""
    with open_database(folder / SCRATCH, memory_gb) as database:
        keys = parquet([folder / BANDS / name for name in parts], f"document, band{task} AS key")
        query = f"""
            SELECT document, first FROM (
                SELECT document, min(document) OVER (PARTITION BY key) AS first FROM {keys}
            ) WHERE document <> first ORDER BY document
        """
        write_query(database, query, folder / PAIRS / _pairs_name(task))


def _pairs_name(band: int) -> str:
    return f"{band:03d}.parquet"


def _components(
    source: Path,
    folder: Path,
    parts: list[str],
    bands: int,
    memory_gb: float,
    task: int,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Write the connected components of the pairs, found by alternating large-star and small-star operations.

    Both operations keep components connected and link documents to ever earlier ones, until all documents of a
    component are linked to its first (Kiveris et al. 2014, Connected Components in MapReduce and Beyond).
    """
    with open_database(folder / SCRATCH, memory_gb) as database:
        pairs = parquet([folder / PAIRS / _pairs_name(band) for band in range(bands)], "document AS a, first AS b")
        database.execute(f"CREATE TABLE edges AS SELECT DISTINCT a, b FROM {pairs}")
        rounds = 0
        while not _is_stars(database):
            rounds += 1
            database.execute("""
                CREATE OR REPLACE TABLE large AS
                WITH neighbours AS (SELECT a AS u, b AS v FROM edges UNION ALL SELECT b, a FROM edges),
                     first AS (SELECT u, least(u, min(v)) AS m FROM neighbours GROUP BY u)
                SELECT DISTINCT v AS a, m AS b FROM neighbours JOIN first USING (u) WHERE v > u
            """)
            database.execute("""
                CREATE OR REPLACE TABLE edges AS
                WITH first AS (SELECT a AS u, min(b) AS m FROM large GROUP BY u)
                SELECT b AS a, m AS b FROM large JOIN first ON a = u WHERE b <> m UNION SELECT u, m FROM first
            """)
        files = [source / DOCUMENTS / name for name in parts]
        documents = parquet(files, "document, bytes, source, sha256, id")
        # Choose the kept document of each component by the rule above. Up to here, its first document stands for a
        # component.
        query = f"""
            WITH members AS (SELECT a AS document, b AS component FROM edges UNION SELECT b, b FROM edges)
            SELECT document, first_value(document) OVER (
                PARTITION BY component ORDER BY bytes DESC, source, sha256, id, document
            ) AS kept, id, source, bytes
            FROM members JOIN {documents} USING (document) ORDER BY document
        """
        write_query(database, query, folder / CLUSTERS)
    return {"rounds": rounds}


def _is_stars(database: Any) -> bool:
    edges, leaves, inner = database.execute(
        "SELECT count(*), count(DISTINCT a), count(*) FILTER (b IN (SELECT a FROM edges)) FROM edges"
    ).fetchone()
    return edges == leaves and not inner


def _keep(source: Path, folder: Path, parts: list[str], task: int, advance: Callable[[int], None]) -> dict[str, Any]:
    """Write the documents of a part that are kept."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = parts[task]
    table = read_table(source / DOCUMENTS / name)
    first = first_document(*part_number(name))
    members = pq.read_table(
        folder / CLUSTERS,
        columns=["document", "kept"],
        filters=[("document", ">=", first), ("document", "<", first + len(table))],
        partitioning=None,
        use_threads=False,
    )
    removed = members.filter(pc.not_equal(members["document"], members["kept"]))["document"]
    is_removed = pc.is_in(table["document"], value_set=removed.combine_chunks())
    is_kept = pc.invert(is_removed)
    sources: dict[str, dict[str, int]] = {}
    for result, rows in (("duplicate", is_removed), ("kept", is_kept)):
        counted = table.select(["source", "bytes"]).filter(rows).group_by("source")
        for row in counted.aggregate([("bytes", "sum"), ("bytes", "count")]).to_pylist():
            entry = {f"{result}_documents": row["bytes_count"], f"{result}_bytes": row["bytes_sum"]}
            add_counts(sources, [(row["source"], entry)])
    kept = table.filter(is_kept)
    advance(pc.sum(table["bytes"]).as_py())
    part = write_part(folder / DOCUMENTS, name, kept) if len(kept) else None
    return {"part": part, "sources": sources}
