"""Errors of several ways to compute ALiBi attention, relative to fp64, by length and dtype.

    python benchmarks/alibi_exactness.py [--tokens 512 2048 8192]

Eight heads of dimension 64 with BTLM-3B's steepest to gentlest slopes and scores / 64. Every form gets the same rounded
queries, keys and values as the fp64 reference, so that only the arithmetic of attention differs. Prints the largest
error of an output element (outputs are averages of standard normal values).
"""

import argparse

import torch
import torch.nn.functional as F
from tiny_inputs import add_smoke
from torch import Tensor

from btlm.model.alibi import alibi_slopes, attention_bias, fold_attention_bias

HEADS, HEAD_DIM = 8, 64
SCALE = 1 / HEAD_DIM
ROW_TERM = slice(2, 5)  # columns of the features that hold -slope * i


def exact(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """Attention in fp64, one head at a time."""
    positions = torch.arange(query.shape[2], dtype=torch.float64)
    distance = positions[:, None] - positions
    outputs = []
    for q, k, v, slope in zip(query[0].double(), key[0].double(), value[0].double(), slopes.double(), strict=True):
        scores = (q @ k.T * SCALE - slope * distance).masked_fill(distance < 0, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.stack(outputs)[None]


def folded(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, *, before: bool, row_term: bool) -> Tensor:
    """ALiBi in extra dimensions before or behind those of the head, with or without its row term."""
    tokens = query.shape[2]
    q_features, k_features = fold_attention_bias(
        slopes[None], torch.arange(tokens), tokens, None, scale=SCALE, dtype=query.dtype
    )
    if not row_term:
        q_features[..., ROW_TERM] = 0
    k_features = k_features.expand(-1, HEADS, -1, -1)
    pairs = [(q_features, query), (k_features, key)]
    q, k = (torch.cat(pair if before else pair[::-1], dim=-1) for pair in pairs)
    v = F.pad(value, (0, q_features.shape[-1]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)[..., :HEAD_DIM]


def masked(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The same fused attention with ALiBi and causality as a mask tensor."""
    tokens = query.shape[2]
    bias = attention_bias(slopes[None], torch.arange(tokens), tokens, None)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=SCALE)


def plain(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """Explicit scores, bias and softmax in the dtype of the model, as in the original code."""
    tokens = query.shape[2]
    bias = attention_bias(slopes[None], torch.arange(tokens), tokens, None)
    scores = query @ key.transpose(-1, -2) * SCALE + bias.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    return scores.softmax(-1) @ value


FORMS = {
    "folded before the head, row term (used)": lambda *x: folded(*x, before=True, row_term=True),
    "folded behind the head, no row term": lambda *x: folded(*x, before=False, row_term=False),
    "additive mask": masked,
    "plain scores": plain,
}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    add_smoke(parser)
    args = parser.parse_args()
    if args.smoke:
        args.tokens = [32]
    slopes = alibi_slopes(32)[[0, 4, 9, 13, 18, 22, 27, 31]]
    columns = [(tokens, dtype) for tokens in args.tokens for dtype in (torch.float32, torch.bfloat16)]
    errors: dict[str, list[str]] = {name: [] for name in FORMS}
    for tokens, dtype in columns:
        torch.manual_seed(0)
        query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM).to(dtype) for _ in range(3))
        reference = exact(query, key, value, slopes)
        for name, form in FORMS.items():
            errors[name].append(f"{(form(query, key, value, slopes).double() - reference).abs().max():.1e}")
    print(f"torch {torch.__version__}\n")
    print("| | " + " | ".join(f"{tokens:,} {str(dtype)[6:]}" for tokens, dtype in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in errors.items():
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
