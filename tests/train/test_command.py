import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

import btlm
import btlm.train.command
from btlm.data.shards import TokenShards, write_manifest, write_shard
from btlm.files import locked
from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.model.tokenization_btlm import load_tokenizer
from btlm.train import load_recipe
from btlm.train.command import run_training
from btlm.train.held_out import token_bytes
from tests.train.tiny import MODEL

RAW: dict[str, Any] = {
    "model": MODEL | {"vocab_size": 50257, "n_embd": 8, "n_head": 2, "n_inner": 8, "n_layer": 1},
    "optimizer": {"lr": 0.01},
    "schedule": {"warmup_tokens": 64},
    "stages": [
        {"sequence_length": 16, "batch_tokens": 64, "tokens": 128},
        {"sequence_length": 32, "batch_tokens": 64, "tokens": 128},
    ],
    "micro_batch_tokens": 64,
    "evaluation": {"every_tokens": 128, "tokens_per_source": 64},
    "checkpoints": {"every_steps": 2},
}
NAMES = ["checkpoints", "loss.png", "metrics.jsonl", "model", "recipe.yaml", "tensorboard"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer, sources = load_tokenizer(), ["essays", "tales"]
    texts = [(f"Of {sources[i % 2]} number {i} there is little to say. " * 3, i % 2) for i in range(40)]
    documents = [(tokenizer(text)["input_ids"], source, len(text)) for text, source in texts]
    shards = {
        "train": [write_shard(folder, "train-00000", documents[:36])],
        "validation": [write_shard(folder, "validation-00000", documents[36:])],
    }
    write_manifest(folder, shards, sources)
    return folder


def write_recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "my-recipe.yaml"
    path.write_text(yaml.safe_dump(RAW | changes))
    return path


def test_without_validation_documents_one_line_says_that_nothing_is_held_out(tmp_path, data, capsys):
    """The recipe asks for the held-out loss, which would be left out in silence."""
    shutil.copytree(data, tmp_path / "data")
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    del manifest["splits"]["validation"]
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    run_training(write_recipe(tmp_path), tmp_path / "data", tmp_path / "out", "cpu")
    warning = "btlm: warning: The shards hold no validation documents, so the held-out loss is not measured"
    assert capsys.readouterr().err.count(warning) == 1


class Run(NamedTuple):
    recipe: Path
    output: Path
    told: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """A complete run without a terminal, which tests must not change."""
    folder = tmp_path_factory.mktemp("finished")
    recipe, output = write_recipe(folder), folder / "new" / "[run]"
    with redirect_stderr(io.StringIO()) as told:
        run_training(recipe, data, output, "cpu")
    return Run(recipe, output, told.getvalue())


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished.output, tmp_path / "copied"))


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def content(output: Path) -> dict[str, bytes]:
    """All files of a run except those that every call rewrites."""
    files = [path for path in output.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(output)): path.read_bytes() for path in files if path.name != "loss.png"}


# run_training


