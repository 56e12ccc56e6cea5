"""Checkpoints as files: what is on the disk after a step, and after a power cut."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from btlm.data.shards import TokenShards
from btlm.model import BTLMConfig, BTLMLMHeadModel
from btlm.train import train
from btlm.train.recipe import Lora, Start
from btlm.train.state import publish_model
from tests.power_cut import PowerCut
from tests.train.tiny import MODEL, TOKEN_BYTES, tiny_recipe, tiny_shards

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def finished(shards: TokenShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a complete run, which tests must not change."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert len(list(train(tiny_recipe(), shards, output, TOKEN_BYTES))) == 7
    return output


def model_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "model").iterdir()}


def test_a_power_cut_leaves_no_checkpoint_that_only_counts_as_whole(
    tmp_path: Path, shards: TokenShards, power_cut: PowerCut
) -> None:
    list(train(tiny_recipe(), shards, tmp_path, TOKEN_BYTES))
    steps = [path.name for path in power_cut.renamed if path.name.startswith("step-")]
    assert steps == [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    assert power_cut.renamed[-1] == tmp_path / "model"
    assert power_cut.lost == []


def test_the_model_is_the_one_of_the_last_checkpoint_without_a_copy(finished: Path) -> None:
    model, checkpoint = model_files(finished), model_files(finished / "checkpoints/step-00000007")
    assert model.keys() == checkpoint.keys() >= {"config.json", "model.safetensors"}
    for name, path in model.items():
        assert path.samefile(checkpoint[name]), name


def test_the_model_is_copied_where_files_cannot_be_linked(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, power_cut: PowerCut
) -> None:
    def link(*_: object) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(os, "link", link)
    publish_model(finished / "checkpoints/step-00000007", tmp_path)
    for name, path in model_files(finished).items():
        copied = tmp_path / "model" / name
        assert copied.read_bytes() == path.read_bytes()
        assert not copied.samefile(path)
        assert copied.stat().st_mode & 0o777 == 0o666 & ~UMASK
    assert power_cut.lost == []


def test_the_weights_may_be_read_by_whom_the_umask_allows(finished: Path) -> None:
    modes = {path: path.stat().st_mode & 0o777 for path in finished.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", ".metadata", "checkpoint.json"} <= {path.name for path in modes}
    assert set(modes.values()) == {0o666 & ~UMASK}


def test_the_readme_of_adapters_is_about_these(
    tmp_path: Path, shards: TokenShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("PEFT asks the Hub")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", forbidden)
    BTLMLMHeadModel(BTLMConfig(**MODEL)).save_pretrained(tmp_path / "a: base")
    base = str(tmp_path / "a: base")
    recipe = replace(tiny_recipe(), model={}, start=Start(base), lora=Lora(4, 8.0, target_modules=("c_attn", "c_fc")))
    list(train(recipe, shards, tmp_path / "run", TOKEN_BYTES))
    readme = (tmp_path / "run/model/README.md").read_text()
    _, front, text = readme.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == base
    # Two blocks, rank 4: matrices of 32 + 96 and of 32 + 44.
    assert f"{2 * 4 * (128 + 76):,} parameters in adapters" in text
    assert "of rank 4 on `c_attn`, `c_fc`, for a model of\n23,856 parameters" in text
    assert "for 7 of 7 steps, 448 tokens" in text
    assert yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["lora"]["alpha"] == 8.0
    assert f'from_pretrained("{base}")' in text
    assert "Information Needed" not in readme
    assert not (tmp_path / "run/checkpoints/step-00000007/state/README.md").exists()


UMASK = os.umask(0o022)
os.umask(UMASK)
