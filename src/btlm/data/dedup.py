"""The stage `dedup`: finds near-duplicates by MinHash, and keeps one document of each connected component.

Signatures are computed in one task per part of the documents, candidate pairs in one task per band. The components,
like everything that concerns all documents at once, are found by queries that sort and join on disk.

The longest document of a component is kept (in bytes of UTF-8). Ties go to the first by source, then SHA-256 of the
text, then id, so that the choice does not depend on files, their order or tasks. The signatures stay, so that later
documents can be compared with these; of a component that has documents of an earlier run, no new one is kept.
"""

import os
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from btlm.console import first_of
from btlm.settings import plain

from .database import open_database, parquet, write_query
from .minhash import band_keys, signatures
from .parts import first_in, read_groups, read_rows, read_table, rows_of, sum_counts, write_part, write_table
from .recipe import Dedup
from .stage import COMPLETE, DOCUMENTS, Documents, Run, begin, differences_of, finish, load_stage, stage_digest
from .tasks import Advance, run_tasks

BANDS, PAIRS, SCRATCH = "bands", "pairs", "scratch"
EARLIER, CLUSTERS = "earlier.parquet", "clusters.parquet"


def deduplicate(source: Path, folder: Path, dedup: Dedup, run: Run) -> dict[str, Any]:
    """Keep one document of each component of near-duplicates.

    Args:
        source: Folder of the previous stage.
        folder: Folder that receives the kept documents and ``clusters.parquet``, which has one row per document of a
            component, with its number in ``source`` (``document``) and the number of the kept one (``kept``). If that
            is of an earlier run, ``kept`` is negative, and ``earlier_run`` (index in ``dedup.against``),
            ``earlier_source`` and ``earlier_id`` tell a document that it matches.
        dedup: Settings of the stage.
        run: How to execute the tasks.

    Returns:
        The stage's result: ``parts``, and ``sources`` with the counts per source.

    Raises:
        ValueError: An earlier run cannot be used.
    """
    before = Documents(source)
    earlier = earlier_stages(dedup, _normalization(before.stage["history"]))
    digests = list(map(stage_digest, earlier))
    given = [stage_digest(source), *digests] if earlier else stage_digest(source)
    if begin(folder, "dedup", {"dedup": _settings(dedup), "input": given}, run):
        return load_stage(folder)
    memory_gb = run.execution.memory_gb / 2
    if earlier:
        files = [sorted((stage / BANDS).glob("*.parquet")) for stage in earlier]
        size = sum(path.stat().st_size for paths in files for path in paths)
        run_tasks(folder, "earlier", partial(_earlier, files, folder, memory_gb), [size], run)
    run_tasks(folder, "signatures", partial(_signatures, before, folder, dedup), before.sizes, run)
    band_size = before.num_documents * 16
    run_tasks(folder, "pairs", partial(_pairs, before, folder, memory_gb), [band_size] * dedup.bands, run)
    pairs_size = sum(path.stat().st_size for path in (folder / PAIRS).glob("*.parquet"))
    run_tasks(folder, "components", partial(_components, before, folder, dedup.bands, memory_gb), [pairs_size], run)
    results = run_tasks(folder, "keep", partial(_keep, before, folder), before.sizes, run)

    sources = sum_counts(result["sources"] for result in results)
    removed = sum(counts.get("duplicate_bytes", 0) for counts in sources.values())
    known = sum(result["known"] for result in results)
    run.say(
        f"  {removed / 1e6:,.1f} of {sum(before.sizes) / 1e6:,.1f} MB removed as duplicates"
        f"{f'; {known:,} documents match earlier ones' if earlier else ''}"
    )
    kept = [result["part"] for result in results if result["part"]]
    if not kept:
        raise ValueError("No document is left: all of them match earlier ones.")
    against = [[os.path.relpath(stage, folder), digest] for stage, digest in zip(earlier, digests, strict=True)]
    result = {"parts": kept, "sources": sources, "against": against}
    return finish(folder, result, source, scratch=(PAIRS, SCRATCH, EARLIER))


def earlier_stages(dedup: Dedup, normalization: str) -> list[Path]:
    """Folders of the stages whose signatures ``dedup.against`` asks for.

    Args:
        dedup: Settings of the stage.
        normalization: Normal form of Unicode of the new documents.

    Raises:
        ValueError: There is no such stage, it has other settings, or it was itself compared with one that is not named.
    """
    stages: dict[Path, dict[str, Any]] = {}
    for given in dedup.against:
        found = (path for path in (Path(given, "dedup"), Path(given)) if (path / COMPLETE).exists())
        folder = next((path for path in found if load_stage(path)["stage"] == "dedup"), None)
        if folder is None or not (folder / BANDS).exists():
            raise ValueError(
                f"dedup.against: {given} holds no signatures; give what this version of `btlm data prepare` or "
                "`btlm data dedup` wrote."
            )
        stages[folder] = stage = load_stage(folder)
        there = {**stage["key"]["dedup"], "normalization": _normalization(stage["history"])}
        if differences := first_of(differences_of(there, {**_settings(dedup), "normalization": normalization})):
            raise ValueError(
                f"dedup.against: {given} was deduplicated with other settings ({differences}); use the same."
            )
    digests = set(map(stage_digest, stages))
    for folder, stage in stages.items():
        if others := [path for path, digest in stage.get("against", []) if digest not in digests]:
            raise ValueError(
                f"dedup.against: {folder} was itself compared with {os.path.normpath(folder / others[0])}; name both."
            )
    return list(stages)


