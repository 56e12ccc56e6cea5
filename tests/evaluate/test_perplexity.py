"""`btlm perplexity` against the same windows in plain torch."""

import hashlib
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from btlm.checkpoint import Checkpoint, load_model
from btlm.cli.main import main
from btlm.convert.quantize import quantize
from btlm.evaluate.options import Perplexity
from btlm.evaluate.perplexity import Sums, ratio, windows
from btlm.evaluate.perplexity_command import run_perplexity
from btlm.evaluate.results import read_results
from tests.checkpoint.tiny import save_tiny, set_config

TEXTS = ["One text of several words, and one sentence more.", "Another  text.\n" * 9, "é ü 漢字 and so on"]
SIZES = {"n_embd": 128, "n_inner": 150, "n_positions": 512, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture(scope="module")
def copy(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "copy"
    quantize(model, folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    return path


def logs_of(folder, ids):
    network, _ = load_model(folder, dtype="float32")
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def plain(folder, texts, context, stride):
    """Nats of each text, and the log-probabilities of every prediction: window after window, in torch."""
    tokenizer, end = Checkpoint.open(folder).tokenizer, Checkpoint.open(folder).architecture.eos_token_id
    nats, predictions = [], []
    for text in texts:
        ids = [end, *tokenizer.encode(text, add_special_tokens=False).ids]
        done, total = 1, 0.0
        while done < len(ids):
            last = min(len(ids), done + (context if done == 1 else stride))
            first = max(0, last - 1 - context)
            logs = logs_of(folder, ids[first : last - 1])
            for place in range(done, last):
                total -= logs[place - 1 - first][ids[place]]
                predictions.append(logs[place - 1 - first])
            done = last
        nats.append(total)
    return nats, np.array(predictions)


@pytest.mark.parametrize(("context", "stride"), [(512, None), (20, None), (20, 7), (16, 1)])
def test_losses_are_those_of_plain_torch(model, texts, context, stride, capsys):
    rows = run_perplexity(model, [texts], Perplexity(context=context, stride=stride))
    figures = {row.metric: row.value for row in rows}
    nats = sum(plain(model, TEXTS, context, stride or context)[0])
    size = sum(len(text.encode()) for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert rows[0].n == size  # one token per byte in these models
    assert figures["nats_per_token"] == pytest.approx(nats / size, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert figures["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert figures["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    assert figures["tokens_per_byte"] == 1
    printed = capsys.readouterr().out
    assert f"3 documents, {size:,} tokens" in printed
    assert "partial" not in printed


def test_copies_are_compared_in_the_same_windows(model, copy, texts, capsys):
    options = Perplexity(context=40, stride=30, compare=(str(copy), str(model)), cache_dtype="float32")
    rows = run_perplexity(model, [texts], options)
    starts = [i for i, row in enumerate(rows) if row.metric == "nats_per_token"]
    original, quantized, same = (
        {row.metric: row for row in rows[start:end]}
        for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)
    )
    assert "kl_per_token" not in original
    assert (same["kl_per_token"].value, same["same_first_token"].value) == (0, 1)
    assert same["perplexity_change"].value == 0
    exact, rounded = (plain(folder, TEXTS, 40, 30) for folder in (model, copy))
    divergence = (np.exp(exact[1]) * (exact[1] - rounded[1])).sum(axis=1).mean()
    agree = (exact[1].argmax(axis=1) == rounded[1].argmax(axis=1)).mean()
    # The engine rounds activations to eight bits, too.
    assert quantized["kl_per_token"].value == pytest.approx(divergence, rel=0.1)
    assert quantized["same_first_token"].value == pytest.approx(agree, abs=0.03)
    change = math.exp((sum(rounded[0]) - sum(exact[0])) / len(exact[1])) - 1
    assert quantized["perplexity_change"].value == pytest.approx(change, abs=0.005)
    assert quantized["kl_per_token"].model_sha256 != original["perplexity"].model_sha256
    assert "100.00%" in capsys.readouterr().out


def test_windows_predict_every_token_once():
    for length in range(1, 40):
        for context in (1, 2, 5, 16, 64):
            for stride in {1, 2, context}:
                found, ids = [], list(range(100, 100 + length))
                for window in windows(ids, 7, context, min(stride, context)):
                    assert 1 <= window.scored < len(window.ids) <= context + 1
                    found += window.ids[-window.scored :]
                assert found == ids


def test_the_standard_error_is_that_of_a_ratio_over_documents():
    sums = [Sums(str(i), tokens, 1, 1, nats) for i, (tokens, nats) in enumerate([(10, 21.0), (30, 58.0), (20, 43.0)])]
    value, error = ratio(sums, "nats", "tokens")
    assert value == pytest.approx(122 / 60)
    residuals = [21 - value * 10, 58 - value * 30, 43 - value * 20]
    assert error == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 60)
    assert ratio(sums[:1], "nats", "tokens") == (2.1, None)


def test_results_are_written_with_what_they_depend_on(model, texts, tmp_path, capsys):
    arguments = ["perplexity", str(model), str(texts), "--limit", "2", "--output", str(tmp_path / "results.json")]
    assert main(arguments) == 0
    assert "partial: 2 documents" in capsys.readouterr().out
    rows = read_results(tmp_path / "results.json")
    assert {row.metric for row in rows} >= {"perplexity", "bits_per_byte", "word_perplexity"}
    assert all(row.partial and len(row.model_sha256) == 64 and row.settings["context"] == 2048 for row in rows)
    assert all(row.standard_error is not None for row in rows if row.metric != "tokens_per_byte")
    digests = "".join(hashlib.sha256(text.encode()).hexdigest() for text in TEXTS[:2])
    assert all(row.settings["text_sha256"] == hashlib.sha256(digests.encode()).hexdigest() for row in rows)
    assert all(row.settings["texts"] == [str(texts)] for row in rows)


@pytest.mark.parametrize(("limit", "partial"), [(2, True), (3, False), (4, False)])
def test_results_are_partial_only_if_a_text_was_left_out(model, texts, capsys, limit, partial):
    """There are three texts, and an empty one, which is none."""
    rows = run_perplexity(model, [texts], Perplexity(limit=limit))
    assert {row.partial for row in rows} == {partial}
    assert ("partial" in capsys.readouterr().out) == partial


def test_texts_are_made_tokens_once(model, texts, monkeypatch):
    read = []

    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def encode(self, text, **options):
            read.append(text)
            return self.tokenizer.encode(text, **options)

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

    checkpoint = Checkpoint.open(model)
    monkeypatch.setitem(vars(checkpoint), "tokenizer", Counting(checkpoint.tokenizer))
    run_perplexity(checkpoint, [texts], Perplexity())
    assert read == [*TEXTS, ""]


def test_a_model_without_an_end_of_text(model, texts, tmp_path):
    shutil.copytree(model, tmp_path / "endless")
    set_config(tmp_path / "endless", eos_token_id=None)
    (tmp_path / "endless" / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=r"endless has no end of text, .*; set eos_token_id in its config\.json"):
        run_perplexity(tmp_path / "endless", [texts])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{texts} --stride 9 --context 8", "--stride is 9, longer than the 8 of --context; give a shorter one."),
        ("{folder}/none.txt", "none.txt"),
        ("{folder}/broken.jsonl", "broken.jsonl, line 2: "),
        ("{folder}/empty.jsonl", "The texts hold no token; give others."),
        ("{texts} --compare {folder}/other", "The tokens of {folder}/other are not those of"),
        ("{texts} --compare {folder}/none", "none"),
    ],
)
def test_bad_input(model, texts, tmp_path, capsys, arguments, message):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    other = save_tiny(tmp_path / "other", **SIZES)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    capsys.readouterr()  # what writing models shows
    filled = arguments.format(texts=texts, folder=tmp_path).split()
    assert main(["perplexity", str(model), *filled]) == 2
    told = capsys.readouterr().err
    assert told.startswith("btlm: error: ")
    assert message.format(folder=tmp_path) in told
    assert told.count("\n") == 1
