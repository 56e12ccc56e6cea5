"""`btlm eval` against lm-evaluation-harness' own model for Transformers: the same answers? And how fast?

    python benchmarks/harness_equality.py [MODEL] --data questions/ --tasks piqa openbookqa [--limit 100] [--turns 3]

The weights of MODEL are decoded to fp32, and this copy is asked the same questions by the engine ("fp32") and by the
harness' ``hf``, in turns A B A B. For every task: the largest difference between log-likelihoods, the number of answers
of which only one is right, the scores of both, and their requests per second, medians over the turns. With a quantized
MODEL, its own folder ("as stored") is asked, too, and compared with ``hf`` on the decoded weights.

``hf`` has batches of ``--batch-sizes``, of which the fastest counts. Its automatic batch size tries to allocate logits
for the whole context, and is of no use on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_inputs import add_smoke, write_model

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint, load_model
from btlm.console import quiet_transformers
from btlm.evaluate.harness_tasks import load_tasks, offline, quiet_harness
from btlm.evaluate.suites import TASKS

Answers = list[tuple[float, ...]]


class Run:
    """What one model answered to one task.

    Args:
        found: What the harness returned.
        task: Name of the task or group.
        seconds: Time of the requests, without that of loading tasks and model.
    """

    def __init__(self, found: dict[str, Any], task: str, seconds: float) -> None:
        self.answers: dict[tuple[str, int], Answers] = {}
        self.right: dict[tuple[str, int], float] = {}
        for name, samples in found["samples"].items():
            for sample in samples:
                key = (name, sample["doc_id"])
                self.answers[key] = [_numbers(one) for one in sample["filtered_resps"]]
                self.right[key] = float(sample.get("acc", sample.get("exact_match", 0.0)))
        figures = {**found["results"], **found.get("groups", {})}[task]
        metric = TASKS[task].metric if task in TASKS else "acc"
        self.score = next(
            value for key, value in figures.items() if key.partition(",")[0] == metric and isinstance(value, float)
        )
        self.requests, self.seconds = sum(map(len, self.answers.values())), seconds


def _numbers(answer: Any) -> tuple[float, ...]:
    return tuple(map(float, answer)) if isinstance(answer, (list, tuple)) else (float(answer),)


def main() -> None:
    """Print a Markdown table."""
    parser = question_parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8], help="of hf")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file that receives all figures, as JSON")
    measure_questions(parser, measure)


def measure_questions(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], None]) -> None:
    """Read the command line, and measure with the questions that it names, or with a quiz for ``--smoke``."""
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            args.model, args.tasks, args.context = str(write_model(Path(folder))), ["quiz"], 64
            args.data = args.include = str(write_quiz(Path(folder)))
            measure(args)
        return
    if not args.data:
        print("Nothing is measured without questions: give --data.")
        return
    measure(args)


def question_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that say which model is asked what."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", default=str(BUNDLED_MODEL))
    parser.add_argument("--data", help="folder of questions, as of btlm eval")
    parser.add_argument("--include", help="folder of further tasks, as of btlm eval")
    parser.add_argument("--tasks", nargs="+", default=["piqa", "openbookqa"])
    parser.add_argument("--limit", type=int, help="questions per task, at most")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a request, at most")
    return parser


def write_quiz(folder: Path) -> Path:
    """A task of four questions with two answers each."""
    (folder / "quiz.yaml").write_text(
        "task: quiz\\ndataset_path: none\\noutput_type: multiple_choice\\ntest_split: test\\n"
        'doc_to_text: "{{question}}"\\ndoc_to_choice: [" yes", " no"]\\ndoc_to_target: answer\\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\\n".replace("\\n", "\n")
    )
    rows = [{"question": f"Is {i} more than {i * i % 5}?", "answer": i % 2} for i in range(4)]
    (folder / "quiz_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def measure(args: argparse.Namespace) -> None:
    """Ask all, task by task, and print."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, contexts of {args.context:,}\n")
    print(
        "| task | requests | largest difference | other answers right | fp32 | hf | requests/s: fp32 | hf | ratio "
        "| as stored: score | largest difference | other answers right | requests/s | ratio |"
    )
    print(f"|---{'|---' * 13}|")
    quantized = Checkpoint.open(args.model).architecture.quantization is not None
    with tempfile.TemporaryDirectory() as folder, quiet_harness(), quiet_transformers(), offline():
        plain = Path(folder) / "fp32"
        model, tokenizer = load_model(args.model, dtype="float32", device="cpu")
        model.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        del model
        for task in args.tasks:
            runs: dict[str, list[Run]] = {"fp32": [], "hf": [], "stored": []}
            for _ in range(args.turns):
                runs["fp32"].append(ask("btlm", plain, task, args))
                runs["hf"].append(min((ask("hf", plain, task, args, n) for n in args.batch_sizes), key=_seconds))
                if quantized:
                    runs["stored"].append(ask("btlm", Path(args.model), task, args))
            report(task, runs)
            if args.output is not None:
                figures = {name: [(run.score, run.requests, run.seconds) for run in of] for name, of in runs.items()}
                with args.output.open("a") as lines:
                    lines.write(json.dumps({task: figures}) + "\n")


def _seconds(run: Run) -> float:
    return run.seconds


def ask(kind: str, model: Path, task: str, args: argparse.Namespace, batch_size: int = 1) -> Run:
    """One model, one task."""
    from lm_eval.evaluator import evaluate

    include = None if args.include is None else Path(args.include)
    with load_tasks([task], data=Path(args.data), include=include) as loaded:
        if kind == "btlm":
            from btlm.evaluate.harness_model import EngineLM

            lm: Any = EngineLM(model, max_length=args.context)
        else:
            from lm_eval.models.huggingface import HFLM

            sizes = {"batch_size": batch_size, "max_length": args.context}
            lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", **sizes)
        start = time.perf_counter()
        found = evaluate(lm=lm, task_dict=loaded.tasks, limit=args.limit, bootstrap_iters=0, log_samples=True)
        return Run(found, task, time.perf_counter() - start)


def report(task: str, runs: dict[str, list[Run]]) -> None:
    """A row of the table."""
    hf = runs["hf"][0]
    speed = {name: statistics.median(run.requests / run.seconds for run in of) for name, of in runs.items() if of}
    cells = [task, f"{hf.requests:,}", *compared(runs["fp32"][0], hf)]
    cells += [f"{100 * run.score:.2f}" for run in (runs["fp32"][0], hf)]
    cells += [f"{speed['fp32']:.1f}", f"{speed['hf']:.1f}", f"{speed['fp32'] / speed['hf']:.2f}"]
    if runs["stored"]:
        stored = runs["stored"][0]
        cells += [f"{100 * stored.score:.2f}", *compared(stored, hf)]
        cells += [f"{speed['stored']:.1f}", f"{speed['stored'] / speed['hf']:.2f}"]
    else:
        cells += [""] * 5
    print(f"| {' | '.join(cells)} |", flush=True)


def compared(ours: Run, theirs: Run) -> tuple[str, str]:
    """The largest difference between log-likelihoods in nats, and the number of answers of which only one is right."""
    assert ours.answers.keys() == theirs.answers.keys()
    largest = max(
        abs(one[0] - other[0])
        for key in ours.answers
        for one, other in zip(ours.answers[key], theirs.answers[key], strict=True)
    )
    return f"{largest:.1e}", str(sum(ours.right[key] != theirs.right[key] for key in ours.right))


if __name__ == "__main__":
    main()
