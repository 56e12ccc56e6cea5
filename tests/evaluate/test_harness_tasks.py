import logging

import pytest

from btlm.errors import OptionError
from btlm.evaluate.harness_tasks import load_tasks, quiet_harness
from btlm.evaluate.suites import SUITES, TASKS
from tests.evaluate.quiz import question, write_data, write_lines, write_tasks


@pytest.fixture(autouse=True)
def _quiet():
    with quiet_harness():
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def test_no_progress_bars_even_if_asked_for(capsys):
    from tqdm import tqdm

    list(tqdm(range(2), disable=False))
    assert capsys.readouterr().err == ""


def documents(loaded, task):
    return list(loaded.tasks["tasks"][task].eval_docs)


def test_a_task_reads_local_files(tasks, data):
    with load_tasks(["quiz", "writing"], data=data, include=tasks, shots=2) as loaded:
        assert [one["question"] for one in documents(loaded, "quiz")] == [question(i)["question"] for i in range(12)]
        assert documents(loaded, "writing")[0] == {"question": "a b", "answer": "c"}
        quiz = loaded.tasks["tasks"]["quiz"]
        prompt = quiz.fewshot_context(documents(loaded, "quiz")[0], num_fewshot=2)
        assert prompt.startswith(f"Question: {question(100)['question']}\nAnswer: ")
        assert quiz.get_config("num_fewshot") == 2
        assert list(map(len, loaded.data_sha256["quiz"])) == [64, 64]


def test_a_group_and_a_tag_read_the_rows_of_their_subjects(tasks, data):
    for name in ("quizzes", "quizzes_all"):
        with load_tasks([name], data=data, include=tasks) as loaded:
            assert loaded.leaves == {name: ["quiz_first", "quiz_second"]}
            for number, task in enumerate(["quiz_first", "quiz_second"]):
                expected = [question(i)["question"] for i in range(12) if i % 2 == number]
                assert [one["question"] for one in documents(loaded, task)] == expected


def test_examples_are_needed_only_where_there_are_shots(tasks, data):
    (data / "quiz_dev.jsonl").unlink()
    with load_tasks(["quiz"], data=data, include=tasks) as loaded:
        assert loaded.tasks["tasks"]["quiz"].get_config("num_fewshot") == 0
    with (
        pytest.raises(OptionError, match=r"has no file quiz_dev\.jsonl"),
        load_tasks(["quiz"], data=data, include=tasks, shots=1),
    ):
        pass


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([question(0), "{broken"], r"quiz_test\.jsonl, line 2 is not JSON"),
        ([question(0), "", "[1]"], r"quiz_test\.jsonl, line 3 is not an object"),
        ([question(0), {"question": "a"}], r"quiz_test\.jsonl, line 2 has no subject"),
        ([question(0), {**question(1), "answer": "B"}], r"quiz_test\.jsonl, line 2: answer is 'B'"),
        ([], r"quiz_test\.jsonl has no rows"),
        ([{"other": 1}], r"The rows of quiz in .* are not those that the task reads"),
    ],
)
def test_malformed_data_are_told_with_file_and_line(tasks, data, rows, message):
    write_lines(data / "quiz_test.jsonl", rows)
    with pytest.raises(ValueError, match=message), load_tasks(["quiz"], data=data, include=tasks):
        pass


def test_what_is_not_there_is_told(tasks, data, tmp_path):
    for names, given, message in [
        (["quizz"], {"data": data}, "quizz, which is neither a suite nor a task: did you mean quiz?"),
        (["???"], {"data": data}, "the suites are table1"),
        (["quiz"], {}, "The data of quiz cannot be loaded"),
        (["quiz"], {"data": tmp_path / "none"}, "which is not a folder"),
        (["quiz"], {"data": data, "include": tmp_path / "none"}, "which is not a folder"),
    ]:
        with pytest.raises(OptionError) as error, load_tasks(names, **{"include": tasks, **given}):
            pass
        assert message in str(error.value)


def test_logs_and_bars_are_as_before():
    from tqdm import tqdm

    logging.getLogger("lm_eval").setLevel(logging.INFO)
    with quiet_harness():
        assert list(tqdm([1])) == [1]
        assert logging.getLogger("lm_eval").level == logging.ERROR
    assert logging.getLogger("lm_eval").level == logging.INFO


# The harness' own tasks. To find them, it reads thousands of files.

