"""Importing btlm is fast, and Transformers knows BTLM whichever of the two is imported first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import btlm
from tests.checkpoint.tiny import save_tiny


def run_python(*arguments, cwd=None):
    # Warnings are errors in that process too.
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(btlm.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["btlm", "btlm.cli"])
def test_import_waits_for_torch_and_transformers(module):
    program = f"import sys, {module}; print({{'torch', 'transformers', 'btlm.model'}} & set(sys.modules))"
    assert run_python("-c", program) == "set()"


def test_names_are_those_of_the_model_package():
    from btlm import model

    assert btlm.BTLMConfig is model.BTLMConfig
    assert btlm.BTLMModel is model.BTLMModel
    assert btlm.BTLMLMHeadModel is model.BTLMLMHeadModel
    assert set(btlm.__all__) <= set(dir(btlm))
    with pytest.raises(AttributeError, match="no attribute 'BTLMTokenizer'"):
        _ = btlm.BTLMTokenizer


# Programs that import btlm and Transformers; `during(module, act)` acts before that module of Transformers runs.
IMPORTS = {
    "btlm first": "import btlm, transformers",
    "Transformers first": "from transformers import AutoModelForCausalLM; import btlm",
    "with part of Transformers": "import transformers.modeling_utils, btlm",
    "the model first": "from btlm.model import BTLMConfig; import transformers",
    "everything of btlm first": "from btlm import *; import transformers",
    "the configuration first": "import btlm.model.configuration_btlm",
    "another file of the network first": "import btlm.model.quantization_btlm",
    "the facts first": "import btlm.model.architecture_btlm, transformers",
    "inside transformers": """
during("transformers.utils", lambda: importlib.import_module("btlm"))
import transformers
""",
    "inside a module of Transformers": """
during("transformers.generation.utils", lambda: importlib.import_module("btlm"))
from transformers import AutoModelForCausalLM
""",
    "the model inside a module of Transformers": """
def import_model():
    with contextlib.suppress(ImportError):  # what it needs is not there yet
        importlib.import_module("btlm").BTLMConfig
during("transformers.generation.utils", import_model)
from transformers import AutoModelForCausalLM
""",
    "inside an import that fails": """
def fail():
    import btlm
    raise ImportError
during("transformers.utils", fail)
with contextlib.suppress(ImportError):
    import transformers
""",
    "both in a thread": """
thread = threading.Thread(target=lambda: (importlib.import_module("transformers"), importlib.import_module("btlm")))
thread.start()
thread.join()
""",
    "while a thread imports Transformers": """
half, imported = threading.Event(), threading.Event()
during("transformers.utils", lambda: (half.set(), imported.wait()))
thread = threading.Thread(target=lambda: importlib.import_module("transformers"))
thread.start()
half.wait()
import btlm
imported.set()
thread.join()
""",
    "Transformers in a forked child": """
import btlm
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
    "both before a fork": """
import transformers, btlm
with warnings.catch_warnings(action="ignore"):  # Python 3.12 and later: the process has threads
    child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
    "in a spawned child": """
import multiprocessing
import btlm
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=int)
    child.start()
    child.join()
    sys.exit(child.exitcode)
""",
}
AUTO_CLASSES = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()
for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    print(type(auto.from_pretrained(sys.argv[1])).__name__, flush=True)
"""
NAMES = ["BTLMConfig", "BTLMModel", "BTLMLMHeadModel", "BTLMForSequenceClassification"]
DURING = """
import contextlib, importlib, importlib.util, os, sys, threading, warnings

class During:
    def __init__(self, name, act):
        self.name, self.act = name, act

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def act_and_execute(module):  # not in a finder, which until Python 3.11 holds the lock of all imports
            self.act()
            execute(module)

        spec.loader.exec_module = act_and_execute
        return spec

def during(name, act):
    sys.meta_path.insert(0, During(name, act))
"""
NAMED_LIKE_LIBRARIES = (
    "kernels",
    "tokenizers",
    "torch",
    "numpy",
    "datasets",
    "transformers",
    "registration",
    "console",
)


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_auto_classes_know_btlm_in_any_order_of_imports(tmp_path, imports):
    save_tiny(tmp_path / "model")
    (tmp_path / "program.py").write_text(DURING + imports + AUTO_CLASSES)
    printed = run_python("-P", tmp_path / "program.py", tmp_path / "model")
    assert printed.split() == NAMES


def test_btlm_waits_for_a_half_imported_transformers(tmp_path):
    """With stand-ins for Transformers and for ``btlm.model``, which are quick to import."""
    program = """
import importlib.util, sys
class Model:
    def find_spec(self, name, path, target=None):
        if name == "btlm.model":
            return importlib.util.spec_from_loader(name, self)
    def create_module(self, spec):
        pass
    def exec_module(self, module):
        print("model")
        module.__getattr__ = lambda name: None
class Auto:
    def register(self, *args, **kwargs):
        print("registered")
sys.meta_path.insert(0, Model())
sys.path.insert(0, sys.argv[1])
import transformers
"""
    (tmp_path / "transformers.py").write_text(
        "import sys, btlm\n__getattr__ = lambda name: sys.modules['__main__'].Auto()\nprint('transformers')\n"
    )
    assert run_python("-c", program, tmp_path).split() == ["transformers", "model", *6 * ["registered"]]


def test_btlm_imports_where_files_are_named_like_libraries(tmp_path):
    for name in NAMED_LIKE_LIBRARIES:
        (tmp_path / f"{name}.py").write_text("raise ImportError(__file__)")
    assert run_python("-c", "import btlm; print(btlm.__version__)", cwd=tmp_path) == btlm.__version__


@pytest.mark.slow
def test_transformers_knows_btlm_where_files_are_named_like_libraries(tmp_path):
    """Without ``-P``, Python itself imports those files; a library that Transformers can do without must not matter."""
    save_tiny(tmp_path / "model")
    (tmp_path / "kernels.py").write_text("import btlm")
    (tmp_path / "program.py").write_text("import sys\nfrom transformers import Trainer\nimport btlm" + AUTO_CLASSES)
    assert run_python(tmp_path / "program.py", tmp_path / "model").split() == NAMES
    for name in NAMED_LIKE_LIBRARIES:
        (tmp_path / f"{name}.py").write_text("raise ImportError(__file__)")
    assert run_python("-P", tmp_path / "program.py", tmp_path / "model", cwd=tmp_path).split() == NAMES
