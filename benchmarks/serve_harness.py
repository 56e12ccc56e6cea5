"""lm-evaluation-harness through the server: the same answers as in the process?

    python benchmarks/serve_harness.py [MODEL] --data questions/ --tasks piqa lambada_openai [--limit 100]

The harness' model ``local-completions`` asks `btlm serve` for the log-probabilities of prompts (``echo``), and
`btlm eval`'s model asks the engine in this process. For every task: the largest difference between log-likelihoods, the
number of answers of which only one is right, the scores of both, and their requests per second.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from harness_equality import Run, ask, compared, measure_questions, question_parser
from served import serving

from btlm.console import quiet_transformers
from btlm.evaluate.harness_tasks import load_tasks, offline, quiet_harness

_NAME = "served"


def main() -> None:
    """Print a Markdown table."""
    parser = question_parser(__doc__)
    parser.add_argument("--concurrent", type=int, default=16, help="requests at a time")
    measure_questions(parser, measure)


def measure(args: argparse.Namespace) -> None:
    """Ask both, task by task, and print."""
    print("| task | requests | largest difference | other answers right | served | in process | requests/s | | ratio |")
    print(f"|---{'|---' * 8}|", flush=True)
    flags = ["--context", str(args.context + 1), "--max-requests", str(args.concurrent), "--served-name", _NAME]
    with serving(args.model, *flags) as (url, _), quiet_harness(), quiet_transformers(), offline():
        for task in args.tasks:
            served, inside = ask_server(url, task, args), ask("btlm", Path(args.model), task, args)
            speed = [run.requests / run.seconds for run in (served, inside)]
            cells = [task, f"{served.requests:,}", *compared(served, inside)]
            cells += [f"{100 * run.score:.2f}" for run in (served, inside)]
            cells += [f"{value:.1f}" for value in speed] + [f"{speed[0] / speed[1]:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def ask_server(url: str, task: str, args: argparse.Namespace) -> Run:
    """One task, through the server."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    include = None if args.include is None else Path(args.include)
    with load_tasks([task], data=Path(args.data), include=include) as loaded:
        lm: Any = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model=_NAME,
            tokenizer=str(args.model),
            tokenizer_backend="huggingface",  # "remote" asks the server, one text at a time
            num_concurrent=args.concurrent,
            max_length=args.context,
        )
        start = time.perf_counter()
        found = evaluate(lm=lm, task_dict=loaded.tasks, limit=args.limit, bootstrap_iters=0, log_samples=True)
        return Run(found, task, time.perf_counter() - start)


if __name__ == "__main__":
    main()