PIQA = {"goal": "To open a door", "sol1": "turn the handle.", "sol2": "turn the floor.", "label": 0}
HELLASWAG = {"query": "A man sits. He", "choices": ["stands up.", "is blue.", "rains.", "sings to"], "gold": 0}
MMLU = {"question": " What is it?", "choices": ["a", "b", "c", "d"], "answer": 2}


@pytest.mark.slow
def test_stock_tasks_on_local_files(tmp_path, capsys):
    write_lines(tmp_path / "piqa_validation.jsonl", [PIQA])
    write_lines(tmp_path / "hellaswag_validation.jsonl", [HELLASWAG])
    subjects = ("anatomy", "virology")
    for split, number in (("dev", 5), ("test", 2)):
        rows = [{"subject": subject, **MMLU} for subject in subjects for _ in range(number)]
        write_lines(tmp_path / f"mmlu_{split}.jsonl", rows)
    with load_tasks(["mmlu_anatomy", "mmlu_virology"], data=tmp_path, shots=5) as loaded:
        assert {task.get_config("num_fewshot") for task in loaded.tasks["tasks"].values()} == {5}
        assert len(documents(loaded, "mmlu_anatomy")) == 2
    with load_tasks(["piqa", "hellaswag"], data=tmp_path) as loaded:
        assert loaded.tasks["tasks"]["piqa"].doc_to_text(PIQA) == "Question: To open a door\nAnswer:"
        task = loaded.tasks["tasks"]["hellaswag"]
        document = documents(loaded, "hellaswag")[0]
        assert (task.doc_to_choice(document), task.doc_to_target(document)) == (HELLASWAG["choices"], 0)
    with (
        pytest.raises(OptionError, match=r"has no file mmlu_abstract_algebra_test\.jsonl"),
        load_tasks(["mmlu"], data=tmp_path),
    ):
        pass
    capsys.readouterr()
    with load_tasks(["table1", "piqa"], data=tmp_path) as loaded:
        assert list(loaded.leaves) == ["piqa", "hellaswag"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no files of social_iqa, winogrande, " in error
    with (
        pytest.raises(OptionError, match="has files of none of the tasks: lambada"),
        load_tasks(["other"], data=tmp_path),
    ):
        pass


@pytest.mark.slow
def test_the_suites_name_tasks_of_the_harness_with_the_metric_of_the_paper(tmp_path):
    from btlm.evaluate.harness_tasks import _stock

    index = _stock().task_index
    for name in {name for suite in SUITES.values() for name in suite}:
        config = index[TASKS[name].stock or name].cfg | TASKS[name].changes
        metrics = {one["metric"] for one in config.get("metric_list") or config["aggregate_metric_list"]}
        assert TASKS[name].metric in metrics


SENTENCES = ["The committee agreed on the budget.", "Buses will run every ten minutes.", "The bridge needs repairs."]


@pytest.mark.slow
def test_long_texts_are_scored_by_rouge(tmp_path):
    from btlm.evaluate.tasks.rouge import process_results

    rows = [{"context": " ".join(SENTENCES), "question": f"What about {i}?", "answers": SENTENCES} for i in range(2)]
    for name in ("qmsum", "gov_report"):
        write_lines(tmp_path / f"{name}_test.jsonl", rows)
    with load_tasks(["long"], data=tmp_path) as loaded:
        assert list(loaded.leaves) == ["qmsum", "gov_report"]
        task = loaded.tasks["tasks"]["qmsum"]
        text = task.doc_to_text(rows[1])
        assert text == f"{rows[1]['context']}\n\nQuestion: What about 1?\nAnswer:"
        assert task.process_results(rows[0], ["the bus runs every 10 minutes"]) == process_results(
            rows[0], ["the bus runs every 10 minutes"]
        )
        assert loaded.tasks["tasks"]["gov_report"].doc_to_text(rows[0]).endswith("\n\nSummary:")
    scores = process_results({"answers": ["a bridge needs repairs", "no"]}, ["The bridges need a repair"])
    # Five words and four, with the stems bridg, need, a, repair in common, and only "bridg need" next to one another.
    assert scores == pytest.approx({"rouge1": 2 * 4 / 9, "rouge2": 2 * 1 / 7, "rougeL": 2 * 3 / 9})
    assert process_results({"answers": ["x"]}, [""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
