"""Heads that classify: loss, padding, saving, and the Auto classes."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.utils import logging

from btlm.model import BTLMForSequenceClassification, BTLMForTokenClassification, BTLMModel
from tests.model.test_quantization_btlm import QUANTIZED, WIDE, write_folder
from tests.model.tiny import tiny_config, tiny_model, tokens

PAD = 100
TASKS = {
    AutoModelForSequenceClassification: BTLMForSequenceClassification,
    AutoModelForTokenClassification: BTLMForTokenClassification,
}


@pytest.fixture(autouse=True)
def _quiet():
    """Transformers warns of the head that a language model does not have."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def classifier(kind: Any, **overrides: Any) -> Any:
    torch.manual_seed(0)
    return kind(tiny_config(num_labels=3, pad_token_id=PAD, **overrides)).eval()


def test_a_text_is_classified_by_its_last_token_that_is_not_padding():
    model = classifier(BTLMForSequenceClassification)
    ids = tokens(3, 12) % PAD
    hidden = model.transformer(ids).last_hidden_state
    expected = hidden[:, -1] @ model.score.weight.T
    labels = torch.tensor([0, 2, 1])
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected, labels))
    for left, right in ((0, 5), (5, 0), (3, 2)):
        padded = F.pad(ids, (left, right), value=PAD)
        logits = model(padded, attention_mask=(padded != PAD).long()).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_classified_and_labels_of_padding_ignored():
    model = classifier(BTLMForTokenClassification)
    ids, labels = tokens(2, 9) % PAD, torch.tensor([[0, 1, 2] * 3, [2, 1, 0] * 3])
    output = model(ids, labels=labels)
    expected = model.transformer(ids).last_hidden_state @ model.score.weight.T + model.score.bias
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(output.loss, F.cross_entropy(expected.flatten(0, 1), labels.flatten()))
    padded = F.pad(ids, (0, 4), value=PAD)
    with_padding = model(padded, attention_mask=(padded != PAD).long(), labels=F.pad(labels, (0, 4), value=-100))
    torch.testing.assert_close(with_padding.loss, output.loss)


def test_a_batch_needs_a_padding_token():
    model = BTLMForSequenceClassification(tiny_config(num_labels=3)).eval()
    assert model(tokens(1, 5)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="padding token"):
        model(tokens(2, 5))


@pytest.mark.parametrize("width_scale", [1.0, 0.25])
@pytest.mark.parametrize("kind", TASKS.values())
def test_a_new_head_has_the_multiplier_of_mup_in_its_weights(kind, width_scale):
    model = classifier(kind, n_embd=480, mup_width_scale=width_scale, initializer_range=0.1, n_layer=1)
    assert model.score.weight.std().item() == pytest.approx(0.1 * width_scale, rel=0.1)
    if model.score.bias is not None:
        assert not model.score.bias.any()
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(("auto", "kind"), TASKS.items())
def test_a_language_model_becomes_a_classifier_that_saves_and_loads(auto, kind, tmp_path):
    language_model = tiny_model()
    language_model.save_pretrained(tmp_path / "plain")
    torch.manual_seed(0)
    loaded: Any = auto.from_pretrained(
        tmp_path / "plain", num_labels=3, pad_token_id=PAD, output_loading_info=True, trust_remote_code=False
    )
    model, report = loaded
    assert type(model) is kind
    assert type(model.transformer) is BTLMModel
    assert {name.partition(".")[0] for name in report["missing_keys"]} == {"score"}
    assert model.score.weight.isfinite().all()
    ids = tokens(1, 9)
    hidden = [network(ids).last_hidden_state for network in (model.transformer, language_model.transformer)]
    assert torch.equal(*hidden)
    model.save_pretrained(tmp_path / "classifier")
    again = auto.from_pretrained(tmp_path / "classifier", trust_remote_code=False)
    assert again.config.num_labels == 3
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_model_becomes_a_classifier(tmp_path, tied):
    values = write_folder(tmp_path, tiny_model(**WIDE, tie_word_embeddings=tied), QUANTIZED)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert torch.equal(model.transformer.wte.weight, values["transformer.wte"])
    assert model(tokens(1, 9)).logits.isfinite().all()


def test_a_classifier_learns():
    model = classifier(BTLMForSequenceClassification).train()
    ids = tokens(16, 10) % PAD
    labels = (ids[:, -1] > PAD // 2).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


WITHOUT_BTLM = """
import sys
sys.modules["btlm"] = None  # what `import btlm` meets where it is not installed
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(12)[None]).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_folder_with_its_code_loads_where_btlm_is_not_installed(tmp_path):
    model = classifier(BTLMForSequenceClassification)
    model.save_pretrained(tmp_path / "with-code", save_code=True)
    written = json.loads((tmp_path / "with-code" / "config.json").read_text())
    assert written["auto_map"]["AutoModelForSequenceClassification"].endswith(".BTLMForSequenceClassification")
    argv = [sys.executable, "-c", WITHOUT_BTLM, str(tmp_path / "with-code"), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), model(torch.arange(12)[None]).logits)
