"""The facts of BTLM, in the standard library alone: what a configuration may hold, and what follows from it.

Tensors and their muP rows, scales, slopes, counts of parameters, FLOPs and bytes, bit widths, the vocabulary, and the
numbers of BTLM-3B-8k. Every other part of btlm reads them here.

muP (maximal update parametrization, arXiv 2203.03466) is one table; ``width_scale`` is the base width over the width:

============================  ================================================  ===============  ============
tensors                       standard deviation at initialization              learning rate    weight decay
============================  ================================================  ===============  ============
wte, wpe, untied lm_head      initializer_range                                 lr               yes
c_attn, c_fc, c_fc2           initializer_range sqrt(width_scale)               lr width_scale   yes
attn.c_proj, mlp.c_proj       initializer_range sqrt(width_scale / 2 n_layer)   lr width_scale   yes
biases and LayerNorm          0 and 1                                           lr               no
============================  ================================================  ===============  ============

============================  ================================================
in the forward pass           multiplier
============================  ================================================
token embeddings              mup_embeddings_scale
query-key products            1 / head_dim (mup_scale_qk_dot_by_d)
logits                        mup_output_alpha mup_width_scale
============================  ================================================

Values of BTLM-3B: Cerebras modelzoo, ``params_btlm_2p7b_8k.yaml``. With ``mup_width_scale = 1`` the table is standard
parametrization with GPT-2's residual scaling.

Letters: V vocabulary, P positions, C width (``n_embd``), F width of the feed-forward layer, H heads.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from .config_keys_btlm import (
    COMMON_KEYS,
    MODEL_TYPE,
    adopt_older_keys,
    config_problems,
    quantization_problem,
)

# GPT-2's vocabulary, which is BTLM's.
VOCAB_SIZE = 50257
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
TOKENIZER_FOLDER = Path(__file__).parent / "tokenizer"


class MupRow(NamedTuple):
    """A row of the muP table: how some tensors are initialized, and the parameter group in which they are trained."""

    group: Literal["matrices", "embeddings", "biases_and_norms"]
    scales_with_width: bool = False
    """Initial variance and learning rate are multiplied by ``mup_width_scale``."""
    residual: bool = False
    """Initial variance is divided by ``2 n_layer`` too."""
    decays: bool = True


EMBEDDING = MupRow("embeddings")
HIDDEN = MupRow("matrices", scales_with_width=True)
RESIDUAL = MupRow("matrices", scales_with_width=True, residual=True)
VECTOR = MupRow("biases_and_norms", decays=False)

# The matrices of a block. GATE, whose product goes through SiLU, is there with SwiGLU only.
QUERY_KEY_VALUE, ATTENTION_OUTPUT = "attn.c_attn", "attn.c_proj"
UP, GATE, DOWN = "mlp.c_fc", "mlp.c_fc2", "mlp.c_proj"
# The other modules with weights.
TOKEN_TABLE, POSITION_TABLE, HEAD = "transformer.wte", "transformer.wpe", "lm_head"
FINAL_NORM, SLOPES = "transformer.ln_f", "transformer.relative_pe.slopes"

_MATRIX_ROWS = {QUERY_KEY_VALUE: HIDDEN, ATTENTION_OUTPUT: RESIDUAL, UP: HIDDEN, GATE: HIDDEN, DOWN: RESIDUAL}
# Last part of the name of a module -> its row.
MUP_TABLE = {
    **{name.rpartition(".")[2]: EMBEDDING for name in (TOKEN_TABLE, POSITION_TABLE, HEAD)},
    **{name.rpartition(".")[2]: row for name, row in _MATRIX_ROWS.items()},
}
# The names of the matrices of a block as adapters take them, each for all matrices with that last part.
MATRIX_NAMES = tuple(name for name, row in MUP_TABLE.items() if row.group == "matrices")


class Matrix(NamedTuple):
    """A matrix of a block; it has a bias, and its weights are stored as ``[inputs, outputs]``."""

    inputs: int
    outputs: int


class TensorFacts(NamedTuple):
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    kind: Literal["token table", "position table", "matrix", "bias", "norm", "slopes"]
    """A head of its own is a token table too. Slopes are stored, but not trained."""
    row: MupRow | None
    """None for slopes."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a folder are stored.

    Args:
        bits: Bits per weight in the blocks, 4 or 8.
        group_size: Number of inputs that share a scale, 64 or 128.
        table_bits: Bits per weight of the token table, and of the head where it is not tied, 4 or 8.
    """

    bits: int
    group_size: int
    table_bits: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network of the BTLM family: the keys of its ``config.json``, and what follows from them.

    Defaults are those of the original configuration class, as for :class:`btlm.BTLMConfig`, which describes the keys.
    :meth:`from_config` checks them; the constructor does not.
    """

    vocab_size: int = VOCAB_SIZE
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    position_embedding_type: str = "learned"
    mup_width_scale: float = 1.0
    mup_embeddings_scale: float = 1.0
    mup_output_alpha: float = 1.0
    mup_scale_qk_dot_by_d: bool = False
    alibi_scaling: dict[str, Any] | None = None
    bos_token_id: int | None = END_OF_TEXT_ID
    eos_token_id: int | list[int] | None = END_OF_TEXT_ID
    quantization: Quantization | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the contents of a ``config.json``; keys that say nothing about the network are passed over.

        Raises:
            ValueError: One line that names every impossible value, each with its remedy.
        """
        if config.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError(f"The model_type is {config['model_type']!r}, not {MODEL_TYPE!r}.")
        current, problems = adopt_older_keys(config)
        current = {COMMON_KEYS.get(key, key): value for key, value in current.items()}
        values = {item.name: current.get(item.name, item.default) for item in fields(cls)}
        stored = config.get("quantization_config")
        problems += config_problems(values)
        if stored is not None and (problem := quantization_problem(stored)):
            problems.append(problem)
        if problems:
            raise ValueError(f"Invalid BTLM configuration: {'; '.join(problems)}.")
        values["quantization"] = None  # a key of this name is not BTLM's
        if stored is not None:
            values["quantization"] = Quantization(stored["bits"], stored["group_size"], stored["table_bits"])
        return cls(**values)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by before ALiBi and softmax (without the inverse layer index)."""
        return attention_scale(self.head_dim, scaled=self.scale_attn_weights, by_head_dim=self.mup_scale_qk_dot_by_d)

    @property
    def logits_scale(self) -> float:
        """What the output of the head is multiplied by (muP)."""
        return self.mup_output_alpha * self.mup_width_scale

    def init_std(self, row: MupRow) -> float:
        """Standard deviation of the initial weights of a row of the muP table; 0 for biases and norms."""
        if row is VECTOR:
            return 0.0
        std = self.initializer_range * (math.sqrt(self.mup_width_scale) if row.scales_with_width else 1.0)
        return std / math.sqrt(2 * self.n_layer) if row.residual else std

    def lr_multiplier(self, row: MupRow) -> float:
        """What the learning rate at base width is multiplied by for a row of the muP table."""
        return self.mup_width_scale if row.scales_with_width else 1.0

    # Tensors

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices of a block, by their names in it."""
        width, inner = self.n_embd, self.inner_dim
        found = {
            QUERY_KEY_VALUE: Matrix(width, 3 * width),
            ATTENTION_OUTPUT: Matrix(width, width),
            UP: Matrix(width, inner),
            GATE: Matrix(width, inner),
            DOWN: Matrix(inner, width),
        }
        if self.activation_function != "swiglu":
            del found[GATE]
        return found

    @property
    def block_tensors(self) -> dict[str, TensorFacts]:
        """The tensors of a block, by their names in it."""
        matrices = self.matrices
        attention = {name: matrix for name, matrix in matrices.items() if name.startswith("attn.")}
        tensors = {**_norm("ln_1", self.n_embd), **_linear(attention), **_norm("ln_2", self.n_embd)}
        return tensors | _linear({name: matrix for name, matrix in matrices.items() if name not in attention})

    @property
    def tensors(self) -> dict[str, TensorFacts]:
        """The tensors of a checkpoint, in the order of the network; a tied head is not one of them."""
        width = self.n_embd
        tensors = {f"{TOKEN_TABLE}.weight": TensorFacts((self.vocab_size, width), "token table", EMBEDDING)}
        if self.position_embedding_type == "alibi":
            tensors[SLOPES] = TensorFacts((self.n_head,), "slopes", None)
        else:
            tensors[f"{POSITION_TABLE}.weight"] = TensorFacts((self.n_positions, width), "position table", EMBEDDING)
        block = self.block_tensors
        for layer in range(self.n_layer):
            tensors |= {f"{block_name(layer)}.{name}": tensor for name, tensor in block.items()}
        tensors |= _norm(FINAL_NORM, width)
        if not self.tie_word_embeddings:
            tensors[f"{HEAD}.weight"] = TensorFacts((self.vocab_size, width), "token table", EMBEDDING)
        return tensors

    # Costs. Each follows from the shape alone.

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Trained parameters; 2,646,255,744 for BTLM-3B-8k.

        Args:
            embeddings: Count the token and position tables and an untied head too.
        """
        block = sum(math.prod(tensor.shape) for tensor in self.block_tensors.values())
        total = self.n_layer * block + 2 * self.n_embd
        if embeddings:
            total += self.vocab_size * self.n_embd * (1 if self.tie_word_embeddings else 2)
            if self.position_embedding_type == "learned":
                total += self.n_positions * self.n_embd
        return total

    def adapted_matrices(self, targets: Iterable[str]) -> list[str]:
        """Names in a block of the matrices that adapters with these target modules are put on.

        Args:
            targets: The last parts of the names of modules, as PEFT takes them (``"c_proj"``, ``"mlp.c_proj"``).
        """
        targets = tuple(targets)
        return [name for name in self.matrices if any(is_target(target, name) for target in targets)]

    def num_adapter_parameters(self, rank: int, targets: Iterable[str]) -> int:
        """Parameters of low-rank adapters: ``rank * (inputs + outputs)`` per adapted matrix (arXiv 2106.09685).

        Args:
            rank: Rank of the adapters.
            targets: As for :meth:`adapted_matrices`.
        """
        matrices = self.matrices
        return self.n_layer * sum(rank * sum(matrices[name]) for name in self.adapted_matrices(targets))

    def flops_per_token(self, context: int, *, training: bool = False, adapters: int | None = None) -> float:
        """Floating-point operations per token, the mean over a causal sequence of ``context`` tokens.

        A multiply-add is two operations. Matrices and head take two per weight; query-key products and the weighted sum
        of values take ``4 * n_embd`` per visible key, of which a token of the sequence sees ``(context + 1) / 2``.
        Training takes three times the forward pass (PaLM, arXiv 2204.02311, appendix B, with causality counted). Frozen
        weights need no gradient, so they take two thirds of their share; attention takes all of its own.

        Args:
            context: Length of the sequence in tokens.
            training: Count the backward pass too.
            adapters: Number of parameters of low-rank adapters; all other weights are frozen. None without adapters.
        """
        width = self.n_embd
        weights = self.n_layer * sum(math.prod(matrix) for matrix in self.matrices.values()) + self.vocab_size * width
        attention = self.n_layer * 4 * width * (context + 1) / 2
        if adapters is None:
            return (2 * weights + attention) * (3 if training else 1)
        return (2 * weights) * (2 if training else 1) + (attention + 2 * adapters) * (3 if training else 1)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one token adds to the key-value cache; 327,680 for BTLM-3B-8k in bf16."""
        return 2 * self.n_layer * self.n_embd * bytes_per_value

    def weight_bytes(self, bits: int = 16) -> int:
        """Bytes of all weights at a number of bits per weight; 5.29 GB for BTLM-3B-8k in bf16."""
        return -(-self.num_parameters() * bits // 8)


# The released model.
BTLM_3B = Architecture(
    n_positions=8192,
    n_embd=2560,
    n_layer=32,
    n_head=32,
    n_inner=6826,
    activation_function="swiglu",
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.073,
    position_embedding_type="alibi",
    mup_width_scale=0.1,
    mup_embeddings_scale=14.6,
    mup_output_alpha=2.22,
    mup_scale_qk_dot_by_d=True,
)


def block_name(layer: int) -> str:
    """Name of the module of a block."""
    return f"transformer.h.{layer}"


def is_target(target: str, name: str) -> bool:
    """Whether PEFT takes a target for the module of this name: it is the last parts of the name."""
    return f".{name}".endswith(f".{target}")


def attention_scale(head_dim: int, *, scaled: bool, by_head_dim: bool) -> float:
    """What query-key products are multiplied by.

    Args:
        head_dim: Width of one attention head.
        scaled: ``scale_attn_weights`` of the configuration.
        by_head_dim: ``mup_scale_qk_dot_by_d``: divide by the width of the head, not by its square root.
    """
    if not scaled:
        return 1.0
    return 1.0 / head_dim if by_head_dim else 1.0 / math.sqrt(head_dim)


def slope_exponents(n_head: int) -> list[tuple[float, float, int]]:
    """The slopes of ALiBi (arXiv 2108.12409), one per head: each is two to the power of minus an exponent.

    The exponents are ``8 (i + 1) / n_head`` where ``n_head`` is a power of two. Other numbers of heads take those of
    the power of two below, followed by every other one of the power of two above (the interleave of Press et al.).

    Returns:
        Arithmetic progressions, one after the other: first exponent, step and number of heads. fp32 holds the exponents
        exactly.
    """
    lower = 2 ** math.floor(math.log2(n_head))
    progressions = [(8 / lower, 8 / lower, lower), (4 / lower, 8 / lower, n_head - lower)]
    return [progression for progression in progressions if progression[2]]


def _norm(name: str, size: int) -> dict[str, TensorFacts]:
    return {f"{name}.{part}": TensorFacts((size,), "norm", VECTOR) for part in ("weight", "bias")}


def _linear(matrices: Mapping[str, Matrix]) -> dict[str, TensorFacts]:
    tensors = {}
    for name, matrix in matrices.items():
        tensors[f"{name}.weight"] = TensorFacts(tuple(matrix), "matrix", _MATRIX_ROWS[name])
        tensors[f"{name}.bias"] = TensorFacts((matrix.outputs,), "bias", VECTOR)
    return tensors
