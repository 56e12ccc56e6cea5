from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from btlm.model import BTLMLMHeadModel
from btlm.plan.memory import block_bytes_per_token, memory_per_device
from btlm.train import Recipe
from btlm.train.cost import num_adapter_parameters
from btlm.train.recipe import Data, Lora, Parallelism, Precision, Stage
from btlm.train.step import LossModel
from tests.train.tiny import tiny_recipe

LORA = Lora(rank=4)
DOCUMENTS = Data(mask_documents=True)
WIDE = {"n_embd": 256, "n_inner": 700}

# Counted by hand: 23,856 parameters, of which 8,696 are in each of two blocks (8,320 in matrices) and 6,464 outside


def test_memory_of_a_single_device() -> None:
    row = memory_per_device(tiny_recipe(), 1)
    # A block keeps per token: norms 2 x (4 x 32 + 8); queries, keys, values and output of four heads of 8 + 8
    # dimensions, and a sum per head; three inner vectors; inputs of five matrices.
    block = 272 + 4 * 2 * 64 + 16 + 3 * 2 * 44 + 2 * (4 * 32 + 44)
    assert block == 1408
    assert row == {
        "shards": 1,
        "moment": "loss",
        "weights": 4 * 23_856,
        "gradients": 4 * 23_856,
        "optimizer": 8 * 23_856,
        "gathered": 2 * 2 * 8_320,  # bf16 copies of the matrices
        "activations": 32 * (2 * 1408 + 136),  # and the final norm
        # 32 tokens x 200 logits and probabilities; the head of 200 x 32 in bf16, its gradient in bf16 and fp32; hidden
        # states and their gradient.
        "head": 32 * 200 * (2 + 2) + 200 * 32 * (2 + 2 + 4) + 2 * 2 * 32 * 32,
        "total": 590_336,
    }


def test_memory_of_shards_with_checkpointing() -> None:
    recipe = tiny_recipe(
        precision=Precision(activation_checkpointing=True), parallelism=Parallelism(gather_dtype="bfloat16")
    )
    assert memory_per_device(recipe, 2) == {
        "shards": 2,
        "moment": "backward",
        "weights": 2 * 23_856,
        "gradients": 2 * 23_856,
        "optimizer": 4 * 23_856,
        # Weights and gradient outside the blocks; two blocks, and the gradient of one in bf16 and fp32.
        "gathered": 2 * 2 * 6_464 + 2 * 2 * 8_696 + (2 + 4) * 8_696,
        # Two inputs of 32 in fp32 and the rest of a block; gradients of 32 in fp32 and bf16, and of 44 in bf16; the
        # gradient of the last matrix in fp32, which is more than another of 44.
        "activations": 32 * (2 * 128 + (1408 - 128) + 128 + 64 + 88) + 4 * 44 * 32,
        "head": 0,
        "total": 367_408,
    }


def test_fp32_weights_are_gathered_whole() -> None:
    # There are no copies for fp32 products, and a single process gathers nothing.
    assert memory_per_device(tiny_recipe(precision=Precision("float32")), 1)["gathered"] == 0
    row = memory_per_device(tiny_recipe(precision=Precision("float32")), 2)
    assert (row["moment"], row["gathered"]) == ("backward", 4 * 2 * 6_464 + 4 * 2 * 8_696 + (4 + 4) * 8_696)
    # For bf16 products, the graph also holds copies of the matrices of both blocks.
    row = memory_per_device(tiny_recipe(), 2)
    assert row["gathered"] == 4 * 2 * 6_464 + 4 * 2 * 8_696 + (4 + 4) * 8_696 + 2 * 2 * 8_320


def test_masks_of_documents_take_memory() -> None:
    without, masked = (memory_per_device(tiny_recipe(data=Data(documents)), 1) for documents in (False, True))
    # A mask over 32 keys per token: one byte twice, and two bytes in each block.
    assert masked["activations"] - without["activations"] == 32 * (2 * 32 + 2 * 2 * 32)


def test_adapters_leave_out_the_gradient_of_the_head() -> None:
    row = memory_per_device(tiny_recipe(lora=LORA), 1)
    assert (row["moment"], row["gathered"]) == ("loss", 2 * 2 * 8_320)
    # Logits and probabilities, the head in bf16, hidden states and their gradient.
    assert row["head"] == 32 * 200 * (2 + 2) + 200 * 32 * 2 + 2 * 2 * 32 * 32


# Compared with measured memory

