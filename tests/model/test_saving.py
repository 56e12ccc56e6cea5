"""Folders that `save_pretrained` writes: with the tokenizer and, on request, with the code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from btlm.model import BTLMConfig, BTLMForTokenClassification, BTLMLMHeadModel
from tests.model.tiny import tiny_config, tiny_model, tokens

WITHOUT_BTLM = """
import sys
sys.modules["btlm"] = None  # what `import btlm` meets where it is not installed
try:
    import btlm
except ImportError:
    pass
else:
    raise SystemExit("btlm can be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError:
    pass
else:
    raise SystemExit("loaded without trust_remote_code")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = torch.arange(12)[None]
torch.save({"logits": model(ids).logits, "generated": model.generate(ids, max_new_tokens=5)}, sys.argv[2])
model.save_pretrained(sys.argv[3])
assert not any(name == "btlm" or name.startswith("btlm.") for name in sys.modules if sys.modules[name] is not None)
"""


def test_a_folder_with_its_code_loads_where_btlm_is_not_installed(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "with-code", save_code=True)
    again = tmp_path / "again"
    argv = [sys.executable, "-c", WITHOUT_BTLM, *map(str, (tmp_path / "with-code", tmp_path / "out.pt", again))]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "out.pt", weights_only=True)
    ids = torch.arange(12)[None]
    assert torch.equal(result["logits"], model(ids).logits)
    assert torch.equal(result["generated"], model.generate(ids, max_new_tokens=5))
    # The code is saved again with the model, and here the folder still loads as btlm's own class.
    assert {file.name for file in again.glob("*.py")} == {file.name for file in (tmp_path / "with-code").glob("*.py")}
    assert isinstance(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True), BTLMLMHeadModel)


def test_code_is_saved_only_where_asked(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "with", save_code=True)
    model.save_pretrained(tmp_path / "without")
    assert list((tmp_path / "with").glob("*.py"))
    assert not list((tmp_path / "without").glob("*.py"))
    assert "auto_map" in json.loads((tmp_path / "with" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())


def test_every_file_of_the_network_travels(tmp_path):
    tiny_model().save_pretrained(tmp_path, save_code=True)
    source = Path(sys.modules[BTLMConfig.__module__].__file__ or "").parent
    expected = {file.name for file in source.glob("*.py")} - {"__init__.py"}
    assert {file.name for file in tmp_path.glob("*.py")} == expected - {"classification_btlm.py"}
    BTLMForTokenClassification(tiny_config()).save_pretrained(tmp_path, save_code=True)
    assert {file.name for file in tmp_path.glob("*.py")} == expected


@pytest.fixture(scope="module")
def full_vocabulary():
    torch.manual_seed(0)
    return BTLMLMHeadModel(BTLMConfig(n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()


def test_the_tokenizer_goes_along_with_the_full_vocabulary(tmp_path, full_vocabulary):
    full_vocabulary.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["Hello world", "Hi"], return_tensors="pt", padding=True)
    assert batch["input_ids"].tolist() == [[15496, 995], [17250, 50256]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_a_tokenizer_that_is_there_is_kept(tmp_path, full_vocabulary):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    full_vocabulary.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"


def test_no_tokenizer_goes_along_with_another_vocabulary(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("tokenizer*"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
