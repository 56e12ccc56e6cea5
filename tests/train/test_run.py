import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest
import yaml

from btlm.data.shards import TokenShards, write_manifest, write_shard
from btlm.model import BTLMLMHeadModel
from btlm.model.tokenization_btlm import load_tokenizer
from btlm.train.run import plot_metrics, run_training, token_bytes
from tests.train.tiny import MODEL

RAW: dict[str, Any] = {
    "model": MODEL | {"vocab_size": 50257, "n_embd": 8, "n_head": 2, "n_inner": 8, "n_layer": 1},
    "optimizer": {"lr": 0.01, "warmup_tokens": 64},
    "stages": [
        {"sequence_length": 16, "batch_tokens": 64, "tokens": 128},
        {"sequence_length": 32, "batch_tokens": 64, "tokens": 64},
    ],
    "micro_batch_tokens": 64,
    "eval_every_tokens": 128,
    "eval_tokens_per_source": 64,
    "checkpoint_every_steps": 2,
}


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


def steps(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


# run_training


def test_one_call_from_recipe_to_model(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "run"
    recipe = write_recipe(tmp_path)
    run_training(recipe, data, output)
    names = ["loss.png", "metrics.jsonl", "model", "recipe.yaml", "state.pt"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert (output / "recipe.yaml").read_bytes() == recipe.read_bytes()
    model = BTLMLMHeadModel.from_pretrained(output / "model")
    assert (output / "model" / "tokenizer.json").exists()
    assert steps(output) == [1, 2, 3]
    captured = capsys.readouterr()
    assert captured.out == ""
    flops = sum(model.config.flops_per_token(length, training=True) * n for length, n in ((16, 128), (32, 64)))
    assert f"{model.num_parameters():,} parameters, 192 tokens in 3 steps, {flops:.3g} FLOPs; " in captured.err
    available = TokenShards(data).num_tokens("train")
    assert f"; {192 / available:.3g} epochs of {available:,} training tokens" in " ".join(captured.err.split())
    assert "step 2, 128 tokens, bits per byte: essays " in captured.err
    assert "step 3, 192 tokens, bits per byte: essays " in captured.err

    # Once more: nothing to do. And from the recipe in its own output folder.
    weights = (output / "model" / "model.safetensors").read_bytes()
    metrics = (output / "metrics.jsonl").read_bytes()
    run_training(str(output / "recipe.yaml"), str(data), str(output))
    assert (output / "model" / "model.safetensors").read_bytes() == weights
    assert (output / "metrics.jsonl").read_bytes() == metrics
    assert sorted(path.name for path in output.iterdir()) == names

    # Another recipe is refused, also where only the model is left, and changes nothing.
    other = write_recipe(tmp_path, seed=2)
    for missing in (None, "state.pt"):
        if missing:
            (output / missing).unlink()
        with pytest.raises(ValueError, match=r"run holds a run of another recipe \(.*recipe\.yaml\); give a new"):
            run_training(other, data, output)
        assert "seed" not in (output / "recipe.yaml").read_text()
        assert (output / "metrics.jsonl").read_bytes() == metrics

    # The same recipe in other words is the same recipe.
    run_training(write_recipe(tmp_path, seed=1), data, output)


def test_a_recipe_may_be_corrected_before_there_is_a_checkpoint(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("btlm.train.run.train", interrupted)
        for seed in (3, 4):
            with pytest.raises(KeyboardInterrupt):
                run_training(write_recipe(tmp_path, seed=seed), data, output)
            assert f"seed: {seed}" in (output / "recipe.yaml").read_text()
    # In its own output folder, too.
    run_training(write_recipe(tmp_path, seed=5).rename(output / "recipe.yaml"), data, output)
    assert steps(output) == [1, 2, 3]


def test_what_cannot_be_used_is_an_error_that_leaves_no_folder(tmp_path: Path, data: Path) -> None:
    recipe, output = write_recipe(tmp_path), tmp_path / "run"
    with pytest.raises(ValueError, match=r"device is 'abacus', which torch cannot use: "):
        run_training(recipe, data, output, device="abacus")
    with pytest.raises(ValueError, match=r"device is 'cuda:99', which torch cannot use: "):
        run_training(recipe, data, output, device="cuda:99")
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        run_training(recipe, tmp_path, output)
    with pytest.raises(ValueError, match=r"The train split has [\d,]+ tokens, fewer than one row of 65,536"):
        run_training(write_recipe(tmp_path, stages=[dict.fromkeys(RAW["stages"][0], 2**16)]), data, output)
    with pytest.raises(ValueError, match="seed is 'x'"):
        run_training(write_recipe(tmp_path, seed="x"), data, output)
    assert not output.exists()


# token_bytes


def test_bytes_of_tokens() -> None:
    sizes = token_bytes()
    tokenizer = load_tokenizer()
    assert sizes.dtype == np.int64
    assert sizes.shape == (50257,)
    assert sizes[50256] == 0, "end-of-text is no text"
    texts = tokenizer.batch_decode([[i] for i in range(50256)], clean_up_tokenization_spaces=False)
    # A token that is no valid UTF-8 by itself decodes with the replacement character.
    valid = [i for i, text in enumerate(texts) if "\ufffd" not in text]
    assert len(valid) > 49_000
    assert [len(texts[i].encode()) for i in valid] == sizes[valid].tolist()


@pytest.mark.parametrize("text", ["A plain text.", "  Ünïcödé — 漢字, 🙂🏽‍🚀 \n\t\u2028 done\x00", "ﷺ" * 9, ""])
def test_bytes_of_tokens_sum_to_those_of_their_text(text: str) -> None:
    assert token_bytes()[load_tokenizer()(text)["input_ids"]].sum() == len(text.encode())


# plot_metrics


def write_metrics(path: Path, num: int, *, evaluated: bool = True, stages: bool = True) -> None:
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, num + 1):
        level = 3.5 + 7 * (1 + step / 15) ** -0.7
        records.append(
            {
                "step": step,
                "tokens": 8192 * step,
                "sequence_length": 8192 if stages and step > 0.75 * num else 2048,
                "loss": level + rng.normal() * 0.15,
            }
        )
        if evaluated and (step % 70 == 0 or step == num):
            held_out = {
                name: level * factor
                for name, factor in (
                    ("RedPajamaArXiv", 0.5),
                    ("RedPajamaBook", 0.4),
                    ("RedPajamaCommonCrawl", 0.37),
                    ("RedPajamaGithub", 0.45),
                    ("RedPajamaStackExchange", 0.48),
                    ("RedPajamaWikipedia", 0.42),
                )
            }
            records[-1]["bits_per_byte"] = {**held_out, "mean": sum(held_out.values()) / 6}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("num", "evaluated", "stages"), [(560, True, True), (560, False, True), (30, True, False), (1, True, False)]
)
def test_plot(tmp_path: Path, num: int, evaluated: bool, stages: bool) -> None:
    write_metrics(tmp_path / "metrics.jsonl", num, evaluated=evaluated, stages=stages)
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    height, width = picture.shape[:2]
    assert height > 300
    assert width > (2.5 if evaluated else 1.3) * height, "a panel each for training and held-out loss"
    for panel in np.array_split(picture[..., :3].mean(-1), 2 if evaluated else 1, axis=1):
        assert (panel < 0.9).mean() > 0.01, "something is drawn in it"


def test_plot_shows_where_the_rows_become_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[tuple[float, str]] = []
    original = matplotlib.axes.Axes.text

    def text(self: matplotlib.axes.Axes, x: float, y: float, s: str, **kwargs: Any) -> Any:
        texts.append((x, s))
        return original(self, x, y, s, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "text", text)
    write_metrics(tmp_path / "metrics.jsonl", 560)
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert texts == [(420 * 8192 / 1e6, "8,192 tokens a row")]
