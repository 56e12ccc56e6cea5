from pathlib import Path
from typing import Any

import pytest
import torch

from btlm.model import BTLMLMHeadModel
from tests.model.tiny import tiny_model, tokens

peft = pytest.importorskip("peft")

TARGETS = ["c_attn", "c_fc", "c_fc2", "c_proj"]
# PEFT needs fan_in_fan_out for weights stored as [in, out]; without it, PEFT warns and sets it.
LORA = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


def train(model: Any, steps: int) -> list[float]:
    input_ids = tokens(4, 24)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture
def adapted() -> Any:
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**LORA))
    model.train()
    return model


def test_every_projection_is_adapted_and_nothing_else_trains(adapted: Any) -> None:
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.transformer.") for name in names}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_fc2", "mlp.c_proj")
    assert layers == {f"h.{block}.{kind}" for block in range(3) for kind in kinds}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_falls(adapted: Any, checkpointing: bool) -> None:
    frozen = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    losses = train(adapted, 12)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)


def test_input_embeddings_keep_their_hooks(adapted: Any) -> None:
    """PEFT makes the embeddings of the tokens require gradients, so scaling them in place would fail."""
    adapted.enable_input_require_grads()
    adapted(tokens(2, 9), labels=tokens(2, 9)).loss.backward()


@torch.no_grad()
def test_saved_adapter_loads_equal(adapted: Any, tmp_path: Path) -> None:
    with torch.enable_grad():
        train(adapted, 3)
    adapted.eval()
    expected = adapted(tokens(2, 20)).logits
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(loaded(tokens(2, 20)).logits, expected)
    assert not torch.allclose(tiny_model()(tokens(2, 20)).logits, expected, atol=0.1)


@torch.no_grad()
def test_merged_model_equals_the_adapted_one(adapted: Any, tmp_path: Path) -> None:
    with torch.enable_grad():
        train(adapted, 3)
    adapted.eval()
    expected = adapted(tokens(2, 20)).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is BTLMLMHeadModel
    torch.testing.assert_close(merged(tokens(2, 20)).logits, expected, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = BTLMLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens(2, 20)).logits, merged(tokens(2, 20)).logits)


@torch.no_grad()
def test_adapted_model_generates_with_and_without_a_cache(adapted: Any) -> None:
    with torch.enable_grad():
        train(adapted, 3)
    adapted.eval()
    prompt = tokens(2, 9)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "pad_token_id": 0}
    cached = adapted.generate(input_ids=prompt, **options)
    assert torch.equal(cached, adapted.generate(input_ids=prompt, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens(kind: str) -> None:
    """Virtual tokens come as cached keys and values, or as embeddings before the text."""
    config = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(), config)
    model.train()
    losses = train(model, 12)
    assert losses[-1] < losses[0]