def test_one_call_from_recipe_to_model(finished: Run, data: Path) -> None:
    assert sorted(path.name for path in finished.output.iterdir()) == NAMES
    assert load_recipe(finished.output / "recipe.yaml") == load_recipe(finished.recipe)
    assert "weight_decay: 0.1" in (finished.output / "recipe.yaml").read_text(), "every key is spelled out"
    assert [path.name for path in sorted((finished.output / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000004",
    ]
    for folder in (finished.output / "model", finished.output / "checkpoints" / "step-00000004" / "model"):
        model = BTLMLMHeadModel.from_pretrained(folder)
        assert model.config.mup_width_scale == 0.5
    assert (finished.output / "model" / "tokenizer.json").exists()
    assert [record["step"] for record in records(finished.output)] == [1, 2, 3, 4]
    assert [record["sequence_length"] for record in records(finished.output)] == [16, 16, 32, 32]
    flops = sum(model.config.flops_per_token(length, training=True) * 128 for length in (16, 32))
    available = TokenShards(data).num_tokens("train")
    assert finished.told.splitlines()[0] == (
        f"{model.num_parameters():,} parameters, 256 tokens in 4 steps, {flops:.3g} FLOPs; "
        f"{256 / available:.3g} epochs of {available:,} training tokens; 1 x cpu"
    )


def test_a_run_that_nobody_watches_tells_itself_line_by_line(finished: Run) -> None:
    _, *lines = finished.told.splitlines()
    held_out = [record for record in records(finished.output) if "bits_per_byte" in record]
    expected = []
    for record in records(finished.output):
        start = (
            f"step {record['step']}/4  loss {record['loss']:.3f}  lr {record['lr']:.2e}  |g| {record['grad_norm']:.2f}"
        )
        expected.append(start)
        if record in held_out:
            values = "  ".join(f"{name} {record['bits_per_byte'][name]:.3f}" for name in ("essays", "tales", "mean"))
            nats = record["nats_per_token"]["mean"]
            expected.append(f"held out after step {record['step']}: {nats:.3f} nats per token, bits per byte: {values}")
    expected.append(f"Wrote {finished.output / 'model'} and {finished.output / 'loss.png'}")
    assert [record["step"] for record in held_out] == [2, 4]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert lines[0].endswith("  rows 16")
    assert lines[-2].startswith("held out")
    assert lines[-3].endswith("  ETA 0:00:00  rows 32")


def test_a_second_call_has_nothing_to_do(copied: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(copied)
    # The recipe is the one in the output folder, and the paths are strings.
    run_training(str(copied / "recipe.yaml"), str(data), str(copied), "cpu")
    assert content(copied) == before
    assert sorted(path.name for path in copied.iterdir()) == NAMES
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split()[0] for line in captured.err.splitlines()][1:] == ["btlm:", "Wrote"]


def test_records_that_were_removed_are_not_needed(copied: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "metrics.jsonl").unlink()
    (copied / "loss.png").unlink()
    run_training(copied / "recipe.yaml", data, copied, "cpu")
    assert capsys.readouterr().err.endswith(f"\nWrote {copied / 'model'}\n")


OTHERS: list[tuple[str, Any, str]] = [
    ("seed", 2, "seed is 1 there, 2 here"),
    ("optimizer.lr", 0.02, "optimizer.lr is 0.01 there, 0.02 here"),
    ("schedule.decay", "cosine", "schedule.decay is 'linear' there, 'cosine' here"),
    ("precision.dtype", "float32", "precision.dtype is 'bfloat16' there, 'float32' here"),
    ("data.mask_documents", True, "data.mask_documents is False there, True here"),
    ("model.attn_pdrop", 0.1, "model.attn_pdrop is 0.0 there, 0.1 here"),
    ("model.n_inner", 12, "model.n_inner is 8 there, 12 here"),
    ("model.tie_word_embeddings", False, "model.tie_word_embeddings is None there, False here"),
    ("stages", RAW["stages"][:1], "stages is [{'sequence_length': 16, "),
    ("mup_base_width", 4, "mup_base_width is None there, 4 here"),
]


@pytest.mark.parametrize(("key", "value", "difference"), OTHERS, ids=[key for key, _, _ in OTHERS])
def test_another_recipe_is_refused(copied: Path, data: Path, key: str, value: Any, difference: str) -> None:
    before = content(copied)
    with pytest.raises(ValueError, match="holds a run of another recipe") as caught:
        run_training(copied / "recipe.yaml", data, copied, "cpu", {key: value})
    message = str(caught.value)
    assert message.startswith(f"{copied} holds a run of another recipe (recipe.yaml): {difference}")
    assert message.endswith(" here. Give a new output folder, or that recipe.")
    assert ";" not in message, "nothing else differs"
    assert content(copied) == before


def test_another_recipe_is_refused_where_only_the_model_is_left(copied: Path, data: Path) -> None:
    shutil.rmtree(copied / "checkpoints")
    changes = {"seed": 2, "optimizer.eps": 1e-6}
    with pytest.raises(
        ValueError, match=r": optimizer\.eps is 1e-08 there, 1e-06 here; seed is 1 there, 2 here\. Give"
    ):
        run_training(copied / "recipe.yaml", data, copied, "cpu", changes)
    shutil.rmtree(copied / "model")
    run_training(copied / "recipe.yaml", data, copied, "cpu", changes)
    assert load_recipe(copied / "recipe.yaml").seed == 2
    assert [record["step"] for record in records(copied)] == [1, 2, 3, 4]


def test_how_a_run_is_executed_may_change(copied: Path, data: Path) -> None:
    changes = {
        "micro_batch_tokens": 32,
        "precision.activation_checkpointing": True,
        "parallelism.gather_dtype": "bfloat16",
        "evaluation.every_tokens": 64,
        "evaluation.tokens_per_source": 32,
        "checkpoints.every_steps": 1,
        "checkpoints.keep_last": 5,
        "checkpoints.keep_every_steps": 3,
        "watching.tensorboard": False,
        "watching.spike_deviations": 3.0,
    }
    before = content(copied)
    expected = load_recipe(copied / "recipe.yaml", changes)
    run_training(copied / "recipe.yaml", data, copied, "cpu", changes)
    assert load_recipe(copied / "recipe.yaml") == expected
    after = content(copied)
    assert [name for name in before | after if before.get(name) != after.get(name)] == ["recipe.yaml"]


def test_whether_a_run_is_compiled_may_change(copied: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, [])
    run_training(copied / "recipe.yaml", data, copied, "cpu", {"precision.compile": True})
    assert load_recipe(copied / "recipe.yaml").precision.compile


def test_a_recipe_may_be_corrected_before_there_is_a_checkpoint(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt

    output = tmp_path / "run"
    monkeypatch.setattr("btlm.train.command.train", interrupted)
    for seed in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            run_training(write_recipe(tmp_path, seed=seed), data, output, "cpu")
        assert load_recipe(output / "recipe.yaml").seed == seed
    # This also holds for the recipe in the output folder.
    with pytest.raises(KeyboardInterrupt):
        run_training(write_recipe(tmp_path, seed=5).rename(output / "recipe.yaml"), data, output, "cpu")
    assert [path.name for path in output.iterdir()] == ["recipe.yaml"]
    assert load_recipe(output / "recipe.yaml").seed == 5


def test_what_cannot_be_used_is_an_error_that_leaves_no_folder(tmp_path: Path, data: Path) -> None:
    recipe, output = write_recipe(tmp_path).rename(tmp_path / "good.yaml"), tmp_path / "run"
    with pytest.raises(ValueError, match=r"The device 'abacus' is unknown"):
        run_training(recipe, data, output, device="abacus")
    with pytest.raises(ValueError, match=r"The device cuda:99 is not available here"):
        run_training(recipe, data, output, device="cuda:99")
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        run_training(recipe, tmp_path, output, "cpu")
    with pytest.raises(ValueError, match=r"The train split has [\d,]+ tokens, fewer than one row of 65,536"):
        run_training(write_recipe(tmp_path, stages=[LONG], micro_batch_tokens=2**16), data, output, "cpu")
    with pytest.raises(ValueError, match="seed is 'x'"):
        run_training(write_recipe(tmp_path, seed="x"), data, output, "cpu")
    with pytest.raises(ValueError, match="seed is 'y'"):
        run_training(recipe, data, output, "cpu", {"seed": "y"})
    with pytest.raises(
        ValueError, match=rf"start\.model is '{tmp_path}', which cannot be used: {tmp_path} has no config\.json"
    ):
        run_training(recipe, data, output, "cpu", {"model": {}, "start.model": str(tmp_path)})
    assert not output.exists()


def test_a_folder_that_another_command_trains_in_is_left_alone(copied: Path, data: Path) -> None:
    before = content(copied)
    with locked(copied):
        with pytest.raises(ValueError, match=f"{copied} is being written by process .*; wait until it ends, or give"):
            run_training(copied / "recipe.yaml", data, copied, "cpu")
        assert content(copied).keys() == before.keys() | {".lock"}
    assert content(copied) == before


def test_the_folder_is_locked_while_a_run_writes_to_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = tmp_path / "run", []

    def look(*_: object, **__: object) -> Iterator[dict[str, Any]]:
        seen.append((output / ".lock").exists())
        return iter(())

    for name in ("train", "_keep_recipe", "plot_metrics"):
        monkeypatch.setattr(f"btlm.train.command.{name}", look)
    run_training(write_recipe(tmp_path), data, output, "cpu")
    assert seen == [True, True, True]
    assert list(output.iterdir()) == []


LONG = dict.fromkeys(RAW["stages"][0], 2**16)


# Messages during a run


def pretend(monkeypatch: pytest.MonkeyPatch, steps: list[int], **values: Any) -> None:
    """Replaces training by the records of the given steps of 64 tokens, at 64 tokens per second."""

    def train(recipe: Any, *_: object, **__: object) -> Iterator[dict[str, Any]]:
        for step in steps:
            length = 16 if 64 * step <= recipe.stages[0].tokens else 32
            record = {"step": step, "tokens": 64 * step, "sequence_length": length, "loss": 1.5, "grad_norm": 0.25}
            yield record | {"lr": 0.01, "tokens_per_s": 64.0, "mfu": 0.5} | values

    monkeypatch.setattr("btlm.train.command.train", train)


def one_stage(steps: int) -> list[dict[str, int]]:
    return [{"sequence_length": 16, "batch_tokens": 64, "tokens": 64 * steps}]


def test_two_hundred_lines_of_a_long_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, list(range(1, 1001)))
    run_training(write_recipe(tmp_path, stages=one_stage(1000)), data, tmp_path / "run", "cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in lines] == [f"step {n}" for n in (*range(1, 11), *range(15, 1001, 5))]
    # 980 steps remain, each of one second.
    assert lines[12] == ("step 25/1000  loss 1.500  lr 1.00e-02  |g| 0.25  64 tok/s  MFU 50%  ETA 0:16:15  rows 16")


def test_time_that_is_left_counts_longer_rows_as_dearer(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, [1, 2, 3, 4], tokens_per_s=0.0064)
    run_training(write_recipe(tmp_path, model=RAW["model"] | {"vocab_size": 50257}), data, tmp_path / "run", "cpu")
    found = [line.partition("ETA ")[2].split("  ")[0] for line in capsys.readouterr().err.splitlines()[1:5]]
    # A step takes 10,000 seconds. There are two operations per weight: 4 * 8 * 8 weights of attention, 3 * 8 * 8 of the
    # feed-forward layer and 50,257 * 8 of the head; and 4 * 8 operations per key, of which a token sees (L + 1) / 2.
    short, long = (2 * (448 + 50_257 * 8) + 32 * (length + 1) / 2 for length in (16, 32))
    expected = [10_000 * (1 + 2 * long / short), 10_000 * 2 * long / short, 10_000, 0]
    assert [round(seconds) for seconds in expected] == [30_006, 20_006, 10_000, 0]
    assert found == ["8:20:06", "5:33:26", "2:46:40", "0:00:00"]


def test_a_terminal_gets_a_bar(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    pretend(monkeypatch, [1, 2, 3, 4])
    run_training(write_recipe(tmp_path), data, tmp_path / "run", "cpu")
    told = capsys.readouterr().err
    assert "\x1b[?25l" in told, "the cursor is hidden while the bar is drawn"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told)
    assert re.search(r"step 4/4 ━+ loss 1\.500 .* rows 32 +\d:\d\d:\d\d", plain)
    assert not re.search(r"step \d/4  loss", plain), "no lines as in a log"


@pytest.mark.parametrize(
    ("columns", "shown", "left_out"),
    [
        (40, [], "loss"),
        (80, ["loss 1.500", "64 tok/s", "ETA 1 day, 9:57:01"], "lr"),
        (120, ["lr 1.00e-02", "|g| 0.25", "64 tok/s", "ETA 1 day, 9:57:01"], "rows"),
        (140, ["rows 16"], "…"),
    ],
)
def test_a_terminal_always_shows_the_step_and_the_total(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    columns: int,
    shown: list[str],
    left_out: str,
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    pretend(monkeypatch, [1234, 1235])
    with pytest.raises(SystemExit):  # before the last step
        run_training(write_recipe(tmp_path, stages=one_stage(123_456)), data, tmp_path / "run", "cpu")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("step 1235/")]
    assert lines
    for line in lines:
        assert re.match(r"step 1235/123456 [━╸╺ ]{10,}", line)
        assert re.search(r" \d:\d\d:\d\d$", line), "the time since the start"
        assert len(line) <= columns
        assert "…" not in line
        assert [part for part in shown if part not in line] == []
        assert left_out not in line


def test_a_second_call_says_where_it_continues(
    tmp_path: Path, data: Path, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    run_training(finished.recipe, data, tmp_path / "run", "cpu")
    _, first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "btlm: continuing from step 2"
    assert second.startswith("step 3/4  ")
    run_training(finished.recipe, data, tmp_path / "run", "cpu")
    assert capsys.readouterr().err.splitlines()[1] == "btlm: all 4 steps are done"


def test_adapters_take_two_passes_of_three(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, [])
    BTLMConfig(**RAW["model"]).save_pretrained(tmp_path / "base")
    recipe = write_recipe(tmp_path, model={}, start={"model": str(tmp_path / "base")}, stages=one_stage(10))
    for changes, passes in (({}, 3), ({"lora.rank": 2}, 2)):
        run_training(recipe, data, tmp_path / f"run-{passes}", "cpu", changes)
        forward = 2 * (448 + 50_257 * 8) + 32 * 17 / 2
        assert f", {passes * 640 * forward:.3g} FLOPs; " in capsys.readouterr().err


# SIGTERM


def terminate_after(step: int) -> Callable[..., str]:
    """Replaces `status`: sends a real SIGTERM while the record of a step is shown."""
    original = btlm.train.command.status

    def status(recipe: Any, config: Any, record: dict[str, Any]) -> str:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(recipe, config, record)

    return status


def test_sigterm_ends_with_a_checkpoint(
    tmp_path: Path, data: Path, finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("btlm.train.command.status", terminate_after(2))
        with pytest.raises(SystemExit) as ended:
            run_training(finished.recipe, data, output, "cpu")
    assert ended.value.code == 143
    # The step after the signal is finished, and no model is published.
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    assert not (output / "model").exists()
    assert (output / "loss.png").exists()
    told = capsys.readouterr().err.splitlines()
    assert "btlm: warning: Stopping after this step (SIGTERM); a second signal stops at once." in told
    assert told[-1] == "Stopped after step 3 with a checkpoint; the same command continues from there."

    # Another recipe is refused; the same recipe continues to the same result.
    with pytest.raises(ValueError, match="seed is 1 there, 2 here"):
        run_training(finished.recipe, data, output, "cpu", {"seed": 2})
    run_training(finished.recipe, data, output, "cpu", {"checkpoints.keep_last": 1})
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000004"]
    assert weights(output) == weights(finished.output)
    for found, expected in zip(records(output), records(finished.output), strict=True):
        varying = ("tokens_per_s", "mfu")
        assert {k: v for k, v in found.items() if k not in varying} == {
            k: v for k, v in expected.items() if k not in varying
        }


def test_sigterm_after_the_last_step_is_no_interruption(
    tmp_path: Path, data: Path, finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btlm.train.command.status", terminate_after(4))
    run_training(finished.recipe, data, tmp_path / "run", "cpu")
    assert weights(tmp_path / "run") == weights(finished.output)


TERMINATED = """
import sys
import btlm.train.command
from btlm.cli import main
from tests.train.test_command import terminate_after
btlm.train.command.status = terminate_after(1)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_that_is_terminated_exits_with_143_and_goes_on(tmp_path: Path, data: Path, finished: Run) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(btlm.__file__).parents[1]), str(root)])}
    arguments = [
        "train",
        str(finished.recipe),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]

    def call(*python: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *python, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    first = call("-c", TERMINATED)
    assert (first.returncode, first.stdout) == (143, ""), first.stderr
    assert first.stderr.endswith("\nStopped after step 2 with a checkpoint; the same command continues from there.\n")
    assert "Traceback" not in first.stderr
    second = call("-m", "btlm")
    assert (second.returncode, second.stdout) == (0, ""), second.stderr
    assert "\nstep 3/4  " in second.stderr
    assert "\nstep 2/4  " not in second.stderr
    assert weights(tmp_path / "run") == weights(finished.output)


def weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


# token_bytes


def test_bytes_of_tokens() -> None:
    sizes = token_bytes()
    tokenizer = load_tokenizer()
    assert sizes.dtype == np.int64
    assert sizes.shape == (50257,)
    assert sizes[50256] == 0, "end-of-text stands for no text"
    texts = tokenizer.batch_decode([[i] for i in range(50256)], clean_up_tokenization_spaces=False)
    # A token that is not valid UTF-8 by itself decodes to the replacement character.
    valid = [i for i, text in enumerate(texts) if "\ufffd" not in text]
    assert len(valid) > 49_000
    assert [len(texts[i].encode()) for i in valid] == sizes[valid].tolist()


@pytest.mark.parametrize("text", ["A plain text.", "  Ünïcödé — 漢字, 🙂🏽‍🚀 \n\t\u2028 done\x00", "ﷺ" * 9, ""])
def test_bytes_of_tokens_sum_to_those_of_their_text(text: str) -> None:
    assert token_bytes()[load_tokenizer()(text)["input_ids"]].sum() == len(text.encode())
