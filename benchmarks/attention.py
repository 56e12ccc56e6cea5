"""One BTLM-3B block with ALiBi folded into head dimensions, without ALiBi, and with an additive mask.

    python benchmarks/attention.py [--tokens 2048 8192] [--repeats 5] [--clock wall]

All are this package's block, forward and forward + backward. "plain" is the same fused attention without ALiBi; "mask"
passes ALiBi and causality to it as a tensor ``[1, heads, tokens, tokens]`` in bf16, as Transformers' models do. Each
measurement runs in its own process, in turn, so that peak memories are separate. Prints medians, ratios and peak
resident memory. ``--clock cpu`` counts the processor time of all threads, for machines in use.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny_inputs import add_smoke

SHAPE = {
    "n_embd": 2560,
    "n_layer": 32,
    "n_head": 32,
    "n_inner": 6826,
    "n_positions": 8192,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "mup_width_scale": 0.1,
    "mup_embeddings_scale": 14.6,
    "mup_output_alpha": 2.22,
    "mup_scale_qk_dot_by_d": True,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FORMS = ("folded", "plain", "mask")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SMOKE_SHAPE = SHAPE | {"n_embd": 128, "n_inner": 256}


def measure(form: str, tokens: int, backward: bool, shape: dict[str, Any], clock: str) -> dict[str, float]:
    """Seconds and peak memory of one pass in this process, without the block's own memory, after a warm-up."""
    from btlm import BTLMConfig
    from btlm.model.alibi import alibi_slopes, attention_bias, fold_attention_bias
    from btlm.model.attention_btlm import AttentionPlan
    from btlm.model.modeling_btlm import BTLMBlock

    torch.manual_seed(0)
    config = BTLMConfig(**shape)
    block = BTLMBlock(config, layer_idx=0).to(torch.bfloat16)
    hidden = torch.randn(1, tokens, config.n_embd, dtype=torch.bfloat16, requires_grad=backward)

    def plan(tokens: int) -> AttentionPlan:
        positions = torch.arange(tokens)
        slopes = alibi_slopes(config.n_head)[None]
        common: dict[str, Any] = {"num_keys": tokens, "query_positions_Q": positions, "scale": config.attention_scale}
        if form == "mask":
            mask = attention_bias(slopes, positions, tokens, None).to(torch.bfloat16)
            return AttentionPlan(**common, is_causal=False, mask=mask)
        if form == "plain":
            return AttentionPlan(**common, is_causal=True)
        features = fold_attention_bias(
            slopes, positions, tokens, None, scale=config.attention_scale, dtype=torch.bfloat16
        )
        return AttentionPlan(**common, is_causal=True, slopes_BH=slopes, features=features)

    warm_up, _ = block(hidden[:, :128], plan(128))
    if backward:
        warm_up.sum().backward()
        block.zero_grad()
        hidden.grad = None
    base = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the block
    started = CLOCKS[clock]()
    with torch.set_grad_enabled(backward):
        output, _ = block(hidden, plan(tokens))
    if backward:
        output.sum().backward()
    seconds = CLOCKS[clock]() - started
    return {"seconds": seconds, "peak_mb": resident_mb("VmHWM") - base}


def resident_mb(field: str) -> float:
    """Resident memory of this process now (``VmRSS``) or at its peak (``VmHWM``); Linux."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def main() -> None:
    """Run the forms in turn and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    add_smoke(parser)
    parser.add_argument("--one", nargs=3, metavar=("FORM", "TOKENS", "BACKWARD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        form, tokens, backward = args.one
        print(json.dumps(measure(form, int(tokens), backward == "1", SMOKE_SHAPE if args.smoke else SHAPE, args.clock)))
        return
    if args.smoke:
        args.tokens, args.repeats = [128], 1
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16, batch 1, medians of {args.repeats}\n")
    print(f"| tokens | pass | form | {args.clock} s | folded / form | MB |")
    print("|---|---|---|---|---|---|")
    for tokens in args.tokens:
        for backward in (False, True):
            runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
            for _ in range(args.repeats):
                for form, results in runs.items():
                    command = [sys.executable, __file__, "--one", form, str(tokens), str(int(backward))]
                    command += ["--clock", args.clock, *(["--smoke"] if args.smoke else [])]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    results.append(json.loads(done.stdout))
            name = "forward + backward" if backward else "forward"
            for form, results in runs.items():
                pairs = zip(runs["folded"], results, strict=True)
                ratio = statistics.median(folded["seconds"] / other["seconds"] for folded, other in pairs)
                seconds, peak = (statistics.median(r[key] for r in results) for key in ("seconds", "peak_mb"))
                print(f"| {tokens:,} | {name} | {form} | {seconds:.3f} | {ratio:.2f} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
