"""The released checkpoint's way in: a repository laid out like it, on a stand-in for the Hub, through every command."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.tiny import save_tiny, set_config
from tests.hub import Hub, hub

NAME = "cerebras/btlm-3b-8k-base"
CODE = ("configuration_btlm.py", "modeling_btlm.py")
SNIPPETS = {
    "generate": """
        from transformers import AutoTokenizer, AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained("cerebras/btlm-3b-8k-base")
        model = AutoModelForCausalLM.from_pretrained(
            "cerebras/btlm-3b-8k-base", trust_remote_code=True, torch_dtype="auto"
        )
        inputs = tokenizer("Albert Einstein was known for ", return_tensors="pt")
        outputs = model.generate(**inputs, num_beams=5, max_new_tokens=5, early_stopping=True, no_repeat_ngram_size=2)
        print(tokenizer.batch_decode(outputs, skip_special_tokens=True)[0])
    """,
    "pipeline": """
        from transformers import AutoTokenizer, AutoModelForCausalLM, pipeline
        tokenizer = AutoTokenizer.from_pretrained("cerebras/btlm-3b-8k-base")
        model = AutoModelForCausalLM.from_pretrained(
            "cerebras/btlm-3b-8k-base", trust_remote_code=True, torch_dtype="auto"
        )
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        text = pipe("Isaac Newton was a ", max_new_tokens=5, do_sample=False, no_repeat_ngram_size=2)[0]
        print(text["generated_text"])
    """,
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Two pickled shards with an index, a tokenizer, and code that must never run."""
    folder = save_tiny(tmp_path_factory.mktemp("repository"), n_embd=128, n_inner=128, vocab_size=50257)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    for name in CODE:
        (folder / name).write_text("raise SystemExit('code of the repository ran')\n")
    kinds = {"AutoConfig": "configuration_btlm.BTLMConfig", "AutoModelForCausalLM": "modeling_btlm.BTLMLMHeadModel"}
    set_config(folder, auto_map=kinds)
    return folder


class User:
    """Somebody with an empty cache."""

    def __init__(self, home: Path, state: Hub) -> None:
        rest = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.home, self.hub = home, state
        self.environment = {**rest, "HF_HOME": str(home / "hf"), "HF_ENDPOINT": state.url, "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, offline: bool = False, status: int = 0) -> str:
        environment = {**self.environment, "HF_HUB_OFFLINE": "1"} if offline else self.environment
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=self.home, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stderr
        assert "code of the repository ran" not in done.stderr
        return done.stdout if status == 0 else done.stderr

    def btlm(self, *arguments: str, **given) -> str:
        return self.run("-m", "btlm", *arguments, **given)

    def python(self, code: str, **given) -> str:
        return self.run("-c", f"import btlm\n{re.sub('^        ', '', code, flags=re.MULTILINE)}", **given)


@pytest.fixture
def user(repository, tmp_path):
    with hub({NAME: repository}) as state:
        yield User(tmp_path, state)


def test_generate_needs_no_network_the_second_time(user, repository):
    command = ["generate", "--model", NAME, "ab", "--max-new-tokens", "4"]
    local = user.btlm("generate", "--model", str(repository), "ab", "--max-new-tokens", "4")
    assert user.btlm(*command) == local
    fetched = {path.rpartition("/")[2] for method, path, _ in user.hub.asked if method == "GET"}
    assert {"config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"} <= fetched
    assert not fetched & set(CODE)
    before = len(user.hub.asked)
    assert user.btlm(*command, offline=True) == local
    assert len(user.hub.asked) == before


@pytest.mark.slow
def test_a_broken_download_goes_on_where_it_was(user, repository):
    index = json.loads((repository / "pytorch_model.bin.index.json").read_text())["weight_map"]
    name = index["transformer.wte.weight"]  # 26 MB; the library keeps what it has in parts of 10 MB
    user.hub.cut = {name}
    user.btlm("quantize", NAME, "small")
    first, *rest = user.hub.ranges_of(name)
    assert first is None
    assert rest
    size = (repository / name).stat().st_size
    assert all(part is not None and 0 < int(re.findall(r"\d+", part)[0]) < size for part in rest)
    again = user.btlm("generate", "--model", "small", "ab", "--max-new-tokens", "4", offline=True)
    user.btlm("quantize", str(repository), "local")
    assert again == user.btlm("generate", "--model", "local", "ab", "--max-new-tokens", "4")


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_snippets_of_the_model_card_run(user, snippet):
    text = user.python(SNIPPETS[snippet])
    assert text.startswith(("Albert Einstein was known for ", "Isaac Newton was a "))
    assert user.python(SNIPPETS[snippet], offline=True) == text
    assert not any(path.endswith(CODE) for _, path, _ in user.hub.asked)


@contextmanager
def serving(user, *arguments):
    command = [sys.executable, "-m", "btlm", "serve", NAME, "--port", "0", *arguments]
    process = subprocess.Popen(command, env=user.environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"serving at (\S+)", line):
                yield found[1]
                break
        else:
            raise AssertionError("it does not serve")
    finally:
        process.terminate()
        process.communicate()


def test_the_server_takes_it_too(user):
    with serving(user) as url:
        content = urllib.request.urlopen(f"{url}/v1/models").read()
        assert json.loads(content)["data"][0]["id"] == NAME


def test_what_is_not_there_is_told(user):
    told = user.btlm("generate", "--model", "cerebras/btlm-4b", "ab", status=2)
    assert "neither a folder here nor a public model" in told
    assert "Traceback" not in told
    told = user.btlm("generate", "--model", "cerebras/btlm-4b", "ab", status=2, offline=True)
    assert "nor downloaded before" in told


@pytest.mark.slow
def test_a_configuration_is_all_that_info_fetches(user):
    user.btlm("info", NAME)
    fetched = {path.rpartition("/")[2] for method, path, _ in user.hub.asked if method == "GET"}
    assert "config.json" in fetched
    assert not any(name.endswith((".bin", ".py")) for name in fetched)
