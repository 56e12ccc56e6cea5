import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensor_file import MappedTensor
from btlm.cli import main
from btlm.convert.quantize import quantize
from btlm.engine import Engine, GenerationOptions
from btlm.engine.network import weight_dtype
from btlm.errors import LogitsNotFinite, NotSupported
from tests.checkpoint.tiny import change_tensors, save_tiny, set_config, tiny_model

TABLE = "transformer.wte.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_plain_weights_is_that_of_the_token_table(tmp_path, dtype):
    tiny_model().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tensors = Checkpoint.open(tmp_path).tensors
    assert weight_dtype(Checkpoint.open(tmp_path).architecture, tensors) == dtype
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert weight_dtype(Checkpoint.open(tmp_path).architecture, bare) == dtype


@pytest.mark.parametrize("dtype", ["F64", "I8", "F8_E4M3", "U8"])
def test_a_dtype_that_the_engine_cannot_read_is_never_taken_for_another(checkpoint, dtype):
    tensors = {TABLE: MappedTensor(dtype, np.zeros(8, np.uint8))}
    with pytest.raises(NotSupported, match=f"{TABLE} is stored as {dtype}"):
        weight_dtype(Checkpoint.open(checkpoint).architecture, tensors)


def test_weights_without_a_token_table(checkpoint):
    with pytest.raises(ValueError, match=f"lack {TABLE}"):
        weight_dtype(Checkpoint.open(checkpoint).architecture, {})


# Numbers that are not finite


def spoil(folder, name, value, dtype=None):
    """Put a value into one place of a tensor."""

    def change(tensors):
        if dtype is not None:
            tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        tensors[name].view(-1)[7] = value
        return tensors

    change_tensors(folder, change)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.bias",
        "transformer.h.1.mlp.c_fc2.weight",
        "transformer.ln_f.bias",
    ],
)
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_a_weight_that_is_not_finite_is_named(copy, kernels, dtype, name, cache_dtype):
    spoil(copy, name, torch.nan, dtype)
    engine = Engine.open(copy, context=160, kernels=kernels, cache_dtype=cache_dtype)
    for use in (lambda: list(engine.generate([5, 9, 200])), lambda: engine.score([5, 9, 200])):
        with pytest.raises(LogitsNotFinite, match=f"{name} holds NaN or infinity.*get the weights again") as error:
            use()
        assert "\n" not in str(error.value)
    assert engine.has_room


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("module", ["transformer.wte", "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"])
def test_so_is_a_scale_of_packed_weights(tmp_path, kernels, bits, module):
    """Activations are rounded to integers, which cannot hold NaN."""
    quantize(save_tiny(tmp_path / "plain", n_embd=64), tmp_path / "packed", bits=bits, group_size=64)
    spoil(tmp_path / "packed", f"{module}.weight_scale", torch.inf)
    engine = Engine.open(tmp_path / "packed", context=160, kernels=kernels)
    with pytest.raises(LogitsNotFinite, match=rf"{module}\.weight_scale holds NaN or infinity"):
        list(engine.generate([5, 9, 200]))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_one_text_fails_and_the_others_go_on(tmp_path, kernels):
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"][7] = 3e38  # finite, but not times the factor of embeddings
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, mup_embeddings_scale=10.0)
    options = GenerationOptions(max_new_tokens=20)
    good = [[5, 9, 200], [31, 6, 8, 100]]
    alone = Engine.open(folder, context=64, kernels=kernels)
    expected = [list(alone.generate(ids, options, stop_ids=frozenset({7}))) for ids in good]
    engine = Engine.open(folder, context=64, kernels=kernels, num_requests=3)
    first = engine.add(good[0], options, stop_ids=frozenset({7}))
    engine.step()
    bad = engine.add([5, 9, 7], options)
    second = engine.add(good[1], options, stop_ids=frozenset({7}))
    while first.finished is None or second.finished is None:
        engine.step()
    assert bad.finished == "error"
    assert "activations for this text are not finite" in str(bad.error)
    assert bad.tokens == []
    tokens = [first.tokens, second.tokens]
    assert [[token.id for token in one] for one in tokens] == [[token.id for token in one] for one in expected]
    assert kernels == "torch" or tokens == expected  # torch's sums depend on the batch
    with pytest.raises(LogitsNotFinite, match="though the weights are"):
        engine.score([5, 7, 9])
    again = list(engine.generate(good[0], options, stop_ids=frozenset({7})))
    assert [token.id for token in again] == [token.id for token in expected[0]]


def test_the_command_line_ends_the_text_in_one_line(copy, capsys):
    spoil(copy, "transformer.h.1.mlp.c_proj.weight", torch.nan)
    assert main(["generate", "--model", str(copy), "--max-new-tokens", "4", "ab"]) == 2
    told = capsys.readouterr()
    assert told.out == "ab\n"
    assert told.err.splitlines()[-1].startswith("btlm: error: transformer.h.1.mlp.c_proj.weight holds NaN")
