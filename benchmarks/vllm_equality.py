"""BTLM in vLLM against the model itself: greedy text token by token, log-probabilities of a text.

    python benchmarks/vllm_equality.py [MODEL] [--dtypes float32 bfloat16] [--devices 1 2] [--compile]

Needs vLLM in the environment of btlm (`make vllm`). A quantized MODEL, which vLLM does not read, is unpacked first.
The reference is the model in Transformers in the same dtype; its greedy text in fp32 has to be that of the engine, too.
The last columns say how much of a difference is rounding: both are compared with fp32 on the same, rounded weights.
"""

import argparse
import os
import tempfile
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tiny_inputs import add_smoke, write_model

from btlm import BTLMLMHeadModel, __version__
from btlm.checkpoint import BUNDLED_MODEL, Checkpoint, load_model
from btlm.engine import Engine, GenerationOptions

PROMPTS = (
    "Albert Einstein was known for",
    "The capital of France",
    "def add(a, b):",
    "Once upon a time",
    "The population of the country",
    "To install the package, run",
)
TEXT = Path(__file__).parents[1] / "LICENSE"

Found = tuple[list[list[int]], list[float]]


def main() -> None:
    """Ask both and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", default=str(BUNDLED_MODEL))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1], help="of tensor parallelism")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model, as `vllm serve` does")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the scored text")
    parser.add_argument("--new", type=int, default=64, help="tokens of each greedy text")
    add_smoke(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.smoke:
            args.model, args.tokens, args.new = str(write_model(Path(folder))), 32, 2
            args.dtypes, args.devices = ["float32"], [1]
        measure(args, Path(folder))


def measure(args: argparse.Namespace, work: Path) -> None:
    """Print a row for each dtype and number of devices; without vLLM, leave its columns out."""
    tokenizer = Checkpoint.open(args.model).tokenizer
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    text = tokenizer.encode(TEXT.read_text()).ids[: args.tokens]
    expected, exact = {}, {}
    for dtype in args.dtypes:  # before vLLM binds this process to its cores
        model, _ = load_model(args.model, dtype=dtype, device="cpu")
        model.save_pretrained(work / dtype)
        expected[dtype] = ours(model, prompts, text, args.new)
        exact[dtype] = scores_of(model.float(), text)
        if dtype == "float32" and engine(work / dtype, prompts, args.new) != expected[dtype][0]:
            raise SystemExit("The engine and Transformers write different texts.")
    del model
    installed = (found := find_spec("vllm")) is not None and found.origin is not None  # not just a folder of that name
    rows = []
    for dtype, devices in product(args.dtypes, args.devices if installed else []):
        texts, scores = vllm(work / dtype, prompts, text, args.new, dtype, devices, not args.compile)
        theirs, reference = torch.tensor(scores), torch.tensor(expected[dtype][1])
        same = sum(one == other for one, other in zip(texts, expected[dtype][0], strict=True))
        between = (theirs - reference).abs()
        errors = [(found - torch.tensor(exact[dtype])).abs().mean() for found in (theirs, reference)]
        rows.append(
            f"| {dtype} | {devices} | {same} of {len(prompts)} | {between.max():.1e} | {between.mean():.1e} | "
            f"{errors[0]:.1e} | {errors[1]:.1e} |"
        )
    if not rows:
        print("Nothing is compared without vLLM: install it with `make vllm`.")
    print(f"\nbtlm {__version__}, torch {torch.__version__}, {len(prompts)} prompts, {args.new} greedy tokens each,")
    print(f"{len(text)} tokens scored (nats)\n")
    print("| dtype | devices | same text | largest difference | mean | vLLM to fp32, mean | ours to fp32, mean |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


def ours(model: Any, prompts: list[list[int]], text: list[int], new: int) -> Found:
    """Greedy continuations, and the log-probability of each token of a text but the first."""
    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
            texts.append(made[0, len(prompt) :].tolist())
    return texts, scores_of(model, text)


def scores_of(model: BTLMLMHeadModel, text: list[int]) -> list[float]:
    """The log-probability of each token of a text but the first."""
    with torch.inference_mode():
        logits = model(torch.tensor([text])).logits[0, :-1].float()
    scores: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
    return scores


def engine(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy continuations by btlm's own engine."""
    loaded = Engine.open(folder, context=max(map(len, prompts)) + new)
    return [
        [token.id for token in loaded.generate(prompt, GenerationOptions(max_new_tokens=new))] for prompt in prompts
    ]


def vllm(
    folder: Path, prompts: list[list[int]], text: list[int], new: int, dtype: str, devices: int, eager: bool
) -> Found:
    """The same as :func:`ours`, by vLLM."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if devices == 1:  # in this process, which starts faster
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        dtype=dtype,
        tensor_parallel_size=devices,
        max_model_len=max(len(text) + 1, 128),
        enforce_eager=eager,
    )
    greedy = SamplingParams(temperature=0, max_tokens=new)
    texts = [list(one.outputs[0].token_ids) for one in llm.generate([{"prompt_token_ids": p} for p in prompts], greedy)]
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    answer = llm.generate([{"prompt_token_ids": text}], score)[0].prompt_logprobs
    scores = [answer[i][text[i]].logprob for i in range(1, len(text))]
    del llm
    cleanup_dist_env_and_memory()
    return texts, scores


if __name__ == "__main__":
    main()
