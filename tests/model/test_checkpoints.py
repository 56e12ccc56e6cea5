import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import btlm
from btlm.model import BTLMModel
from btlm.model.alibi import alibi_slopes
from tests.model.tiny import TINY, tiny_model, tokens

# Tensors of the released checkpoint for a model of two blocks; projections are [in, out].
WIDTH, INNER, VOCABULARY = TINY["n_embd"], TINY["n_inner"], TINY["vocab_size"]
BLOCK_SHAPES = {
    "ln_1.weight": (WIDTH,),
    "ln_1.bias": (WIDTH,),
    "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
    "attn.c_attn.bias": (3 * WIDTH,),
    "attn.c_proj.weight": (WIDTH, WIDTH),
    "attn.c_proj.bias": (WIDTH,),
    "ln_2.weight": (WIDTH,),
    "ln_2.bias": (WIDTH,),
    "mlp.c_fc.weight": (WIDTH, INNER),
    "mlp.c_fc.bias": (INNER,),
    "mlp.c_fc2.weight": (WIDTH, INNER),
    "mlp.c_fc2.bias": (INNER,),
    "mlp.c_proj.weight": (INNER, WIDTH),
    "mlp.c_proj.bias": (WIDTH,),
}
RELEASED_SHAPES = {
    "transformer.wte.weight": (VOCABULARY, WIDTH),
    "transformer.relative_pe.slopes": (TINY["n_head"],),
    "transformer.ln_f.weight": (WIDTH,),
    "transformer.ln_f.bias": (WIDTH,),
    "lm_head.weight": (VOCABULARY, WIDTH),
    **{f"transformer.h.{n}.{name}": shape for n in range(2) for name, shape in BLOCK_SHAPES.items()},
}

remote_code = pytest.mark.parametrize(
    "options", [{}, {"trust_remote_code": True}], ids=["no remote code", "remote code"]
)


@pytest.fixture
def model() -> Any:
    return tiny_model(n_layer=2)


def released_tensors() -> dict[str, Tensor]:
    """Tensors as in the release: in bf16, slopes included, under the released names."""
    torch.manual_seed(3)
    tensors = {name: (torch.randn(shape) * 0.3).to(torch.bfloat16) for name, shape in RELEASED_SHAPES.items()}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    tensors["transformer.relative_pe.slopes"] = alibi_slopes(TINY["n_head"]).to(torch.bfloat16)
    return tensors


