import math
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.model.architecture_btlm import MUP_TABLE
from btlm.model.modeling_btlm import BTLMBlock
from btlm.model.mup import init_weights, mup_param_groups, name_layers
from tests.model.tiny import TINY, tiny_config, tiny_model

# BTLM-3B's initialization, width and depth, with a small vocabulary, which is quick to draw.
BTLM_3B = BTLMConfig(
    vocab_size=1000,
    n_embd=2560,
    n_layer=32,
    n_head=32,
    n_inner=6826,
    activation_function="swiglu",
    position_embedding_type="alibi",
    initializer_range=0.073,
    mup_width_scale=0.1,
    mup_embeddings_scale=14.6,
    mup_output_alpha=2.22,
    mup_scale_qk_dot_by_d=True,
)
STD = {
    "wte": 0.073,
    "attn.c_attn": 0.0230846,
    "mlp.c_fc": 0.0230846,
    "mlp.c_fc2": 0.0230846,
    "attn.c_proj": 0.00288558,
    "mlp.c_proj": 0.00288558,
}


@pytest.fixture(scope="module")
def block() -> nn.Module:
    """The token table and one of the 32 blocks of BTLM-3B, initialized as in the model."""
    torch.manual_seed(0)
    with torch.device("meta"):
        modules = nn.ModuleDict({"wte": nn.Embedding(BTLM_3B.vocab_size, BTLM_3B.n_embd), "h": BTLMBlock(BTLM_3B, 0)})
    name_layers(modules)
    modules.to_empty(device="cpu")
    for module in modules.modules():
        init_weights(module, BTLM_3B)
    return modules


@pytest.mark.parametrize("name", STD)
def test_initial_weights_at_width_2560(name: str, block: nn.Module) -> None:
    weight = block.get_submodule(name if name == "wte" else f"h.{name}").weight
    assert isinstance(weight, Tensor)
    exact = BTLM_3B.architecture.init_std(MUP_TABLE[name.rpartition(".")[2]])
    assert exact == pytest.approx(STD[name], rel=1e-5)
    sampled_std = exact / 0.8796256610342398  # before truncation at two of these deviations
    assert weight.std().item() == pytest.approx(STD[name], rel=0.01)
    assert weight.mean().abs().item() < 0.01 * STD[name]
    assert 1.99 * sampled_std < weight.abs().max().item() <= 2 * sampled_std * (1 + 1e-6)
    # The share within one sampling deviation shows that it is a truncated normal and no other distribution.
    one, two = math.erf(1 / math.sqrt(2)), math.erf(2 / math.sqrt(2))
    assert (weight.abs() < sampled_std).float().mean().item() == pytest.approx(one / two, abs=2e-3)


def test_initial_biases_and_norms(block: nn.Module) -> None:
    seen = 0
    for name, parameter in block.named_parameters():
        if parameter.ndim == 1:
            seen += 1
            is_norm_weight = ".ln_" in name and name.endswith("weight")
            assert (parameter == (1.0 if is_norm_weight else 0.0)).all(), name
    assert seen == 9


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["alibi", "learned"])
def test_a_whole_model_is_initialized_by_the_table(tied: bool, positions: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        n_embd=192, n_inner=512, vocab_size=500, tie_word_embeddings=tied, position_embedding_type=positions
    )
    model = BTLMLMHeadModel(config)
    hidden = config.initializer_range * config.mup_width_scale**0.5
    residual = hidden / (2 * config.n_layer) ** 0.5
    expected = {"wte": config.initializer_range, "wpe": config.initializer_range, "lm_head": config.initializer_range}
    expected |= {"c_attn": hidden, "c_fc": hidden, "c_fc2": hidden, "c_proj": residual}
    for name, parameter in model.named_parameters():
        layer, kind = name.split(".")[-2:]
        if layer in expected and kind == "weight":
            assert parameter.std().item() == pytest.approx(expected[layer], rel=0.02), name
        else:
            assert (parameter == (1.0 if kind == "weight" else 0.0)).all(), name
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


def test_standard_parametrization_is_gpt2s() -> None:
    config = BTLMConfig()
    std = {layer: config.architecture.init_std(row) for layer, row in MUP_TABLE.items()}
    assert std["wte"] == std["c_attn"] == std["c_fc"] == 0.02
    assert std["c_proj"] == pytest.approx(0.02 / math.sqrt(2 * 12))


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": False},
        {"position_embedding_type": "learned"},
        {"activation_function": "gelu_new"},
    ],
    ids=repr,
)
@pytest.mark.parametrize("decoupled", [True, False])
def test_parameter_groups(variant: dict[str, object], decoupled: bool) -> None:
    model = tiny_model(**variant)
    groups = model.get_mup_param_groups(lr=2e-3, weight_decay=0.1, decoupled_wd=decoupled)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {group["name"]: sorted(names[id(parameter)] for parameter in group["params"]) for group in groups}
    assert sorted(chain(*members.values())) == sorted(names.values()), "each parameter once, the tied one too"

    tables = [name for name in names.values() if name.split(".")[-2] in ("wte", "wpe", "lm_head")]
    vectors = [name for name in names.values() if name.endswith("bias") or ".ln_" in name]
    assert members["embeddings"] == sorted(tables)
    assert members["biases_and_norms"] == sorted(vectors)

    width_scale = TINY["mup_width_scale"]
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "matrices": (pytest.approx(2e-3 * width_scale), pytest.approx(0.1 if decoupled else 0.1 / width_scale)),
        "embeddings": (2e-3, 0.1),
        "biases_and_norms": (2e-3, 0.0),
    }


def test_optimizer_of_the_model_card() -> None:
    model = tiny_model()
    param_groups = model.get_mup_param_groups(lr=1e-3, weight_decay=0.1)
    optimizer = torch.optim.AdamW(param_groups, betas=(0.9, 0.95), eps=1e-8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step equals the learning rate of the group for any gradient, plus the weight decay.
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "wte" not in name
        lr = 1e-3 * (TINY["mup_width_scale"] if matrix else 1.0)
        decay = 0.1 if parameter.ndim == 2 else 0.0
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - lr * decay) - lr, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"lr \(-1\)"):
        model.get_mup_param_groups(lr=-1)
    with pytest.raises(ValueError, match=r"weight_decay \(-0.1\)"):
        model.get_mup_param_groups(lr=1, weight_decay=-0.1)
    model.transformer.h[0].adapter = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.adapter\.weight has no row in the muP table"):
        model.get_mup_param_groups(lr=1)


def test_frozen_and_renamed_parents_do_not_matter() -> None:
    """Wrappers put prefixes before the names; only the last part decides the row of the table."""
    model = tiny_model()
    wrapped = [(f"module.base.{name}", parameter) for name, parameter in model.named_parameters()]
    ours = mup_param_groups(wrapped, model.config, lr=1e-3)
    direct = model.get_mup_param_groups(lr=1e-3)
    for wrapped_group, group in zip(ours, direct, strict=True):
        assert [id(parameter) for parameter in wrapped_group["params"]] == [id(p) for p in group["params"]]