def _settings(dedup: Dedup) -> dict[str, Any]:
    return {key: value for key, value in plain(dedup).items() if key != "against"}


def _normalization(history: dict[str, Any]) -> str:
    """Normal form of Unicode that the first stage of a history gave the documents."""
    return str(next(iter(history.values()))["settings"]["clean"]["normalization"])


# Tasks


def _signatures(before: Documents, folder: Path, dedup: Dedup, task: int, advance: Advance) -> None:
    """Write the band keys of a part: the columns ``document``, ``id`` and ``source``, and one column per band."""
    import pyarrow as pa

    keys, has_shingles, names = [], [], []
    for group in read_groups(before.path(task), ["text", "id", "source"]):
        texts = group["text"].to_pylist()
        signature, num_shingles = signatures(texts, dedup)
        keys.append(band_keys(signature, dedup.bands, dedup.rows))
        has_shingles.append(num_shingles > 0)
        names.append(group.select(["id", "source"]))
        advance(sum(map(len, texts)))
    # A text without shingles, of only punctuation and spaces, is a duplicate of nothing.
    rows = np.flatnonzero(np.concatenate(has_shingles))
    table = pa.concat_tables(names).take(rows)
    table = table.append_column("document", pa.array(rows + first_in(before.names[task]), pa.int64()))
    for band, column in enumerate(np.concatenate(keys)[rows].T):
        table = table.append_column(f"band{band}", pa.array(column))
    write_table(folder / BANDS / before.names[task], table)


def _earlier(files: list[list[Path]], folder: Path, memory_gb: float, task: int, advance: Advance) -> None:
    """Write the signatures of earlier runs as one file, in which documents have negative numbers."""
    with open_database(folder / SCRATCH, memory_gb) as database:
        runs = (f"SELECT *, {run} AS run FROM {parquet(paths)}" for run, paths in enumerate(files))
        query = f"""
            SELECT * REPLACE (-row_number() OVER (ORDER BY run DESC, document DESC) AS document)
            FROM ({" UNION ALL ".join(runs)})
        """
        write_query(database, query, folder / EARLIER)


def _pairs(before: Documents, folder: Path, memory_gb: float, task: int, advance: Advance) -> None:
    """Write the pairs of one band: each document with the first one that has the same key."""
    with open_database(folder / SCRATCH, memory_gb) as database:
        earlier = [folder / EARLIER] if (folder / EARLIER).exists() else []
        files = [*earlier, *(folder / BANDS / name for name in before.names)]
        query = f"""
            SELECT document, first FROM (
                SELECT document, min(document) OVER (PARTITION BY band{task}) AS first
                FROM {parquet(files, f"document, band{task}")}
            ) WHERE document <> first AND document >= 0 ORDER BY document
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
        # Of the earlier documents that a document shares bands with, the one of most bands.
        database.execute(f"""
            CREATE TABLE matches AS SELECT DISTINCT ON (a) a AS document, b AS match
            FROM (SELECT a, b, count(*) AS shared FROM {pairs} WHERE b < 0 GROUP BY a, b) ORDER BY a, shared DESC, b
        """)
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
        earlier = "(SELECT 0 AS document, 0 AS run, '' AS id, '' AS source WHERE false)"
        if (folder / EARLIER).exists():
            earlier = parquet([folder / EARLIER], "document, run, id, source")
        # Choose the kept document of each component by the rule above. Up to here, its first document stands for a
        # component; those of earlier runs, with negative numbers, come first.
        query = f"""
            WITH members AS (SELECT a AS document, b AS component FROM edges UNION SELECT b, b FROM edges),
                 choices AS (
                     SELECT document, CASE WHEN component < 0 THEN coalesce(match, component) ELSE
                         first_value(document) OVER (
                             PARTITION BY component ORDER BY bytes DESC, source, sha256, id, document
                         ) END AS kept, id, source, bytes
                     FROM members JOIN {documents} USING (document) LEFT JOIN matches USING (document)
                 )
            SELECT choices.*, run AS earlier_run, other.source AS earlier_source, other.id AS earlier_id
            FROM choices LEFT JOIN {earlier} AS other ON kept = other.document ORDER BY choices.document
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
    removed = {document: kept for document, kept in rows_of(members, "document", "kept") if document != kept}
    is_kept = np.array([document not in removed for document in table["document"].to_pylist()])
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for (source, size), keeps in zip(rows_of(table, "source", "bytes"), is_kept, strict=True):
        result = "kept" if keeps else "duplicate"
        sources[source].update({f"{result}_documents": 1, f"{result}_bytes": size})
    advance(before.sizes[task])
    part = write_part(folder / DOCUMENTS, name, table.filter(is_kept)) if is_kept.any() else None
    return {"part": part, "sources": sources, "known": sum(kept < 0 for kept in removed.values())}
