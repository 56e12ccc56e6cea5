import math
from typing import Any

import pytest

from btlm.model.config_keys_btlm import (
    adopt_older_keys,
    alibi_scaling_problem,
    end_ids,
    missing_mup_keys,
    quantization_problem,
)

FIXED = {"type": "linear", "factor": 4.0}
DYNAMIC = {"type": "linear", "train_seq_len": 8192}
QUANTIZED = {"quant_method": "btlm", "bits": 4, "group_size": 64, "table_bits": 8}


@pytest.mark.parametrize(
    "value", [None, FIXED, DYNAMIC, {"type": "linear", "factor": 2}, {**FIXED, "train_seq_len": None}]
)
def test_valid_alibi_scaling(value: object) -> None:
    assert alibi_scaling_problem(value) is None


LINEAR = {"type": "linear"}


@pytest.mark.parametrize(
    "value",
    [
        {},
        LINEAR,
        "linear",
        4.0,
        True,
        ["linear", 4.0],
        {"factor": 4.0},
        {"train_seq_len": 8192},
        {"type": "dynamic", "factor": 4.0},
        {"type": None, "factor": 4.0},
        {**FIXED, **DYNAMIC},
        {**FIXED, "alpha": 1},
        {**DYNAMIC, "factor": 0},
        {**LINEAR, "factor": None},
        *({**LINEAR, "factor": factor} for factor in (1.0, 1, 0.5, 0, -2.0, True, "4.0", math.nan, math.inf, [4.0])),
        *({**LINEAR, "train_seq_len": length} for length in (1, 0, -8192, 8192.0, True, "8192", math.nan)),
    ],
    ids=repr,
)
def test_invalid_alibi_scaling(value: object) -> None:
    problem = alibi_scaling_problem(value)
    assert problem is not None
    assert repr(value) in problem
    assert "train_seq_len" in problem
    assert "factor" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"group_size": 128}, {"table_bits": 4}])
def test_valid_quantization(changes: dict[str, Any]) -> None:
    assert quantization_problem({**QUANTIZED, **changes}) is None


@pytest.mark.parametrize(
    "value",
    [
        8,
        "btlm",
        {},
        {**QUANTIZED, "quant_method": "gptq"},
        {**QUANTIZED, "bits": 3},
        {**QUANTIZED, "bits": True},
        {**QUANTIZED, "group_size": 0},
        {**QUANTIZED, "table_bits": None},
        {**QUANTIZED, "zero_point": 1},
        {key: value for key, value in QUANTIZED.items() if key != "bits"},
    ],
    ids=repr,
)
def test_invalid_quantization(value: object) -> None:
    problem = quantization_problem(value)
    assert problem is not None
    assert problem.startswith("quantization_config is ")
    assert "make the folder again with `btlm quantize`" in problem
    assert "older version" not in problem
    assert "\n" not in problem


def test_the_form_of_an_older_version_is_named() -> None:
    assert "older version" in (quantization_problem({"quant_method": "btlm", "bits": 8}) or "")


def test_older_spellings_are_replaced_and_other_keys_stay() -> None:
    older = {"n_embd": 8, "width_scale": 0.1, "output_logits_scale": 0.222, "scale_qk_dot_by_d": 1}
    current, problems = adopt_older_keys(older)
    assert problems == []
    assert current == {
        "n_embd": 8,
        "mup_width_scale": 0.1,
        "mup_output_alpha": pytest.approx(2.22),
        "mup_scale_qk_dot_by_d": True,
    }


def test_impossible_older_keys_are_named_all_at_once() -> None:
    _, problems = adopt_older_keys({"width_scale": "x", "scale_qk_dot_by_d": 3.7})
    assert problems == ["scale_qk_dot_by_d is 3.7, neither true nor false", "width_scale is 'x', not a number"]


def test_missing_mup_keys_are_named() -> None:
    assert missing_mup_keys({"width_scale": 0.1, "embeddings_scale": 14.6, "scale_qk_dot_by_d": True}) is None
    warning = missing_mup_keys({"mup_width_scale": 0.1, "mup_embeddings_scale": 14.6})
    assert "mup_output_alpha, mup_scale_qk_dot_by_d:" in (warning or "")


@pytest.mark.parametrize(("given", "ids"), [(None, set()), (7, {7}), ([7, 0], {7, 0}), ([], set())])
def test_end_ids(given: object, ids: set[int]) -> None:
    assert end_ids(given, 257) == ids


@pytest.mark.parametrize("given", ["end", 257, -1, True, 1.0, [7, 257], {"a": 1}])
def test_end_ids_that_are_no_tokens(given: object) -> None:
    with pytest.raises(ValueError, match="eos_token_id is ") as error:
        end_ids(given, 257)
    assert repr(given) in str(error.value)
    assert "\n" not in str(error.value)
