import dataclasses
import json
import random
import re
import shutil
from itertools import pairwise
from pathlib import Path

import networkx
import numpy as np
import pyarrow as pa
import pytest

from btlm.data import dedup as dedup_module
from btlm.data.bands import pair_probability
from btlm.data.clean import clean_documents
from btlm.data.dedup import deduplicate
from btlm.data.documents import Document
from btlm.data.inspect import run_inspect
from btlm.data.minhash import band_keys, signatures
from btlm.data.parts import read_table, table_of, write_part, write_table
from btlm.data.pipeline import run_dedup, run_prepare
from btlm.data.recipe import Clean, DataRecipe, Dedup, Execution, Inspection, Mix, Read
from btlm.data.stage import COMPLETE, Documents, open_run
from btlm.files import write_json
from tests.data.corpus import edited, text
from tests.data.test_minhash import plain_shingles, planted_pairs, random_text


def deduplicated(folder, rows, settings=None, read=None):
    """Run the stage on ``(text, id, source)``; returns its result and the kept documents."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "id": id_, "source": source}) + "\n" for text, id_, source in rows]
    (folder / "in.jsonl").write_text("".join(lines))
    out = folder / "out"
    with open_run(out, Execution(workers=1)) as run:
        clean_documents([folder / "in.jsonl"], out / "clean", read or Read(), Clean("none", 0), run)
        stage = deduplicate(out / "clean", out / "dedup", settings or Dedup(), run)
    tables = [read_table(out / "dedup/documents" / name).to_pylist() for name, _, _ in stage["parts"]]
    return stage, [(row["text"], row["id"], row["source"]) for table in tables for row in table]


def jaccard(first, second):
    sets = [set(plain_shingles(text)) for text in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_planted_duplicates_across_sources_are_found_and_others_kept(tmp_path):
    rng = random.Random(0)
    originals = [text(rng, 200) for _ in range(300)]
    rows = [(original, f"o{i}", f"s{i % 3}") for i, original in enumerate(originals)]
    exact = [(originals[i], f"e{i}", f"s{(i + 1) % 3}") for i in range(40)]
    changed = {i: edited(originals[i], rng, 0.004) for i in range(40, 140)}
    near = [(copy, f"n{i}", f"s{(i + 1) % 3}") for i, copy in changed.items()]
    rng.shuffle(rows := rows + exact + near)
    stage, kept = deduplicated(tmp_path, rows, read=Read(part_bytes=20_000))
    assert len(stage["parts"]) > 5
    kept_ids = {id_ for _, id_, _ in kept}
    for i in range(40):
        assert len({f"o{i}", f"e{i}"} & kept_ids) == 1
    assert {f"o{i}" for i in range(140, 300)} <= kept_ids, "no document without a copy is removed"
    found = sum(len({f"o{i}", f"n{i}"} & kept_ids) == 1 for i in changed)
    similarities = [jaccard(originals[i], copy) for i, copy in changed.items()]
    expected = [pair_probability(similarity, 9, 13) for similarity in similarities]
    spread = np.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(found - sum(expected)) <= 3.3 * spread + 0.5
    assert 60 < sum(expected) < 100, "the copies are near enough, and not all so near that they must be found"
    counts = stage["sources"]
    assert sum(entry.get("duplicate_documents", 0) for entry in counts.values()) == len(rows) - len(kept)
    assert sum(entry["kept_bytes"] for entry in counts.values()) == sum(len(text.encode()) for text, _, _ in kept)


def test_nothing_below_half_is_removed(tmp_path):
    rows = []
    for similarity in (0.1, 0.2, 0.3, 0.4):
        pairs, _ = planted_pairs(random.Random(int(10 * similarity)), similarity, 100)
        rows += [(text, f"{similarity}-{i}", "s") for i, text in enumerate(pairs)]
    _, kept = deduplicated(tmp_path, rows)
    assert len(kept) == len(rows)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        # The longest is kept;
        (("a {x} b", "2", "B"), ("a {x}", "1", "A"), "2"),
        # among equally long ones, the one with the first source;
        (("{x}", "2", "A"), ("{x}", "1", "B"), "2"),
        # whatever their text;
        (("{x} ab", "2", "A"), ("{x} ba", "1", "B"), "2"),
        (("{x} ba", "2", "A"), ("{x} ab", "1", "B"), "2"),
        # and among equal texts of one source, the one with the first id.
        (("{x}", "1", "A"), ("{x}", "2", "A"), "1"),
    ],
)
def test_which_document_is_kept(tmp_path, first, second, kept):
    body = text(random.Random(1), 300)
    rows = [(pattern.format(x=body), id_, source) for pattern, id_, source in (first, second)]
    for order, name in ((rows, "as given"), (rows[::-1], "reversed")):
        _, found = deduplicated(tmp_path / name, order)
        assert [id_ for _, id_, _ in found] == [kept]


def test_texts_shorter_than_a_shingle_are_duplicates_of_equals_only(tmp_path):
    rows = [
        ("short", "1", "s"),
        ("Short!", "2", "s"),
        ("shirt", "3", "s"),
        ("", "4", "s"),
        ("", "5", "s"),
        ("?", "6", "s"),
    ]
    _, kept = deduplicated(tmp_path, rows)
    assert [id_ for _, id_, _ in kept] == ["2", "3", "4", "5", "6"]


def test_a_chain_of_neighbours_is_one_component(tmp_path):
    """The ends have nothing in common; each neighbour is a duplicate of the next."""
    rng = random.Random(3)
    stream = random_text(rng, 40_000)
    rows = [(stream[start : start + 20_000], str(start), "s") for start in range(0, 20_001, 250)]
    assert all(jaccard(a[0][:3000], b[0][:3000]) > 0.8 for a, b in pairwise(rows[:3]))
    assert jaccard(rows[0][0], rows[-1][0]) < 0.01
    _, kept = deduplicated(tmp_path, rows)
    assert len(kept) == 1


@pytest.mark.parametrize("seed", range(4))
def test_components_are_networkxs(tmp_path, seed):
    rng = np.random.default_rng(seed)
    nodes, edges = 400, [30, 200, 390, 800][seed]
    documents = [Document("", f"{i:03d}", "s") for i in range(nodes)]
    # All are equally long and from one source, so the one with the first SHA-256 is kept.
    hashes = [f"{value:03d}" for value in rng.permutation(nodes)]
    table = table_of(list(zip(documents, [1] * nodes, hashes, strict=True)))
    part = write_part(tmp_path / "documents", "000000-0000.parquet", table)
    write_json(tmp_path / COMPLETE, {"parts": [part]})
    pairs = [(int(a), int(b)) for a, b in rng.integers(0, nodes, (edges, 2)) if a != b]
    # A long path, whose ends meet last.
    pairs += [(i + 1, i) for i in range(60)]
    columns = {
        "document": pa.array([a for a, _ in pairs], pa.int64()),
        "first": pa.array([b for _, b in pairs], pa.int64()),
    }
    write_table(tmp_path / "pairs/000.parquet", pa.table(columns))
    dedup_module._components(Documents(tmp_path), tmp_path, 1, 0.5, 0, lambda _: None)
    found = read_table(tmp_path / "clusters.parquet").to_pylist()
    graph = networkx.Graph(pairs)
    expected = {
        node: min(component, key=lambda i: hashes[i])
        for component in networkx.connected_components(graph)
        for node in component
    }
    assert {row["document"]: row["kept"] for row in found} == expected


def test_candidate_pairs_are_all_documents_that_share_a_band(tmp_path):
    rng = random.Random(5)
    base = [text(rng, 150) for _ in range(20)]
    texts = [edited(rng.choice(base), rng, rng.choice([0, 0.005, 0.02])) for _ in range(120)]
    _, kept = deduplicated(tmp_path, [(text, str(i), "s") for i, text in enumerate(texts)], Dedup(bands=12, rows=10))
    keys = band_keys(signatures(texts, Dedup(bands=12, rows=10))[0], 12, 10)
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(texts)))
    graph.add_edges_from((i, j) for i in range(len(texts)) for j in range(i) if (keys[i] == keys[j]).any())
    assert len(kept) == networkx.number_connected_components(graph) < len(texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": 10, "rows": 13}, r"dedup.bands x dedup.rows is 130, more than dedup.permutations \(128\)"),
        ({"threshold": 1.5}, "dedup.threshold is 1.5"),
        ({"threshold": 0.5, "bands": 3}, "which means 25 bands of 5 rows, and dedup.bands and dedup.rows are 3 and 13"),
        ({"shingle_size": 0}, "dedup.shingle_size is 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Dedup(**settings)


# Against earlier runs


def rows_of_batches(rng):
    """Documents of three batches, which are near-duplicates within and across them, some only through others."""
    originals = [text(rng, 200) for _ in range(60)]

    def near(original):
        return edited(original, rng, 0.002)

    chain = list(map(near, originals[:10]))
    first = [*originals[:30], *map(near, originals[:6])]
    # Copies of documents of the first batch; copies of these; duplicates within the batch; and new documents.
    second = [*chain, *map(near, chain), *originals[30:45], *map(near, originals[30:36])]
    third = [*map(near, originals[3:9]), *map(near, originals[33:39]), *originals[45:], originals[50] + " longer"]
    return [
        [{"text": content, "id": f"{batch}{i}", "source": f"s{i % 3}"} for i, content in enumerate(texts)]
        for batch, texts in zip("abc", (first, second, third), strict=True)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shard_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in {".bin", ".npy"}}


RECIPE = DataRecipe(read=Read(part_bytes=20_000), mix=Mix(holdout=0.1))


def against(*folders, **changes):
    return dataclasses.replace(RECIPE, dedup=Dedup(against=list(map(str, folders)), **changes))


def test_against_earlier_runs_as_one_run_over_all_that_prefers_the_earlier_documents(tmp_path):
    """The reference are the components of one run over all batches; of one with earlier documents, no new one stays."""
    batches = rows_of_batches(random.Random(2))
    files = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("abc", batches, strict=True)]
    execution = Execution(workers=1)
    run_dedup(files, tmp_path / "all", Read(), Dedup(), execution)
    members = read_table(tmp_path / "all/clusters.parquet").to_pylist()
    component_of = {row["id"]: row["kept"] for row in members}
    best = {row["kept"]: row["id"] for row in members if row["document"] == row["kept"]}
    earlier: list[str] = []
    outputs: list[Path] = []
    for number, (name, rows) in enumerate(zip("abc", batches, strict=True)):
        output = tmp_path / f"out-{name}"
        run_prepare([files[number]], output, against(*outputs), execution)
        taken = {component_of.get(id_, id_) for id_ in earlier}
        # The kept document of a component that is all of this batch may be another one than that of the whole.
        own = [row for row in rows if component_of.get(row["id"], row["id"]) not in taken]
        reference = tmp_path / f"reference-{name}"
        run_prepare([write_rows(tmp_path / f"{name}.own.jsonl", own)], reference, RECIPE, execution)
        assert shard_files(output / "shards") == shard_files(reference / "shards")
        assert len(own) < len(rows) or number == 0
        for row in read_table(output / "dedup/clusters.parquet").to_pylist():
            component = component_of[row["id"]]
            assert (row["kept"] < 0) == (component in taken) == (row["earlier_id"] is not None)
            if row["kept"] < 0:
                # The document that is named is an earlier one of the same component, in the run that is named.
                assert component_of[row["earlier_id"]] == component
                assert row["earlier_id"][0] == "abc"[row["earlier_run"]]
                assert row["earlier_source"] == f"s{int(row['earlier_id'][1:]) % 3}"
        earlier += [row["id"] for row in rows]
        outputs.append(output)
        # Neither text nor scratch of the earlier runs is needed.
        shutil.rmtree(output / "clean")
        shutil.rmtree(output / "dedup/documents")
        assert not (output / "dedup/earlier.parquet").exists()
    assert len(best) > 15


def test_a_document_names_the_one_that_it_matches_itself(tmp_path, capsys):
    rng = random.Random(4)
    originals = [text(rng, 200) for _ in range(3)]
    old = [{"text": original, "id": f"old-{i}", "source": "books"} for i, original in enumerate(originals)]
    new = [{"text": originals[i], "id": f"new-{i}", "source": "web"} for i in (2, 0)] + [
        {"text": text(rng, 200), "id": "x"}
    ]
    run_dedup([write_rows(tmp_path / "old.jsonl", old)], tmp_path / "old", Read(), Dedup(), Execution(workers=1))
    given = [write_rows(tmp_path / "new.jsonl", new)]
    run_dedup(given, tmp_path / "new", Read(), Dedup(against=[str(tmp_path / "old")]), Execution(workers=2))
    assert "2 documents match earlier ones" in (tmp_path / "new/log.txt").read_text()
    run_inspect(tmp_path / "new", Inspection(stage="dedup"))
    shown = capsys.readouterr().out
    assert "2 near-duplicates of documents of earlier runs" in shown
    for number in (0, 2):
        assert re.search(rf"web  new-{number}  .*\n.*\n    matches  books  old-{number}  in {tmp_path}/old\n", shown)
    assert "0 clusters of near-duplicates" in shown


def test_of_several_earlier_documents_the_most_similar_is_named_and_the_first_of_equals(tmp_path):
    rng = random.Random(6)
    base, settings = text(rng, 400), Dedup()
    relatives = (edited(base, rng, 0.01) for _ in range(50))
    keys = {relative: band_keys(signatures([base, relative], settings)[0], 9, 13) for relative in relatives}
    relative = next(other for other, (one, two) in keys.items() if 1 <= (one == two).sum() <= 3)
    rows = {
        "a": [("relative", relative)],
        "b": [("base", base)],
        "c": [("base", base)],
        "d": [("copy of base", base), ("copy of relative", relative), ("another", text(rng, 400))],
    }
    for name, documents in rows.items():
        file = write_rows(tmp_path / f"{name}.jsonl", [{"text": body, "id": id_} for id_, body in documents])
        earlier = [str(tmp_path / other) for other in "abc"] if name == "d" else []
        run_dedup([file], tmp_path / name, Read(), Dedup(against=earlier), Execution(workers=1))
    found = read_table(tmp_path / "d/clusters.parquet").to_pylist()
    named = {row["id"]: (row["earlier_run"], row["earlier_id"]) for row in found}
    assert named == {"copy of base": (1, "base"), "copy of relative": (0, "relative")}


def test_earlier_runs_that_do_not_fit(tmp_path):
    execution = Execution(workers=1)
    old, more = (
        write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i} " * 200} for i in range(3)]) for n in ("a", "b")
    )
    run_prepare([old], tmp_path / "old", RECIPE, execution)
    run_prepare([more], tmp_path / "more", against(tmp_path / "old"), execution)
    refused = [
        (against(tmp_path / "absent"), "dedup.against: .*absent holds no signatures; give what this version"),
        (against(tmp_path / "old/shards"), "dedup.against: .*old/shards holds no signatures"),
        (
            against(tmp_path / "old", bands=3),
            r"was deduplicated with other settings \(bands was 9, is 3\); use the same",
        ),
        (against(tmp_path / "old", seed=2), r"\(seed was 1, is 2\)"),
        (dataclasses.replace(against(tmp_path / "old"), clean=Clean("NFKC")), 'normalization was "NFC", is "NFKC"'),
        (against(tmp_path / "more"), "more/dedup was itself compared with .*old/dedup; name both"),
    ]
    for recipe, message in refused:
        with pytest.raises(ValueError, match=message):
            run_prepare([more], tmp_path / "new", recipe, execution)
        assert not (tmp_path / "new").exists(), "nothing is read"
    with pytest.raises(ValueError, match='normalization was "NFC", is "none"'):
        run_dedup([more], tmp_path / "new", Read(), Dedup(against=[str(tmp_path / "old")]), execution)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="No document is left: all of them match earlier ones"):
        run_prepare([old], tmp_path / "new", against(tmp_path / "old"), execution)
    # Other earlier runs are other settings.
    with pytest.raises(ValueError, match=r"other settings or input \(input has changed"):
        run_prepare([more], tmp_path / "more", RECIPE, execution)
    run_prepare([more], tmp_path / "more", against(tmp_path / "old/dedup"), execution)
