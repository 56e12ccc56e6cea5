"""Importing btlm costs nothing, and Transformers knows BTLM from whatever side it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import btlm
from tests.checkpoint.tiny import save_tiny


def run_python(program, *arguments):
    # Every warning is an error there too.
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(btlm.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["btlm", "btlm.cli"])
def test_import_waits_for_torch_and_transformers(module):
    program = f"import sys, {module}; print({{'torch', 'transformers', 'btlm.model'}} & set(sys.modules))"
    assert run_python(program) == "set()"


def test_names_are_those_of_the_model_package():
    from btlm import model

    assert btlm.BTLMConfig is model.BTLMConfig
    assert btlm.BTLMModel is model.BTLMModel
    assert btlm.BTLMLMHeadModel is model.BTLMLMHeadModel
    assert set(btlm.__all__) <= set(dir(btlm))
    with pytest.raises(AttributeError, match="no attribute 'BTLMTokenizer'"):
        _ = btlm.BTLMTokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import btlm, transformers",
        "from transformers import AutoModelForCausalLM; import btlm",
        "import transformers.modeling_utils, btlm",
        "from btlm.model import BTLMConfig; import transformers",
        "from btlm import *; import transformers",
    ],
)
def test_auto_classes_know_btlm_in_any_order_of_imports(tmp_path, imports):
    save_tiny(tmp_path)
    program = f"""
import sys
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
"""
    assert run_python(program, tmp_path).split() == ["BTLMConfig", "BTLMModel", "BTLMLMHeadModel"]