VARIANTS: list[tuple[dict[str, Any], Lora | None, bool]] = [
    ({}, None, False),
    ({}, None, True),
    ({}, LORA, False),
    ({}, Lora(rank=4, target_modules=("attn.c_proj", "c_fc2")), False),
    ({"position_embedding_type": "learned"}, None, False),
    ({"position_embedding_type": "learned"}, LORA, False),
    *(({"activation_function": name}, None, False) for name in ("gelu", "gelu_new", "relu", "silu")),
    ({"activation_function": "relu"}, LORA, False),
]


def network_of(recipe: Recipe) -> BTLMLMHeadModel:
    torch.manual_seed(0)
    network = BTLMLMHeadModel(recipe.config)
    if recipe.lora is not None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=recipe.lora.rank, target_modules=list(recipe.lora.target_modules), fan_in_fan_out=True)
        inject_adapter_in_model(config, network.requires_grad_(False))
    if recipe.precision.activation_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    network.train()
    return network


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("model", "lora", "documents"), VARIANTS)
def test_what_a_block_keeps(dtype: Any, model: dict[str, Any], lora: Lora | None, documents: bool) -> None:
    """Compare with the storages that autograd saves in a block, without weights and their casts; kernels may add 1%."""
    rows, length = 3, 24
    recipe = tiny_recipe(
        model | {"n_embd": 48, "n_head": 6},
        stages=[Stage(length, rows * length, rows * length)],
        lora=lora,
        precision=Precision(dtype),
        data=Data(documents),
    )
    network = network_of(recipe)
    adapters = sum(p.numel() for name, p in network.named_parameters() if "lora" in name)
    assert adapters == num_adapter_parameters(recipe, recipe.config)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    shapes = {shape for p in network.parameters() for shape in (p.shape, p.shape[::-1])}
    saved: dict[int, Any] = {}  # Holds the storages, so that no address is used twice.

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:
            saved[storage.data_ptr()] = storage
        return tensor

    totals = []
    block = network.transformer.h[1]
    block.register_forward_pre_hook(lambda *_: totals.append(sum(s.nbytes() for s in saved.values())))
    block.register_forward_hook(lambda *_: totals.append(sum(s.nbytes() for s in saved.values())))
    ids = torch.randint(0, 200, (rows, length))
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if documents else None
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        network.transformer(ids, attention_mask=mask, use_cache=False)
    measured = (totals[1] - totals[0]) / ids.numel()
    assert block_bytes_per_token(recipe, recipe.config) == pytest.approx(measured, rel=0.01)


def peak_bytes(recipe: Recipe) -> int:
    """Peak memory that torch allocates in a forward and backward pass, without weights and their gradients."""
    model = LossModel(network_of(recipe), getattr(torch, recipe.precision.dtype))
    length = recipe.stages[0].sequence_length
    ids = torch.randint(0, recipe.config.vocab_size, (recipe.micro_batch_tokens // length, length))
    documents = torch.zeros_like(ids) if recipe.data.mask_documents else None
    model(ids, documents).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(ids, documents).backward()
    held = most = 0
    assert profiled.profiler is not None
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("moment", "model", "tokens", "precision", "others"),
    [
        ("loss", {"vocab_size": 4000}, 512, Precision(), {}),
        ("loss", {"vocab_size": 4000}, 512, Precision(), {"lora": LORA}),
        ("loss", {"vocab_size": 4000}, 512, Precision("float32", activation_checkpointing=True), {}),
        ("loss", {}, 1024, Precision(), {"data": DOCUMENTS}),
        pytest.param(
            "backward", {}, 1024, Precision(activation_checkpointing=True), {"data": DOCUMENTS}, marks=pytest.mark.slow
        ),
        ("backward", {}, 2048, Precision("float32"), {}),
        pytest.param("backward", {}, 1024, Precision(activation_checkpointing=True), {}, marks=pytest.mark.slow),
        # Copies and gradients of weights take most of the memory.
        ("backward", WIDE, 64, Precision(), {}),
        ("backward", WIDE | {"vocab_size": 1000}, 64, Precision(activation_checkpointing=True), {}),
        ("backward", WIDE, 64, Precision("float32", activation_checkpointing=True), {}),
    ],
)
def test_peak_of_a_device(
    moment: str, model: dict[str, Any], tokens: int, precision: Precision, others: dict[str, Any]
) -> None:
    """Compare with the allocator's own count, within 4%, since workspaces and small temporaries are not counted."""
    length = min(tokens, 512)
    shape = {"n_positions": 512, "n_embd": 128, "n_layer": 6, "n_inner": 340}
    recipe = tiny_recipe(
        shape | model,
        stages=[Stage(length, tokens, tokens)],
        micro_batch_tokens=tokens,
        precision=precision,
        **others,
    )
    row = memory_per_device(recipe, 1)
    assert row["moment"] == moment
    assert row["gathered"] + row["activations"] + row["head"] == pytest.approx(peak_bytes(recipe), rel=0.04)
