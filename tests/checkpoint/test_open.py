import json
import pickle

import huggingface_hub
import pytest
import torch

from btlm.checkpoint import load_model
from btlm.checkpoint.locate import checkpoint_folder
from btlm.checkpoint.open import Checkpoint
from btlm.convert.gguf import export_gguf
from btlm.convert.quantize import quantize
from btlm.engine import Engine, GenerationOptions
from btlm.generate.continue_prompt import run_generate
from tests.checkpoint.tiny import END, pickle_tensors, save_tiny, set_config

SHORT = GenerationOptions(max_new_tokens=2)


@pytest.fixture
def found(monkeypatch):
    """The names whose folders were looked for."""
    names = []

    def count(name, *, weights=True):
        names.append(name)
        return checkpoint_folder(name, weights=weights)

    monkeypatch.setattr("btlm.checkpoint.open.checkpoint_folder", count)
    return names


# A checkpoint is found once


@pytest.mark.parametrize("engine", ["btlm", "transformers", "auto"])
def test_generate_finds_its_checkpoint_once(checkpoint, found, capsys, engine):
    run_generate(["a"], model=checkpoint, options=SHORT, device="cpu", engine=engine)
    assert found == [checkpoint]
    assert capsys.readouterr().out.startswith("a")


def test_older_keys_cost_no_second_search(copy, found):
    stored = json.loads((copy / "config.json").read_text())
    set_config(copy, mup_embeddings_scale=..., embeddings_scale=stored["mup_embeddings_scale"])
    run_generate(["a"], model=copy, options=SHORT, device="cpu")
    assert found == [copy]


def test_a_fallback_to_transformers_finds_it_once(copy, found):
    pickle_tensors(copy)
    run_generate(["a"], model=copy, options=SHORT, device="cpu")
    assert found == [copy]


@pytest.mark.parametrize(
    "use",
    [
        lambda model, _: load_model(model, device="cpu"),
        lambda model, _: Engine.open(model, context=4),
        lambda model, output: quantize(model, output / "copy", group_size=64),
        lambda model, output: export_gguf(model, output / "model.gguf", type="F32"),
    ],
    ids=["load_model", "engine", "quantize", "gguf"],
)
def test_every_use_finds_it_once_and_an_open_one_never(tmp_path_factory, found, use):
    folder = save_tiny(tmp_path_factory.mktemp("wide"), n_embd=64)
    if use.__code__.co_names[0] == "export_gguf":
        pytest.importorskip("gguf")
        found.clear()
        with pytest.raises(ValueError, match="no merges"):  # of a tokenizer of bytes
            use(folder, tmp_path_factory.mktemp("out"))
        assert found == [folder]
        return
    use(folder, tmp_path_factory.mktemp("out"))
    assert found == [folder]
    use(Checkpoint("name", folder), tmp_path_factory.mktemp("out"))
    assert found == [folder]