def write_release(folder: Path, tensors: dict[str, Tensor], num_shards: int = 3) -> None:
    """A folder of `.bin` shards with an index, and the configuration of the release."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    files = {name: f"pytorch_model-{1 + n % num_shards:05}-of-{num_shards:05}.bin" for n, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {
        **TINY,
        "n_layer": 2,
        "model_type": "btlm",
        "architectures": ["BTLMLMHeadModel"],
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    assert type(model) is btlm.BTLMLMHeadModel
    assert not model.training
    return model, info


def assert_all_loaded(info: dict[str, Any]) -> None:
    assert [list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [[], [], []]


# Saving and loading again


def test_tensor_names_and_layout_are_the_released_ones(model: Any) -> None:
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == RELEASED_SHAPES
    assert "transformer.relative_pe.slopes" not in dict(model.named_parameters())


@remote_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "variant", [{}, {"tie_word_embeddings": False}, {"alibi_scaling": {"type": "linear", "factor": 2.0}}], ids=repr
)
@torch.no_grad()
def test_round_trip(options: dict[str, Any], dtype: torch.dtype, variant: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**variant).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, dtype="auto", **options)
    assert_all_loaded(info)
    assert loaded.dtype == dtype
    assert loaded.config.alibi_scaling == model.config.alibi_scaling
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tied = variant.get("tie_word_embeddings", True)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    input_ids = tokens(2, 20)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_saved_file_holds_the_released_names(model: Any, tmp_path: Path) -> None:
    """A tied head is stored only once; the original code ties it again when it loads."""
    model.save_pretrained(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {name: shape for name, shape in RELEASED_SHAPES.items() if name != "lm_head.weight"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "btlm"
    assert written["architectures"] == ["BTLMLMHeadModel"]
    assert written.items() >= {key: value for key, value in TINY.items() if key.startswith("mup_")}.items()


@torch.no_grad()
def test_sharded_round_trip(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, info = load(tmp_path)
    assert_all_loaded(info)
    assert torch.equal(loaded(tokens(2, 20)).logits, model(tokens(2, 20)).logits)


@torch.no_grad()
def test_model_without_head(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(base) is BTLMModel
    hidden = model.transformer(tokens(2, 20)).last_hidden_state
    assert torch.equal(base(tokens(2, 20)).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    headed, _ = load(tmp_path / "base")
    assert torch.equal(headed(tokens(2, 20)).logits, model(tokens(2, 20)).logits)


def test_auto_classes_know_the_model(tmp_path: Path, model: Any) -> None:
    assert type(AutoConfig.for_model("btlm")) is btlm.BTLMConfig
    assert type(AutoModelForCausalLM.from_config(model.config)) is btlm.BTLMLMHeadModel
    assert type(AutoModel.from_config(model.config)) is btlm.BTLMModel


# Folders that other programs wrote


@remote_code
@torch.no_grad()
def test_released_shards_load(options: dict[str, Any], tmp_path: Path) -> None:
    tensors = released_tensors()
    write_release(tmp_path, tensors)
    loaded, info = load(tmp_path, dtype="auto", **options)
    assert_all_loaded(info)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@torch.no_grad()
def test_released_weights_in_fp32_give_the_logits_of_the_same_model(model: Any, tmp_path: Path) -> None:
    tensors = released_tensors()
    write_release(tmp_path, tensors, num_shards=2)
    loaded, _ = load(tmp_path, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    assert torch.equal(loaded(tokens(2, 20)).logits, model(tokens(2, 20)).logits)


@torch.no_grad()
def test_slopes_of_the_checkpoint_do_not_change_logits(tmp_path: Path) -> None:
    """The release stores slopes rounded to bf16, and some converted checkpoints leave them out."""
    exact = {**released_tensors(), "transformer.relative_pe.slopes": alibi_slopes(TINY["n_head"])}
    rounded = released_tensors()
    assert not torch.equal(rounded["transformer.relative_pe.slopes"].float(), exact["transformer.relative_pe.slopes"])
    absent = {name: tensor for name, tensor in rounded.items() if not name.endswith("slopes")}
    logits = []
    for name, tensors in {"exact": exact, "rounded": rounded, "absent": absent}.items():
        write_release(tmp_path / name, tensors)
        loaded, info = load(tmp_path / name, dtype=torch.float32)
        assert_all_loaded(info)
        logits.append(loaded(tokens(2, 60)).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    torch.testing.assert_close(loaded.transformer.relative_pe.slopes, alibi_slopes(TINY["n_head"]))


@torch.no_grad()
def test_causality_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    tensors = released_tensors()
    write_release(tmp_path / "plain", tensors)
    for block in range(2):
        tensors[f"transformer.h.{block}.attn.bias"] = torch.ones(64, 64).tril().bool()[None, None]
        tensors[f"transformer.h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    write_release(tmp_path / "old", tensors)
    plain, _ = load(tmp_path / "plain")
    old, info = load(tmp_path / "old")
    assert_all_loaded(info)
    assert torch.equal(old(tokens(2, 20)).logits, plain(tokens(2, 20)).logits)


def test_missing_and_foreign_tensors_are_reported(tmp_path: Path) -> None:
    """Only missing and unknown tensors that are known to be harmless are ignored."""
    tensors = released_tensors()
    del tensors["transformer.h.1.mlp.c_fc2.bias"]
    tensors["transformer.h.1.mlp.c_fc3.bias"] = torch.zeros(3)
    write_release(tmp_path, tensors)
    _, info = load(tmp_path)
    assert list(info["missing_keys"]) == ["transformer.h.1.mlp.c_fc2.bias"]
    assert list(info["unexpected_keys"]) == ["transformer.h.1.mlp.c_fc3.bias"]


@torch.no_grad()
def test_missing_tensor_is_initialized_by_the_mup_table(tmp_path: Path) -> None:
    tensors = released_tensors()
    del tensors["transformer.h.1.mlp.c_proj.weight"]
    write_release(tmp_path, tensors)
    torch.manual_seed(0)
    loaded, _ = load(tmp_path, dtype=torch.float32)
    std = TINY["initializer_range"] * (TINY["mup_width_scale"] / (2 * 2)) ** 0.5
    assert loaded.transformer.h[1].mlp.c_proj.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_is_chosen_when_loading(attention: str, tmp_path: Path) -> None:
    write_release(tmp_path, released_tensors())
    loaded, _ = load(tmp_path, attn_implementation=attention)
    assert loaded.config._attn_implementation == attention


@torch.no_grad()
def test_context_is_extended_by_a_keyword(tmp_path: Path) -> None:
    write_release(tmp_path, released_tensors())
    scaling = {"type": "linear", "train_seq_len": 16}
    extended, _ = load(tmp_path, dtype=torch.float32, alibi_scaling=scaling, n_positions=128)
    plain, _ = load(tmp_path, dtype=torch.float32)
    assert extended.config.alibi_scaling == scaling
    assert torch.equal(extended(tokens(1, 16)).logits, plain(tokens(1, 16)).logits)
    assert not torch.allclose(extended(tokens(1, 32)).logits, plain(tokens(1, 32)).logits, atol=0.01)
