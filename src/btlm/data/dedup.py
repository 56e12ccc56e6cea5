"""The stage `dedup`: finds near-duplicates by MinHash, and keeps one document of each connected component.

Signatures are computed in one task per part of the documents, candidate pairs in one task per band. The components,
like everything that concerns all documents at once, are found by queries that sort and join on disk.

The longest document of a component is kept (in bytes of UTF-8). Ties go to the first by source, then SHA-256 of the
text, then id, so that the choice does not depend on files, their order or tasks.
"""

from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from btlm.settings import plain

from .database import open_database, parquet, write_query
from .minhash import band_keys, signatures
from .parts import first_in, read_groups, read_rows, read_table, rows_of, sum_counts, write_part, write_table
from .recipe import Dedup
from .stage import DOCUMENTS, Documents, Run, begin, finish, load_stage, stage_digest
from .tasks import Advance, run_tasks

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
    before = Documents(source)
    if begin(folder, "dedup", {"dedup": plain(dedup), "input": stage_digest(source)}, run):
        return load_stage(folder)
    memory_gb = run.execution.memory_gb / 2
    run_tasks(folder, "signatures", partial(_signatures, before, folder, dedup), before.sizes, run)
    band_size = before.num_documents * 16
    run_tasks(folder, "pairs", partial(_pairs, before, folder, memory_gb), [band_size] * dedup.bands, run)
    pairs_size = sum(path.stat().st_size for path in (folder / PAIRS).glob("*.parquet"))
    run_tasks(folder, "components", partial(_components, before, folder, dedup.bands, memory_gb), [pairs_size], run)
    results = run_tasks(folder, "keep", partial(_keep, before, folder), before.sizes, run)

    sources = sum_counts(result["sources"] for result in results)
    removed = sum(counts.get("duplicate_bytes", 0) for counts in sources.values())
    run.say(f"  {removed / 1e6:,.1f} of {sum(before.sizes) / 1e6:,.1f} MB removed as duplicates")
    kept = [result["part"] for result in results if result["part"]]
    return finish(folder, {"parts": kept, "sources": sources}, source, scratch=(BANDS, PAIRS, SCRATCH))


# Tasks


def _signatures(before: Documents, folder: Path, dedup: Dedup, task: int, advance: Advance) -> None:
    """Write the band keys of a part: the column ``document``, and one column per band."""
    import pyarrow as pa

    keys, has_shingles = [], []
    for group in read_groups(before.path(task), ["text"]):
        texts = group["text"].to_pylist()
        signature, num_shingles = signatures(texts, dedup)
        keys.append(band_keys(signature, dedup.bands, dedup.rows))
        has_shingles.append(num_shingles > 0)
        advance(sum(map(len, texts)))
    # A text without shingles, of only punctuation and spaces, is a duplicate of nothing.
    rows = np.flatnonzero(np.concatenate(has_shingles))
    table = {"document": pa.array(rows + first_in(before.names[task]), pa.int64())}
    table |= {f"band{i}": pa.array(column) for i, column in enumerate(np.concatenate(keys)[rows].T)}
    write_table(folder / BANDS / before.names[task], pa.table(table))


def _pairs(before: Documents, folder: Path, memory_gb: float, task: int, advance: Advance) -> None:
    """Write the pairs of one band: each document with the first one that has the same key."""
    with open_database(folder / SCRATCH, memory_gb) as database:
        keys = parquet([folder / BANDS / name for name in before.names], f"document, band{task} AS key")
        query = f"""
            SELECT document, first FROM (
                SELECT document, min(document) OVER (PARTITION BY key) AS first FROM {keys}
            ) WHERE document <> first ORDER BY document
        """
        write_query(database, query, folder / PAIRS / f"{task:03d}.parquet")


def _components(before: Documents, folder: Path, bands: int, memory_gb: float, task: int, advance: Advance) -> None:
    """Write the connected components of the pairs, found by alternating large-star and small-star operations.

    Both operations keep components connected and link documents to ever earlier ones, until all documents of a
    component are linked to its first (Kiveris et al. 2014, Connected Components in MapReduce and Beyond).
    """
    with open_database(folder / SCRATCH, memory_gb) as database:
        pairs = parquet([folder / PAIRS / f"{band:03d}.parquet" for band in range(bands)], "document AS a, first AS b")
        database.execute(f"CREATE TABLE edges AS SELECT DISTINCT a, b FROM {pairs}")
        while not _is_stars(database):
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
        documents = parquet(before.paths(), "document, bytes, source, sha256, id")
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


def _is_stars(database: Any) -> bool:
    edges, leaves, inner = database.execute(
        "SELECT count(*), count(DISTINCT a), count(*) FILTER (b IN (SELECT a FROM edges)) FROM edges"
    ).fetchone()
    return edges == leaves and not inner


def _keep(before: Documents, folder: Path, task: int, advance: Advance) -> dict[str, Any]:
    """Write the documents of a part that are kept."""
    name, table = before.names[task], read_table(before.path(task))
    members = read_rows(folder / CLUSTERS, first_in(name), len(table))
    removed = {document for document, kept in rows_of(members, "document", "kept") if document != kept}
    is_kept = np.array([document not in removed for document in table["document"].to_pylist()])
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for (source, size), keeps in zip(rows_of(table, "source", "bytes"), is_kept, strict=True):
        result = "kept" if keeps else "duplicate"
        sources[source].update({f"{result}_documents": 1, f"{result}_bytes": size})
    advance(before.sizes[task])
    part = write_part(folder / DOCUMENTS, name, table.filter(is_kept)) if is_kept.any() else None
    return {"part": part, "sources": sources}