def test_weights_of_the_hub_are_downloaded_when_they_are_needed(checkpoint, monkeypatch):
    patterns = []

    def snapshot_download(repo_id, *, allow_patterns):
        patterns.append(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    one = Checkpoint.open("owner/name", weights=False)
    assert one.config().vocab_size == 257
    assert [any("safetensors" in pattern for pattern in asked) for asked in patterns] == [False]
    assert one.tensors is one.tensors
    assert one.tokenizer is one.tokenizer
    assert [any("safetensors" in pattern for pattern in asked) for asked in patterns] == [False, True]
    assert (one.name, one.title) == ("owner/name", "owner/name")


# What it holds


def test_an_open_checkpoint_is_given_back(checkpoint):
    one = Checkpoint.open(checkpoint)
    assert Checkpoint.open(one) is one
    assert one.title == checkpoint.name


@pytest.mark.parametrize(
    ("folder", "title"), [("runs/tiny/model", "tiny"), ("runs/model-4bit", "model-4bit"), ("model/tiny", "tiny")]
)
def test_the_folder_of_a_run_is_called_by_the_run(tmp_path, monkeypatch, folder, title):
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    assert Checkpoint(".", tmp_path / folder).title == Checkpoint(tmp_path / folder, tmp_path).title == title
    assert Checkpoint("/model", tmp_path).title == "/model"  # no folder here
    assert Checkpoint("owner/model", tmp_path).title == "owner/model"


def test_a_configuration_may_be_changed(checkpoint):
    one = Checkpoint.open(checkpoint)
    one.config().n_embd = 1
    assert one.config().n_embd == 32


def test_it_travels_to_other_processes_without_what_it_has_read(checkpoint):
    one = Checkpoint.open(checkpoint)
    assert one.tensors
    again = pickle.loads(pickle.dumps(one))
    assert (again.name, again.folder) == (one.name, one.folder)
    assert len(pickle.dumps(one)) < 1000


@pytest.mark.parametrize(("stored", "ends"), [(None, set()), (7, {7}), ([7, END], {7, END}), (..., {END})])
def test_end_ids_are_the_same_for_every_reader(copy, stored, ends):
    path = copy / "generation_config.json"
    path.unlink()
    if stored is not ...:
        path.write_text(json.dumps({"eos_token_id": stored}))
    one = Checkpoint.open(copy)
    assert one.end_ids == Engine.open(one, context=4).end_ids == ends


@pytest.mark.parametrize("end", ["x", [1.5], 257, 300, -1, True])
def test_an_end_that_is_no_token_is_refused_by_every_reader(copy, end):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    readers = (
        lambda one: one.end_ids,
        lambda one: Engine.open(one, context=4),
        lambda one: load_model(one, device="cpu"),
    )
    for read in readers:
        with pytest.raises(ValueError, match=r"eos_token_id is .*; it must be a token below 257"):
            read(Checkpoint.open(copy))


def test_pickled_weights_load_as_safetensors_do(copy, checkpoint):
    pickle_tensors(copy)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    model, expected = load_model(copy, device="cpu")[0], load_model(checkpoint, device="cpu")[0]
    assert model.generation_config.eos_token_id == 7
    assert model.dtype == expected.dtype
    assert not model.training
    for (name, parameter), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_an_end_of_the_configuration_that_is_no_token(copy):
    (copy / "generation_config.json").unlink()
    for end in ("end", 300):
        set_config(copy, eos_token_id=end)
        with pytest.raises(ValueError, match="eos_token_id is ") as error:
            Engine.open(copy, context=4)
        assert "\n" not in str(error.value)


def test_a_configuration_of_far_more_layers_costs_nothing(copy):
    set_config(copy, n_layer=10**9)
    with pytest.raises(ValueError, match=r"describes .* parameters, and the weights take .* do not belong together"):
        Engine.open(copy, context=4)


def test_a_tokenizer_of_more_tokens_than_the_model_has(copy):
    set_config(copy, vocab_size=256, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match="has 257 tokens, and its model a vocabulary of 256"):
        _ = Checkpoint.open(copy).tokenizer


# Its configuration, which is read without the configuration class


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[1]"])
def test_a_configuration_that_is_broken(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        _ = Checkpoint.open(copy).architecture
    assert "\n" not in str(error.value)


def test_folders_of_an_older_version(copy):
    set_config(copy, quantization_config={"quant_method": "btlm", "bits": 8})
    with pytest.raises(ValueError, match="older version") as error:
        _ = Checkpoint.open(copy).architecture
    assert "\n" not in str(error.value)


def test_missing_mup_keys_are_told_once_by_both_readers(copy, caplog):
    set_config(copy, mup_output_alpha=...)
    one = Checkpoint.open(copy)
    assert one.config().architecture == one.architecture
    told = [record.getMessage() for record in caplog.records if record.name.startswith("btlm")]
    assert ["mup_output_alpha" in line for line in told] == [True]
