import json
import subprocess
import sys

import pytest

import btlm.evaluate.lm_eval_plugin  # adds the model to the harness
from tests.checkpoint.tiny import save_tiny
from tests.evaluate.quiz import CHOICE, question, write_lines

MODULE = btlm.evaluate.lm_eval_plugin.__name__


@pytest.fixture
def folder(tmp_path):
    """A model, and a task with its data, as a user of the harness has them."""
    save_tiny(tmp_path / "model", n_positions=256)
    data = write_lines(tmp_path / "quiz.jsonl", [question(i) for i in range(4)])
    kwargs = f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
    text = CHOICE.replace("nowhere/quiz", "json").replace("fewshot_split: dev\n", "")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.yaml").write_text(text + kwargs)
    return tmp_path


def test_the_harness_makes_the_model_by_its_name(folder):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=str(folder / "tasks"))
    arguments = f"pretrained={folder / 'model'},max_length=128,cache_dtype=bfloat16"
    found = simple_evaluate("btlm", arguments, tasks=["quiz"], task_manager=manager, batch_size=1, device="cuda:0")
    assert found["results"]["quiz"]["sample_len"] == 4
    assert len(found["config"]["model_sha"]) == 64


@pytest.mark.slow
def test_the_command_of_the_harness_runs_with_the_model(folder):
    arguments = ["run", "--model", "btlm", "--model_args", f"pretrained={folder / 'model'}", "--tasks", "quiz"]
    where = ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out")]
    subprocess.run([sys.executable, "-m", MODULE, *arguments, *where], check=True, capture_output=True)
    (written,) = (folder / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["quiz"]["sample_len"] == 4
