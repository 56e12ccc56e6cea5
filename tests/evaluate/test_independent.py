"""HellaSwag and LAMBADA scored by plain torch, without the engine and without lm-evaluation-harness."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

from btlm.checkpoint import BUNDLED_MODEL, load_model
from btlm.evaluate.eval_command import run_eval
from btlm.evaluate.options import Eval

DATA = os.environ.get("BTLM_EVAL_DATA")  # a folder with the real questions
DOCUMENTS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The bundled model in fp32, its tokenizer and its folder."""
    folder = tmp_path_factory.mktemp("fp32")
    model, tokenizer = load_model(BUNDLED_MODEL, dtype="float32", device="cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """Nats of the continuation, and whether each of its tokens is the most probable one."""
    ids, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    logs = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(ids[start:])
    return logs.gather(1, wanted[:, None]).sum().item(), bool((logs.argmax(1) == wanted).all())


def sentences(number, least):
    """Sentences of this project's documents with a number of words."""
    text = " ".join(path.read_text() for path in sorted(DOCUMENTS.glob("*.md")))
    found = [one for one in re.findall(r"[A-Z][a-z ,]+\.", text) if len(one.split()) >= least]
    assert len(found) >= number
    return found[:number]


def hellaswag_rows():
    whole = [one.split() for one in sentences(24, 10)]
    ends = [" ".join(words[6:]) for words in whole]
    return [
        {
            "query": " ".join(words[:6]),
            "choices": [ends[i], *(ends[(i + 7 * j) % len(ends)] for j in (1, 2, 3))],
            "gold": 0,
        }
        for i, words in enumerate(whole)
    ]


def rows_of(name, rows, folder):
    """Questions made from the documents, or the first real ones."""
    if DATA is not None:
        rows = [json.loads(line) for line in (Path(DATA) / name).read_text().splitlines()[:100]]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def scores(folder, task, data):
    return {row.metric: row.value for row in run_eval(folder, Eval(suite=(task,), data=str(data)))}


@pytest.mark.slow
def test_hellaswag(loaded, tmp_path):
    model, tokenizer, folder = loaded
    rows = rows_of("hellaswag_validation.jsonl", hellaswag_rows(), tmp_path)
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        nats = [log_likelihood(model, tokenizer, row["query"], f" {choice}")[0] for choice in row["choices"]]
        per_character = [value / len(choice) for value, choice in zip(nats, row["choices"], strict=True)]
        right["acc"] += nats.index(max(nats)) == row["gold"]
        right["acc_norm"] += per_character.index(max(per_character)) == row["gold"]
    assert scores(folder, "hellaswag", tmp_path) == pytest.approx({name: n / len(rows) for name, n in right.items()})
    assert 0 < right["acc"] < len(rows)


@pytest.mark.slow
def test_lambada(loaded, tmp_path):
    model, tokenizer, folder = loaded
    rows = rows_of("lambada_openai_test.jsonl", [{"text": one.rstrip(".")} for one in sentences(40, 6)], tmp_path)
    parts = [row["text"].rpartition(" ") for row in rows]
    found = [log_likelihood(model, tokenizer, text, f" {last}") for text, _, last in parts]
    accuracy = sum(best for _, best in found) / len(rows)
    perplexity = math.exp(-sum(nats for nats, _ in found) / len(rows))
    ours = scores(folder, "lambada_openai", tmp_path)
    assert ours["acc"] == pytest.approx(accuracy)
    assert ours["perplexity"] == pytest.approx(perplexity, rel=1e-3)
