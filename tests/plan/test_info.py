import json
import math
from pathlib import Path

import pytest

from btlm.checkpoint import BUNDLED_MODEL
from btlm.model import BTLMConfig
from btlm.plan.info import model_info, run_info
from tests.checkpoint.tiny import TINY, set_config

BTLM_3B = Path(__file__).parents[2] / "recipes/btlm-3b.yaml"


def info_of(capsys, model):
    run_info(model, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_numbers_of_btlm_3b(capsys):
    info = info_of(capsys, BTLM_3B)
    # Counted from the tensors of the released configuration; the cache is computed by hand.
    assert info["parameters"] == {"total": 2_646_255_744, "without_embeddings": 2_517_597_824}
    assert info["architecture"] == {
        "layers": 32,
        "width": 2560,
        "heads": 32,
        "head_dim": 80,
        "feed_forward": 6826,
        "activation": "swiglu",
        "vocabulary": 50257,
        "tied_embeddings": True,
        "positions": 8192,
        "position_embedding": "alibi",
        "alibi_scaling": None,
    }
    assert info["kv_cache_bytes"] == {"per_token": 32 * 2 * 2560 * 2, "at_n_positions": 32 * 2 * 2560 * 2 * 8192}
    total = 2_646_255_744
    assert info["weight_bytes"] == {"fp32": 4 * total, "bf16": 2 * total, "int8": total, "int4": total / 2}


def test_mup_of_btlm_3b(capsys):
    mup = info_of(capsys, BTLM_3B)["mup"]
    multipliers = [mup[f"{tensor}_multiplier"] for tensor in ("embeddings", "scores", "logits")]
    assert multipliers == pytest.approx([14.6, 1 / 80, 0.222])
    rows = {name: row for row in mup["tensors"] for name in row["layers"]}
    assert list(rows) == ["wte", "c_attn", "c_fc", "c_fc2", "c_proj", "biases", "norms"]
    assert [round(rows[name]["init_std"], 8) for name in ("wte", "c_attn", "c_proj")] == [0.073, 0.02308463, 0.00288558]
    assert [rows[name]["lr_multiplier"] for name in rows] == pytest.approx([1, 0.1, 0.1, 0.1, 0.1, 1, 1])
    assert [rows[name]["weight_decay"] for name in rows] == [True] * 5 + [False] * 2


def test_training_compute_of_btlm_3b(capsys):
    at_2048, at_8192 = info_of(capsys, BTLM_3B)["flops_per_token"]
    assert (at_2048["context"], at_8192["context"]) == (2048, 8192)
    assert at_2048["training"] == 3 * at_2048["forward"]
    # 470.8 and 156.9 billion tokens: 9.97e21 FLOPs by 6 N D, plus attention.
    total = 470.8e9 * at_2048["training"] + 156.9e9 * at_8192["training"]
    assert total == pytest.approx(1.11e22, rel=0.005)


def test_a_checkpoint_needs_no_weights(copy, capsys):
    (copy / "model.safetensors").unlink()
    assert info_of(capsys, copy)["architecture"]["width"] == TINY["n_embd"]


def test_rows_follow_the_architecture():
    config = BTLMConfig(**{**TINY, "tie_word_embeddings": False, "activation_function": "gelu_new"})
    assert [row["layers"] for row in model_info(config)["mup"]["tensors"]] == [
        ["wte", "lm_head"],
        ["c_attn", "c_fc"],
        ["c_proj"],
        ["biases", "norms"],
    ]
    learned = model_info(BTLMConfig(**{**TINY, "position_embedding_type": "learned"}))
    assert learned["mup"]["tensors"][0]["layers"] == ["wte", "wpe"]
    assert [row["context"] for row in learned["flops_per_token"]] == [64]


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"type": "linear", "train_seq_len": 64}])
def test_tables_fit_80_columns_and_hold_the_numbers(copy, capsys, monkeypatch, scaling):
    monkeypatch.setenv("COLUMNS", "80")
    set_config(copy, alibi_scaling=scaling)
    run_info(copy)
    tables = capsys.readouterr().out
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    for part in ("copy", "24,112 parameters", "15,888 without", "SwiGLU", "ALiBi, interpolated", "tied to the head"):
        assert part in tables
    run_info(BTLM_3B)
    tables = capsys.readouterr().out
    assert max(map(len, tables.splitlines())) <= 80
    for part in (
        "btlm-3b.yaml",
        "2,646,255,744",
        "of 80 dimensions",
        "0.02308",
        "5.29 GB",
        "2.68 GB",
        "328 kB",
        "16.9 G",
    ):
        assert part in tables


def test_json_is_finite_and_complete(capsys, checkpoint):
    info = info_of(capsys, checkpoint)
    keys = {"architecture", "mup", "parameters", "flops_per_token", "kv_cache_bytes", "weight_bytes", "quantization"}
    assert set(info) == keys
    numbers = [*info["parameters"].values(), *info["weight_bytes"].values(), *info["kv_cache_bytes"].values()]
    assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_a_folder_shows_the_bytes_of_its_files(capsys, copy):
    info = info_of(capsys, BUNDLED_MODEL)
    size = (BUNDLED_MODEL / "model.safetensors").stat().st_size
    assert info["weight_bytes"]["stored"] == size
    assert (info["quantization"]["bits"], info["quantization"]["table_bits"]) == (4, 8)
    run_info(BUNDLED_MODEL)
    tables = capsys.readouterr().out
    assert f"files of the weights: {size / 1e6:.1f} MB (blocks in 4 bits, table in 8, scales)" in tables
    assert max(map(len, tables.splitlines())) <= 80
    run_info(copy)
    assert "files of the weights: 9" in capsys.readouterr().out
    (copy / "model.safetensors").unlink()
    assert "stored" not in info_of(capsys, copy)["weight_bytes"]


@pytest.mark.parametrize("name", ["absent.yaml", "recipe.yml"])
def test_a_recipe_that_is_none(tmp_path, name):
    (tmp_path / "recipe.yml").write_text("model: {n_embd: 5}\n")
    with pytest.raises(ValueError, match=name) as error:
        run_info(tmp_path / name)
    assert "\n" not in str(error.value)
