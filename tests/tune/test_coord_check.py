import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from btlm.model import BTLMConfig
from btlm.model.alibi import alibi_slopes
from btlm.settings import to_yaml
from btlm.train.recipe import Optimizer
from btlm.train.recipe_file import load_recipe
from btlm.tune import coord_check, coord_models
from btlm.tune.coord_check import run_coord_check
from btlm.tune.coord_slopes import PREDICTIONS, Coordinates, draw_batches, fit_slopes, measure
from btlm.tune.options import ABLATIONS, CoordCheck
from tests.train.tiny import tiny_recipe, tiny_shards

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = CoordCheck(widths=(32, 64, 128), steps=2, seeds=2)

# For each ablation: the activations that reveal it, the moment, and the distance of their slope from the prediction in
# the limit of infinite width. It is 1/2 if a sum of random terms has the wrong size, and 1 if a sum of aligned terms
# has (arXiv 2203.03466, appendix J). The tests require half of it.
TOLD_BY = {
    "hidden-init": [("queries, keys, values", "initial", 0.5), ("MLP inner", "initial", 0.5)],
    "residual-init": [("attention output", "initial", 0.5), ("MLP output", "initial", 0.5)],
    "matrix-lr": [("queries, keys, values", "change", 1.0), ("residual stream", "change", 1.0)],
    "scores": [("scores", "initial", 0.5)],
    "logits": [("logits", "initial", 0.5), ("logits", "change", 1.0)],
    "embedding-init": [("embeddings", "initial", -0.5)],
    "embedding-multiplier": [("embeddings", "initial", -0.5)],
    "embedding-lr": [("embeddings", "change", -1.0)],
    "bias-lr": [("biases and norms", "change", -1.0)],
}


def slopes_of(check, config=None, optimizer=None):
    """Slopes by quantity and moment."""
    config = config or BTLMConfig(**coord_check._BTLM)
    slopes = fit_slopes(check, measure(check, config, optimizer or Optimizer(lr=0.012), draw_batches(check), "cpu"))
    return {(slope.quantity, slope.moment): slope for slope in slopes}


def excess(slope):
    """Signed distance of a slope from its predicted range."""
    low, high = slope.predicted
    return slope.value - min(max(slope.value, low), high)


def failures(slopes):
    return {key for key, slope in slopes.items() if not slope.passes}


# The verdict


def test_mup_passes():
    assert failures(slopes_of(SMALL)) == set()


@pytest.mark.parametrize("ablate", ABLATIONS)
def test_every_missing_row_fails_where_it_acts(ablate):
    slopes = slopes_of(replace(SMALL, ablate=ablate))
    for quantity, moment, expected in TOLD_BY[ablate]:
        assert (quantity, moment) in failures(slopes)
        assert excess(slopes[quantity, moment]) / expected > 0.5


def test_standard_parametrization_fails():
    standard = BTLMConfig(n_embd=256, n_head=4, initializer_range=0.02)
    assert len(failures(slopes_of(SMALL, standard, Optimizer(lr=3e-3)))) > 10
    # It is muP without everything that scales with the width.
    assert len(failures(slopes_of(replace(SMALL, ablate="all")))) > 10


