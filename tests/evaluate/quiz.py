"""Small tasks of lm-evaluation-harness, and their questions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ["river", "stone", "cloud", "apple", "house", "seven", "green", "music", "paper", "light"]

CHOICE = """
task: quiz
dataset_path: nowhere/quiz
output_type: multiple_choice
test_split: test
fewshot_split: dev
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_config:
  sampler: first_n
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata:
  version: 3.0
"""
SUBJECT = "include: quiz.yaml\ntask: quiz_{0}\ndataset_name: {0}\ntag: quizzes\n"
GROUP = """
group: quizzes_all
task: [quiz_first, quiz_second]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""
WRITE = """
task: writing
dataset_path: nowhere/writing
output_type: generate_until
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def question(number: int) -> dict[str, Any]:
    first, second, third = (WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 7))
    choices = [f"{first} and {second}", third, f"{second} {number}"]
    subject = ("first", "second")[number % 2]
    return {"subject": subject, "question": f"{first} {third}, {number}?", "choices": choices, "answer": number % 3}


def write_tasks(folder: Path) -> Path:
    """A folder of task files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"quiz": CHOICE, "first": SUBJECT.format("first"), "second": SUBJECT.format("second")}
    for name, text in (files | {"group": GROUP, "writing": WRITE}).items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def write_data(folder: Path, number: int = 12) -> Path:
    """A folder of questions."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "quiz_test.jsonl", [question(i) for i in range(number)])
    write_lines(folder / "quiz_dev.jsonl", [question(i) for i in range(100, 106)])
    write_lines(
        folder / "writing_validation.jsonl", [{"question": "a b", "answer": "c"}, {"question": "", "answer": ""}]
    )
    return folder


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
