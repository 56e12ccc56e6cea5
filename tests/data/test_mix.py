import hashlib
import json
import random

import numpy as np
import pytest

from btlm.data.clean import clean_documents
from btlm.data.mix import mix
from btlm.data.parts import read_table
from btlm.data.recipe import Clean, Execution, Mix, Read
from btlm.data.shards import SPLITS
from btlm.data.stage import open_run
from tests.data.corpus import text


def mixed(folder, rows, settings=None, read=None, workers=1):
    """Run the stage on ``(text, source)``; returns its result and the ids of each split in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "source": source, "id": text[:12]}) + "\n" for text, source in rows]
    (folder / "in.jsonl").write_text("".join(lines))
    out = folder / "out"
    with open_run(out, Execution(workers=workers)) as run:
        clean_documents([folder / "in.jsonl"], out / "clean", read or Read(), Clean("none", 0), run)
        stage = mix(out / "clean", out / "mix", settings or Mix(), run)
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, (name, _, _) in zip(stage["splits"], stage["parts"], strict=True):
        splits[split] += read_table(out / "mix/documents" / name)["text"].to_pylist()
    return stage, splits


def everything(splits):
    return [text for texts in splits.values() for text in texts]


def documents(number, sources=("a", "b"), words=30):
    rng = random.Random(0)
    return [(f"{i:04d} {text(rng, words)}", sources[i % len(sources)]) for i in range(number)]


def test_every_document_is_in_one_split_once(tmp_path):
    rows = documents(400)
    stage, splits = mixed(tmp_path, rows, Mix(holdout=0.1))
    assert sorted(everything(splits)) == sorted(text for text, _ in rows)
    # 0.1 of each source is held out, alternately for validation and test.
    counts = stage["sources"]
    assert {s: (c["validation_documents"], c["test_documents"]) for s, c in counts.items()} == {
        "a": (10, 10),
        "b": (10, 10),
    }
    assert counts["a"]["train_documents"] == len([text for text in splits["train"] if (text, "a") in rows]) == 180


@pytest.mark.parametrize(
    ("number", "least", "held_out"),
    [(1, 1, 0), (2, 1, 1), (2, 0, 1), (290, 0, 1), (300, 0, 1), (1765, 0, 3), (1765, 5, 5)],
)
def test_the_share_of_a_source_that_is_held_out(tmp_path, number, least, held_out):
    _, splits = mixed(tmp_path, documents(number, ["a"], words=3), Mix(min_holdout=least))
    assert len(splits["validation"] + splits["test"]) == held_out
    assert len(splits["train"]) == number - held_out


def test_one_document_of_all_is_held_out_at_least(tmp_path):
    """A share of a small text rounds to zero, and training would have nothing to measure itself by."""
    rows = documents(8, [str(i) for i in range(8)])
    stage, splits = mixed(tmp_path / "8", rows)
    assert (len(splits["train"]), len(splits["validation"]), splits["test"]) == (7, 1, [])
    assert sum(counts.get("validation_documents", 0) for counts in stage["sources"].values()) == 1
    by_hash = [hashlib.sha256(f"holdout:1:{hashlib.sha256(t.encode()).hexdigest()}".encode()).digest() for t, _ in rows]
    assert splits["validation"] == [rows[min(range(8), key=lambda i: by_hash[i])][0]]
    _, splits = mixed(tmp_path / "1", rows[:1])
    assert (len(splits["train"]), splits["validation"]) == (1, [])
    assert (
        "No document is held out for validation, since there is only one." in (tmp_path / "1/out/log.txt").read_text()
    )


def test_nothing_is_held_out_if_not_asked_for(tmp_path):
    _, splits = mixed(tmp_path, documents(10), Mix(holdout=0))
    assert (len(splits["train"]), splits["validation"], splits["test"]) == (10, [], [])


def test_the_result_depends_on_the_seed_and_not_on_order_or_tasks(tmp_path):
    rows = documents(200)
    settings = Mix(holdout=0.05, partition_bytes=4000, weights={"a": 1.5})
    stage, splits = mixed(tmp_path / "1", rows, settings)
    assert len(stage["parts"]) > 5
    other_order = random.Random(1).sample(rows, len(rows))
    assert mixed(tmp_path / "2", other_order, settings, Read(part_bytes=3000), workers=2)[1] == splits
    other_seed = mixed(tmp_path / "3", rows, Mix(**{**vars(settings), "seed": 2}))[1]
    assert other_seed["train"] != splits["train"]
    assert other_seed["validation"] != splits["validation"]


def test_every_choice_depends_on_the_seed(tmp_path):
    """Each by itself: the order, what is held out, and which documents of a source a weight takes."""
    rows = documents(200, ["a"])
    orders, held_out, taken = set(), set(), set()
    for seed in (1, 2, 3):
        _, splits = mixed(tmp_path / f"order{seed}", rows, Mix(holdout=0, seed=seed))
        orders.add(tuple(splits["train"]))
        _, splits = mixed(tmp_path / f"held{seed}", rows, Mix(holdout=0.1, seed=seed))
        held_out.add((frozenset(splits["validation"]), frozenset(splits["test"])))
        _, splits = mixed(tmp_path / f"weight{seed}", rows, Mix(holdout=0, weights={"a": 0.5}, seed=seed))
        taken.add(frozenset(splits["train"]))
    assert (len(orders), len(held_out), len(taken)) == (3, 3, 3)


def test_the_size_of_partitions_does_not_change_the_order(tmp_path):
    rows = documents(200)
    small = mixed(tmp_path / "1", rows, Mix(partition_bytes=3000))
    assert len(small[0]["parts"]) > len(SPLITS)
    assert small[1] == mixed(tmp_path / "2", rows)[1]


def test_the_order_is_that_of_a_shuffle(tmp_path):
    rows = documents(2000, words=3)
    _, splits = mixed(tmp_path, rows, Mix(holdout=0))
    places = np.array([int(text[:4]) for text in splits["train"]])
    # The correlation of a random order has a standard deviation of 1 / sqrt(n).
    assert abs(np.corrcoef(places, np.arange(2000))[0, 1]) < 4 / np.sqrt(2000)
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 4 / np.sqrt(2000)


def test_weights_repeat_and_thin_out_training_documents(tmp_path):
    rows = documents(1200, ["half", "once", "most", "none"], words=3)
    stage, splits = mixed(tmp_path, rows, Mix(weights={"half": 0.5, "most": 2.25, "none": 0}, holdout=0.05))
    by_source = dict(rows)
    trained = [by_source[text] for text in splits["train"]]
    copies = {text: splits["train"].count(text) for text in by_source if by_source[text] == "most"}
    held_out = splits["validation"] + splits["test"]
    assert trained.count("once") == 300 - 15
    assert trained.count("none") == 0
    assert sum(by_source[text] == "none" for text in held_out) == 15
    assert abs(trained.count("half") - 142.5) < 4 * np.sqrt(285 * 0.25)
    assert set(copies.values()) == {0, 2, 3}
    assert abs(sum(copies.values()) - 285 * 2.25) < 4 * np.sqrt(285 * 0.25 * 0.75)
    assert stage["sources"]["most"]["train_documents"] == sum(copies.values())
    # Copies are shuffled separately; otherwise, all 285 would be side by side.
    pairs = zip(splits["train"], splits["train"][1:], strict=False)
    assert sum(first == second for first, second in pairs) < 10


def test_a_copy_of_a_held_out_document_is_not_trained_on(tmp_path):
    # Copies are neighbours in the order in which documents are held out, so the third document's copy is not held out.
    stage, splits = mixed(tmp_path, documents(20, ["a"]) * 2, Mix(holdout=3 / 40))
    held_out = splits["validation"] + splits["test"]
    assert len(held_out) == 3
    assert not set(splits["train"]) & set(held_out)
    assert stage["sources"]["a"]["copy_of_held_out_documents"] == 1
    assert len(splits["train"]) == 36


def test_documents_that_share_an_ngram_with_an_evaluation_set_are_dropped(tmp_path):
    rows = documents(60, ["a"])
    question = rows[7][0].split()[3:16]
    choices = " ".join(rows[11][0].upper().replace(".", " ,!").split()[5:40])
    lines = [{"q": " ".join(question), "n": 1}, {"choices": {"text": ["no", choices]}}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = Mix(decontaminate=[str(tmp_path / "eval.jsonl")], holdout=0.1)
    stage, splits = mixed(tmp_path / "13", rows, settings)
    assert {text for text, _ in rows} - set(everything(splits)) == {rows[7][0], rows[11][0]}
    assert stage["sources"]["a"]["contaminated_documents"] == 2
    # With one word less, there is no 13-gram.
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": " ".join(question[:-1])}))
    assert len(everything(mixed(tmp_path / "12", rows, settings)[1])) == 60
    fewer_words = Mix(decontaminate=settings.decontaminate, decontaminate_words=12)
    assert {text for text, _ in rows} - set(everything(mixed(tmp_path / "of 12", rows, fewer_words)[1])) == {rows[7][0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"web": 1}}, "mix.weights names web, which the documents do not have; their sources are a, b"),
        ({"weights": {"A": 1}}, r"mix.weights names A \(did you mean a\?\), which the documents do not have"),
        ({"weights": {"a": 0, "b": 0}}, "No document is left for training"),
        ({"decontaminate": ["missing.jsonl"]}, "mix.decontaminate: missing.jsonl: No such file or directory"),
    ],
)
def test_settings_that_do_not_fit_the_documents(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        mixed(tmp_path, documents(10), Mix(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"holdout": 1.0}, "mix.holdout is 1.0"),
        ({"weights": {"a": -1}}, "mix.weights of a is -1"),
        ({"weights": {"a": float("nan")}}, "mix.weights of a is nan"),
        ({"partition_bytes": 0}, "mix.partition_bytes is 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Mix(**settings)


def test_an_evaluation_set_that_is_no_json(tmp_path):
    (tmp_path / "eval.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match=r"eval.jsonl, line 2: not JSON"):
        mixed(tmp_path, documents(10), Mix(decontaminate=[str(tmp_path / "eval.jsonl")]))


def test_what_is_held_out_is_a_function_of_seed_and_text(tmp_path):
    rows = documents(100, ["a"])
    _, splits = mixed(tmp_path, rows, Mix(holdout=0.1, seed=5))
    hashed = {text: hashlib.sha256(text.encode()).hexdigest() for text, _ in rows}
    order = sorted(hashed, key=lambda text: hashlib.sha256(f"holdout:5:{hashed[text]}".encode()).hexdigest())
    assert set(splits["validation"]) == set(order[0:10:2])
    assert set(splits["test"]) == set(order[1:10:2])