@pytest.mark.parametrize("name", ["btlm-3b", "btlm-tiny", "btlm-proxy-40m"])
def test_the_recipes_pass(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert failures(slopes_of(SMALL, recipe.config, recipe.optimizer)) == set()


@pytest.mark.parametrize(
    "other",
    [
        {"activation_function": "gelu_new"},
        {"position_embedding_type": "learned"},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_other_models_of_the_family_pass(other):
    assert failures(slopes_of(SMALL, BTLMConfig(**coord_check._BTLM | other))) == set()


@pytest.mark.slow
def test_mup_passes_with_a_margin():
    slopes = slopes_of(CoordCheck(widths=(64, 128, 256, 512)))
    assert max(abs(excess(slope)) for slope in slopes.values()) < 0.12  # measured: 0.08


@pytest.mark.slow
@pytest.mark.parametrize("ablate", ABLATIONS)
def test_every_missing_row_fails_with_a_margin(ablate):
    slopes = slopes_of(CoordCheck(widths=(64, 128, 256, 512), ablate=ablate))
    told_by = [*TOLD_BY[ablate], *([("scores", "change", 0.5)] if ablate == "scores" else [])]
    for quantity, moment, _ in told_by:
        assert abs(excess(slopes[quantity, moment])) > 0.37  # measured: 0.39 for the change of scores, 0.5 else


# Measuring


@pytest.mark.parametrize("ablate", sorted({*ABLATIONS} - {"scores"}))
def test_nothing_is_missing_at_base_width(ablate):
    check = CoordCheck(widths=(64, 128), steps=1, seeds=1)
    config = BTLMConfig(**coord_check._BTLM | {"n_embd": 64, "n_inner": 171})
    batches = draw_batches(check)
    full, ablated = (measure(c, config, Optimizer(lr=0.01), batches) for c in (check, replace(check, ablate=ablate)))
    for name in PREDICTIONS:
        assert full.change[name][0] == pytest.approx(ablated.change[name][0], rel=1e-6)
    moved = max(abs(np.log(full.change[name][1] / ablated.change[name][1])).max() for name in PREDICTIONS)
    assert moved > 0.1


def test_sizes_at_initialization_are_those_of_the_table():
    check = CoordCheck(widths=(64, 128), steps=1, seeds=1)
    initial = measure(check, BTLMConfig(**coord_check._BTLM), Optimizer(lr=0.01), draw_batches(check)).initial
    for i, width in enumerate(check.widths):
        std = 0.073 * math.sqrt(256 / width)
        assert initial["embedding weights"][i, 0] == pytest.approx(0.073, rel=0.03)
        assert initial["embeddings"][i, 0] == pytest.approx(14.6 * 0.073, rel=0.05)
        assert initial["c_attn, c_fc, c_fc2"][i, 0] == pytest.approx(std, rel=0.03)
        assert initial["c_proj"][i, 0] == pytest.approx(std / 2, rel=0.03)  # sqrt(2 n_layer) = 2
        # LayerNorm's output has a root mean square of 1.
        assert initial["queries, keys, values"][i, 0] == pytest.approx(std * math.sqrt(width), rel=0.05)


def test_scores_are_those_that_attention_takes():
    check = CoordCheck(widths=(32, 64), heads=2)
    model = coord_models.build_model(check, BTLMConfig(**coord_check._BTLM), 32, 32)
    input_ids = torch.from_numpy(draw_batches(check)[0])
    scores = coord_models.observe(model, input_ids)["scores"]
    length = input_ids.shape[1]
    visible_QK = torch.ones(length, length, dtype=torch.bool).tril()
    distance_QK = (torch.arange(length)[:, None] - torch.arange(length)).float()
    attentions = model(input_ids, use_cache=False, output_attentions=True).attentions
    for block, probabilities in zip(scores, attentions, strict=True):
        full = torch.full((*block.shape[:2], length, length), -torch.inf)
        full[..., visible_QK] = block
        biased = full - alibi_slopes(2)[:, None, None] * distance_QK
        torch.testing.assert_close(biased.softmax(-1), probabilities)


def test_changes_are_against_initialization():
    check = CoordCheck(widths=(32, 64), steps=3, seeds=1)
    change = measure(check, BTLMConfig(**coord_check._BTLM), Optimizer(lr=0.01, weight_decay=0.0), draw_batches(check))
    # Adam's first step has the size of the learning rate, a tenth of the recipe's, for any gradient; the next steps
    # have the same direction.
    first, _, third = change.change["embedding weights"][0, 0]
    assert first == pytest.approx(0.001, rel=0.02)
    assert 0.002 < third < 0.003
    assert change.change["c_proj"][:, 0, 0] == pytest.approx([0.008, 0.004], rel=0.02)


def test_dropout_and_interpolation_of_a_recipe_are_left_out():
    check = CoordCheck(widths=(32, 64), heads=2)
    others: dict[str, Any] = {"alibi_scaling": {"type": "linear", "factor": 2.0}, "n_positions": 4096, "n_layer": 7}
    others |= {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3, "n_inner": 512}
    config = coord_models.build_model(check, BTLMConfig(**coord_check._BTLM | others), 64, 50).config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop, config.alibi_scaling) == (0.0, 0.0, 0.0, None)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_inner) == (64, 2, 2, 128)
    assert (config.vocab_size, config.n_positions, config.mup_width_scale) == (50, 32, 4.0)


def test_the_random_state_stays():
    check = CoordCheck(widths=(16, 32), steps=1, seeds=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure(check, BTLMConfig(**coord_check._BTLM), Optimizer(lr=0.01), draw_batches(check))
    assert torch.equal(torch.get_rng_state(), before)


def test_slopes_are_powers_of_the_width():
    check = CoordCheck(widths=(10, 100, 1000), seeds=3, steps=2)
    widths = np.array(check.widths, dtype=float)[:, None]
    noise = np.array([1.0, 2.0, 4.0])  # A factor per seed does not change slopes,
    tilt = widths ** np.array([-0.1, 0.0, 0.1])  # and different slopes per seed give the error 0.1 / sqrt(3).
    initial = dict.fromkeys(PREDICTIONS, 3 * widths**-0.5 * noise * tilt)
    change = dict.fromkeys(PREDICTIONS, np.stack([widths**0.2 * noise, 7 * widths**0.4 * noise], axis=2))
    slopes = {(s.quantity, s.moment): s for s in fit_slopes(check, Coordinates(initial, change))}
    assert slopes["scores", "initial"].value == pytest.approx(-0.5)
    assert slopes["scores", "initial"].error == pytest.approx(0.1 / math.sqrt(3))
    assert slopes["scores", "initial"].passes
    assert not slopes["embeddings", "initial"].passes
    assert slopes["embeddings", "change"].value == pytest.approx(0.3)  # the mean of the steps
    assert not slopes["embeddings", "change"].passes
    assert slopes["embeddings", "change"].error == pytest.approx(0)


def test_a_run_that_is_not_finite_fails():
    slopes = slopes_of(CoordCheck(widths=(16, 32), steps=2, seeds=1), optimizer=Optimizer(lr=1e30))
    assert not slopes["logits", "change"].passes


def test_batches_come_from_shards(tmp_path):
    check = CoordCheck(seeds=2, rows=3, row_length=16)
    shards = tiny_shards(tmp_path / "shards")
    stream = shards.tokens("train", 0, shards.num_tokens("train")).tolist()
    batches = draw_batches(check, shards)
    assert [batch.shape for batch in batches] == [(3, 16), (3, 16)]
    for batch in batches:
        flat = batch.ravel().tolist()
        assert set(flat) == set(range(max(flat) + 1))

        def same_pattern(start, flat=flat):
            return len({*zip(flat, stream[start : start + 48], strict=True)}) == len(set(flat))

        assert any(map(same_pattern, range(len(stream) - 47)))
    assert batches[0].tolist() != batches[1].tolist()


# The command


def test_the_command_writes_a_report(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(tiny_recipe()))
    small = CoordCheck(widths=(32, 64, 128), steps=2, seeds=1)
    tiny_shards(tmp_path / "shards")
    assert run_coord_check(path, small, tmp_path / "shards", tmp_path / "out", "cpu")
    shown = capsys.readouterr().err
    assert "All slopes are as muP predicts" in shown
    assert (tmp_path / "out/coord-check.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "out/coord-check.json").read_text())
    assert np.shape(report["change"]["logits"]) == (3, 1, 2)
    assert {slope["quantity"] for slope in report["slopes"]} == set(PREDICTIONS)
    assert all(slope["passes"] for slope in report["slopes"])

    assert not run_coord_check(path, replace(small, ablate="logits"), output=tmp_path / "out", device="cpu")
    shown = capsys.readouterr().err
    assert "Some slopes are not" in shown
    failed = [row for row in shown.splitlines() if "✗" in row and "muP's" not in row]
    assert [row.split()[1] for row in failed] == ["logits"], "a sign tells of them without color, too"
    assert not all(slope["passes"] for slope in json.loads((tmp_path / "out/coord-check.json").read_text())["slopes"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"coord-check.png", "coord-check.json"}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"widths": (64,)}, "two or more different"),
        ({"widths": (64, 64)}, "two or more different"),
        ({"widths": (64, 0)}, "not multiples"),
        ({"widths": (64, 96), "heads": 64}, "not multiples of the number of heads .64."),
        ({"heads": 0}, "heads is 0"),
        ({"steps": 0, "seeds": -1}, "steps is 0.*seeds is -1"),
        ({"layers": 0}, "layers is 0"),
        ({"rows": 0}, "rows is 0"),
        ({"row_length": 1}, "row_length is 1"),
        ({"ablate": "everything"}, "choose one of hidden-init"),
    ],
)
def test_bad_sizes_are_refused(values, match):
    with pytest.raises(ValueError, match=match):
        CoordCheck(**values)


@pytest.mark.parametrize(
    ("recipe", "options", "match"),
    [
        ({}, {"check": CoordCheck(rows=4000)}, "fewer than a batch of 128000"),
        ({}, {"device": "abacus"}, "The device 'abacus' is unknown"),
        ({"optimizer": Optimizer(lr=0.0)}, {}, "lr is 0"),
        ({"model": {"n_embd": 32, "n_head": 4, "vocab_size": 200}}, {"check": CoordCheck(ablate="logits")}, "standard"),
    ],
)
def test_bad_input_is_refused(tmp_path, recipe, options, match):
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(replace(tiny_recipe(), **recipe)))
    tiny_shards(tmp_path / "shards")
    with pytest.raises(ValueError, match=match):
        run_coord_check(path, **{"data": tmp_path / "shards", "output": tmp_path / "out", "device": "cpu"} | options)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_goes_on_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "start: {model: x}\noptimizer: {lr: 0.1}\nschedule: {warmup_tokens: 0}\nmicro_batch_tokens: 16\n"
        "stages: [{sequence_length: 16, batch_tokens: 16, tokens: 16}]\n"
    )
    with pytest.raises(ValueError, match="continues from start"):
        run_coord_check(path)
