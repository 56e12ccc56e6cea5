import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from btlm.checkpoint import locate
from btlm.checkpoint.locate import checkpoint_folder


def message(name, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the tests match the message
        checkpoint_folder(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replace the Hub: `hub(files)` or `hub(error)` sets its answer and returns the patterns that were requested."""
    asked = []

    def answer(files_or_error):
        def snapshot_download(repo_id, *, allow_patterns):
            asked.append(allow_patterns)
            if isinstance(files_or_error, Exception):
                raise files_or_error
            for file in files_or_error:
                (tmp_path / file).touch()
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return answer


def hub_error(kind):
    """Make an error of the Hub, whose constructor needs a server's response."""
    return kind.__new__(kind)


def test_a_folder_goes_before_the_hub(hub, tmp_path, monkeypatch):
    asked = hub(AssertionError())
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("name").samefile(tmp_path / "name")
    assert not asked


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_the_model_in_the_folder_of_a_run_is_named(tmp_path, file):
    (tmp_path / "tiny/model").mkdir(parents=True)
    (tmp_path / "tiny/checkpoints").mkdir()
    assert message(tmp_path / "tiny").endswith(
        "has no config.json, so it is not a checkpoint; give the folder that has one."
    )
    (tmp_path / "tiny/model" / file).touch()
    assert message(tmp_path / "tiny").endswith(f"so it is not a checkpoint; {tmp_path / 'tiny/model'} is one.")


def test_adapters_are_no_model(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    assert "holds adapters and not a model; merge them first, with `btlm merge`." in message(tmp_path)


def test_safetensors_are_preferred(hub):
    asked = hub(["config.json", "model.safetensors"])
    folder = checkpoint_folder("owner/name")
    assert (folder / "model.safetensors").exists()
    assert len(asked) == 1
    assert not any("bin" in pattern for pattern in asked[0])


def test_pickles_are_downloaded_where_nothing_else_is(hub):
    asked = hub(["config.json", "pytorch_model-00001-of-00002.bin"])
    checkpoint_folder("owner/name")
    assert len(asked) == 2
    assert "pytorch_model*.bin" in asked[1]


def test_a_configuration_alone_is_a_small_download(hub):
    asked = hub(["config.json"])
    checkpoint_folder("owner/name", weights=False)
    assert asked == [["config.json", "generation_config.json"]]


@pytest.mark.parametrize("name", ["", " "])
def test_no_name(name):
    assert "is empty" in message(name)


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert f"{tmp_path / 'model.safetensors'} is a file" in message(tmp_path / "model.safetensors")


def test_a_folder_without_configuration(tmp_path):
    assert f"{tmp_path} has no config.json" in message(tmp_path)


def test_a_repository_without_configuration(hub):
    hub(["model.safetensors"])
    assert "owner/name has no config.json" in message("owner/name")


def test_a_missing_bundled_model(monkeypatch, tmp_path):
    monkeypatch.setattr(locate, "BUNDLED_MODEL", tmp_path / "absent")
    assert "with model." in message(tmp_path / "absent")


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "a/b/c", "two words", "-x"])
def test_neither_a_folder_nor_an_id(name):
    assert f"There is no folder {name!r}, and it cannot be an id" in message(name)


@pytest.mark.parametrize("name", ["absent", "owner/absent"])
def test_an_unknown_id_without_a_network(name):
    # tests/conftest.py turns off network access to the Hub.
    told = message(name)
    assert f"{name} is neither a folder here nor downloaded before" in told
    assert "cannot be reached" in told


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (hub_error(GatedRepoError), "gated"),
        (hub_error(RepositoryNotFoundError), "nor a public model"),
        (LocalEntryNotFoundError("long story"), "cannot be reached"),
        (OSError("No space left on device"), "No space left on device"),
        (RuntimeError("proxy\nrefused"), "proxy refused"),
    ],
)
def test_what_the_hub_refuses(hub, error, expected):
    hub(error)
    told = message("owner/name")
    assert told.startswith("owner/name")
    assert expected in told
