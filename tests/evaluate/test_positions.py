"""`btlm eval-positions` against Transformers, and what it reads and draws."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from btlm.checkpoint import Checkpoint, load_model
from btlm.cli.main import main
from btlm.engine.network import LOGIT_ROWS, Network
from btlm.evaluate.options import Positions
from btlm.evaluate.perplexity import in_tokens, ratio_of_totals, read_texts
from btlm.evaluate.positions import cut_windows, measure, rows_of, scalings_of
from btlm.evaluate.positions_command import run_positions
from btlm.evaluate.results import Origin, read_results
from tests.checkpoint.tiny import END, save_tiny

TRAINED, LENGTH = 64, 160


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), n_positions=TRAINED, initializer_range=0.2)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(1).choices("abcdefgh ", k=3 * LENGTH + 20)))
    return path


def windows_of(model, text, **more):
    checkpoint = Checkpoint.open(model)
    texts = list(in_tokens(read_texts([text], "text"), checkpoint.tokenizer))
    given = {"before": END, "length": LENGTH, "number": 8, "bin_tokens": 1, **more}
    return checkpoint, cut_windows(texts, checkpoint.tokenizer, **given)


@pytest.mark.parametrize("name", ["none", "2", "dynamic"])
def test_losses_are_those_of_transformers(model, text, name):
    checkpoint, windows = windows_of(model, text)
    (scaling,) = scalings_of([name], LENGTH, TRAINED)
    (curve,) = measure(checkpoint, windows, [scaling])
    network, _ = load_model(model, dtype="float32", device="cpu", context_scaling=name)
    with torch.no_grad():
        # With dynamic interpolation, a pass has the factor of its own length: that of the tokens that are read.
        logits = network(torch.tensor([ids[:-1] for ids in windows.ids])).logits
    expected = -logits.log_softmax(-1).gather(2, torch.tensor([ids[1:] for ids in windows.ids])[..., None])[..., 0]
    assert curve.nats.shape == (3, LENGTH)
    np.testing.assert_allclose(curve.nats, expected.numpy(), atol=1e-4)


def test_logits_of_a_window_are_never_held_together(model, tmp_path, monkeypatch):
    """A window longer than a step: few rows of logits at a time, whatever its length."""
    (tmp_path / "long.txt").write_text("abcdefgh" * 100)
    checkpoint, windows = windows_of(model, tmp_path / "long.txt", length=800)
    forward, rows = Network.forward, []

    def counted(self, ids, segments, cache, wanted):
        logits = forward(self, ids, segments, cache, wanted)
        rows.append(len(logits))
        return logits

    monkeypatch.setattr(Network, "forward", counted)
    list(measure(checkpoint, windows, scalings_of(["none", "dynamic"], 800, TRAINED)))
    assert sum(rows) == 2 * 800
    assert max(rows) <= LOGIT_ROWS < 800


def test_windows_do_not_overlap_and_are_spread_over_the_text(model, text):
    _, windows = windows_of(model, text, length=40, number=5, bin_tokens=16)
    whole = text.read_text()
    starts = [whole.index(Checkpoint.open(model).tokenizer.decode(ids[1:])) for ids in windows.ids]
    assert starts == [0, 120, 240, 320, 440]
    assert (windows.of, windows.documents) == (12, 1)
    assert windows.bins == [(0, 15), (16, 31), (32, 39)]
    assert windows.bytes.tolist() == [[16, 16, 8]] * 5
    assert windows.tokens.tolist() == [[16, 16, 8]] * 5
    assert all(ids[0] == END and len(ids) == 41 for ids in windows.ids)


def test_interpolations_by_name():
    assert [(s.name, s.factor) for s in scalings_of(["none", "dynamic", "1.5", "none"], 96, 64)] == [
        ("none", 1.0),
        ("dynamic", 1.5),
        ("1.5", 1.5),
    ]
    assert scalings_of(["dynamic"], 32, 64)[0].factor == 1.0


def test_a_ratio_of_totals_has_the_error_of_its_residuals():
    above, below = np.array([[2.0, 1.0], [4.0, 3.0]]), np.array([[1.0, 1.0], [1.0, 2.0]])
    value, error = ratio_of_totals(above, below)
    assert value.tolist() == [3.0, 4 / 3]
    assert error.tolist() == [1.0, pytest.approx(math.sqrt(2 * ((1 / 3) ** 2 + (1 / 3) ** 2)) / 3)]
    assert np.isnan(ratio_of_totals(above[:1], below[:1])[1]).all()


def test_results_have_a_row_per_interpolation_bin_and_metric(model, text, tmp_path, capsys):
    output, plot = tmp_path / "results.json", tmp_path / "positions.png"
    options = Positions(length=LENGTH, bin=64, windows=2, output=str(output), plot=str(plot))
    run_positions(model, [text], options)
    rows = read_results(output)
    assert len(rows) == 3 * 3 + 3 * 3 + 2 * 3
    change = next(r for r in rows if r.metric == "nats_per_token_change" and r.settings["scaling"] == "dynamic")
    assert (change.name, change.n, change.settings["factor"]) == ("positions 0-63", 2, LENGTH / TRAINED)
    plain, dynamic = (
        next(r for r in rows if r.metric == "nats_per_token" and r.settings["scaling"] == name)
        for name in ("none", "dynamic")
    )
    assert change.value == pytest.approx(dynamic.value - plain.value)
    assert None not in (change.standard_error, plain.standard_error, dynamic.standard_error)
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "128 to 159" in printed.out
    assert "dynamic (2.5)" in printed.out
    assert "peak memory" in printed.err


def test_bytes_are_those_of_the_text(model, text):
    checkpoint, windows = windows_of(model, text, bin_tokens=32)
    curves = list(measure(checkpoint, windows, scalings_of(["none"], LENGTH, TRAINED)))
    rows = {
        row.metric: row for row in rows_of(curves, windows, Origin.of(checkpoint), {}) if row.name == "positions 0-31"
    }
    assert rows["bits_per_byte"].value == pytest.approx(rows["nats_per_token"].value / math.log(2))  # a byte per token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--length 1000",
            "The longest text has 500 tokens, and a window 1,000; give a longer text or a shorter length.",
        ),
        ("--scalings none,linear", "--scalings has linear; each is none, dynamic or a factor above 1."),
        ("--scalings 0.5", "--scalings has 0.5; each is"),
        ("--windows 0", "--windows is 0"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(model, text, arguments, message, capsys):
    assert main(["eval-positions", str(model), str(text), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_learned_positions_end(tmp_path, text, capsys):
    folder = save_tiny(tmp_path / "model", n_positions=TRAINED, position_embedding_type="learned")
    assert main(["eval-positions", str(folder), str(text), "--length", "65", "--scalings", "none"]) == 2
    assert "has 64 learned positions and no interpolation; give a --length of at most that" in capsys.readouterr().err
    assert main(["eval-positions", str(folder), str(text), "--length", "64", "--scalings", "none"]) == 0


def test_the_command_needs_no_torch(model, text):
    """It would take 400 MB of the memory that a small machine has for the model."""
    command = f"eval-positions {model} {text} --length 64 --windows 1"
    program = (
        f"import sys; from btlm.cli.main import main; main({command.split()!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
