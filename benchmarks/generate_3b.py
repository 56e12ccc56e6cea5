"""Speed and peak memory of generating with BTLM-3B-8k's shape, with random weights in bf16, on this machine.

python benchmarks/generate_3b.py [--prompt 512] [--new 32] [--repeats 3]
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from tiny_inputs import SIZES, add_smoke

from btlm import BTLMConfig, BTLMLMHeadModel
from btlm.train import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "btlm-3b.yaml"


def main() -> None:
    """Build, generate and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--new", type=int, default=32, help="generated tokens")
    parser.add_argument("--repeats", type=int, default=3)
    add_smoke(parser)
    args = parser.parse_args()
    config = load_recipe(RECIPE).config
    if args.smoke:
        config = BTLMConfig(**config.to_dict() | SIZES)
        args.prompt, args.new, args.repeats = 8, 2, 1
    torch.manual_seed(0)
    started = time.perf_counter()
    with torch.device("meta"):
        model = BTLMLMHeadModel(config)
    # The cost does not depend on the values, so the initialization is cheaper than the truncated normal of training.
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    built = time.perf_counter() - started
    ids = torch.randint(0, model.config.vocab_size, (1, args.prompt))
    prefill, decode = [], []
    with torch.inference_mode():
        for _ in range(args.repeats + 1):  # the first is a warm-up
            started = time.perf_counter()
            output = model(ids, logits_to_keep=1)
            prefill.append(args.prompt / (time.perf_counter() - started))
            started = time.perf_counter()
            for _ in range(args.new):
                token = output.logits[:, -1:].argmax(-1)
                output = model(token, past_key_values=output.past_key_values)
            decode.append(args.new / (time.perf_counter() - started))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16, medians of {args.repeats}\n")
    print("| parameters | built s | prompt tokens | prefill tok/s | decode tok/s | peak resident GiB |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {model.num_parameters():,} | {built:.0f} | {args.prompt} | {statistics.median(prefill[1:]):.1f} "
        f"| {statistics.median(decode[1:]):.2f} | {peak:.1f} |"
    )


if __name__ == "__main__":
    main()
