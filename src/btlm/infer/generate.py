"""A prompt to its continuation, piece by piece."""

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from btlm.model import BTLMConfig, BTLMLMHeadModel

from .load import end_ids
from .messages import one_line


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt: greedily, by beam search, or by sampling where one of its three options is given.

    Args:
        max_new_tokens: End here at the latest.
        num_beams: Above 1, the most probable of that many continuations; known only at the end, so not streamed.
        temperature: Sample; below 1 the probable tokens gain, above 1 the improbable ones.
        top_p: Sample from the most probable tokens that hold this share of the probability.
        top_k: Sample from this many of the most probable tokens.
        no_repeat_ngram_size: Never write the same n-gram of tokens twice.
        seed: Of the samples; drawn where it is not given.

    Raises:
        ValueError: Names every impossible value and contradiction, by the options of the command.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"--{name.replace('_', '-')} is {getattr(self, name)} and must be {bounds}"
            for name, holds, bounds in (
                ("max_new_tokens", lambda value: value >= 1, "at least 1"),
                ("num_beams", lambda value: value >= 1, "at least 1"),
                ("temperature", lambda value: 0 < value < math.inf, "above 0 (without it, nothing is sampled)"),
                ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
                ("top_k", lambda value: value >= 1, "at least 1"),
                ("no_repeat_ngram_size", lambda value: value >= 1, "at least 1"),
                ("seed", lambda value: 0 <= value < 2**63, "at least 0 and below 2^63"),
            )
            if getattr(self, name) is not None and not holds(getattr(self, name))
        ]
        if self.samples and self.num_beams > 1:
            problems.append("--num-beams searches and --temperature, --top-p and --top-k sample; use one or the other")
        if self.seed is not None and not self.samples:
            problems.append("--seed needs sampling; add --temperature, --top-p or --top-k")
        if problems:
            raise ValueError(f"{'; '.join(problems)}.")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return any(option is not None for option in (self.temperature, self.top_p, self.top_k))


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """What a generation did.

    Args:
        prompt_tokens, new_tokens: Counts; end-of-text is one of the new tokens.
        first_token_s: Seconds to the first new token; ``None`` with beams.
        total_s: Seconds to the last one.
        end_of_text: The model ended the text; otherwise it met ``max_new_tokens``.
        seed: That the samples can be drawn again with; ``None`` where nothing was sampled.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_s: float | None
    total_s: float
    end_of_text: bool
    seed: int | None

    def __str__(self) -> str:
        ended = "end of text" if self.end_of_text else "--max-new-tokens"
        if self.first_token_s is None:
            speed = f"in {self.total_s:.2f} s, prompt included"
        else:
            speed = f"first after {self.first_token_s:.2f} s"
            if self.new_tokens > 1 and self.total_s > self.first_token_s:
                speed += f", then {(self.new_tokens - 1) / (self.total_s - self.first_token_s):.1f} tokens/s"
        seed = "" if self.seed is None else f"; seed {self.seed}"
        return f"{self.prompt_tokens:,} prompt tokens, {self.new_tokens:,} new ({speed}); stopped at {ended}{seed}"


def generate_text(
    model: BTLMLMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerationOptions,
    write: Callable[[str], object],
) -> GenerationReport:
    """Continue a prompt.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Any text but the empty one.
        options: How to continue it.
        write: Receives the continuation without the prompt, in pieces of whole characters as soon as they are known.

    Raises:
        ValueError: The prompt has no tokens, or does not fit learned positions or the memory.
    """
    inputs = encode(tokenizer, prompt).to(model.device)
    seed = options.seed
    if options.samples and seed is None:
        seed = secrets.randbelow(2**31)
    if seed is not None:
        torch.manual_seed(seed)
    pieces = _TextPieces(tokenizer, write)
    generation_config = _generation_config(model, options)
    # What the checkpoint recommends would fill in what the options leave open: they alone decide.
    recommended, model.generation_config = model.generation_config, GenerationConfig()
    start = time.perf_counter()
    try:
        output = cast(Any, model).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=generation_config,
            streamer=pieces if options.num_beams == 1 else None,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"The memory of {model.device} ends ({one_line(error)}); use a shorter prompt, or the cpu."
        ) from error
    finally:
        model.generation_config = recommended
    total = time.perf_counter() - start
    prompt_tokens = inputs.shape[1]
    new_ids = _until_end(output[0, prompt_tokens:].tolist(), end_ids(model))
    if options.num_beams > 1:
        pieces.put(inputs)
        pieces.put(torch.tensor(new_ids))
        pieces.end()
    return GenerationReport(
        prompt_tokens=prompt_tokens,
        new_tokens=len(new_ids),
        first_token_s=None if options.num_beams > 1 else pieces.first_token_at - start,
        total_s=total if options.num_beams > 1 else pieces.last_token_at - start,
        end_of_text=bool(new_ids) and new_ids[-1] in end_ids(model),
        seed=seed,
    )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Token ids of a prompt, int64 ``[1, Q]``.

    Raises:
        ValueError: There are none.
    """
    ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("The prompt is empty; give some text to continue.")
    return torch.tensor([ids])


def length_warning(config: BTLMConfig, length: int) -> str | None:
    """What to know of a text of ``length`` tokens, prompt and continuation, if it is longer than the training length.

    Raises:
        ValueError: It does not fit learned positions.
    """
    scaling = config.alibi_scaling
    if config.position_embedding_type == "learned" and length > config.n_positions:
        raise ValueError(
            f"The prompt and --max-new-tokens make {length:,} tokens, and this model's learned positions end at "
            f"{config.n_positions:,}; shorten one of them."
        )
    trained = config.n_positions * (1.0 if scaling is None else scaling.get("factor", math.inf))
    if length <= trained:
        return None
    factor = math.ceil(10 * length / config.n_positions) / 10
    return (
        f"the prompt and --max-new-tokens make {length:,} tokens, more than the {trained:,.0f} that this model is made "
        f"for; the text gets better with --context-scaling dynamic, or --context-scaling {factor:g} which is faster"
    )


class _TextPieces(BaseStreamer):
    """Receives token ids, the prompt's first, and writes text as soon as it ends in a whole character.

    Transformers' ``TextStreamer`` holds text back until the next space; here a piece waits only for the bytes that its
    last character lacks. At such a boundary byte-level BPE decodes each side for itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self.waiting: list[int] = []
        self.seen_prompt = False
        self.first_token_at = self.last_token_at = 0.0

    def put(self, value: Tensor) -> None:
        """Take the next ids."""
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self.waiting += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.waiting.clear()
            self.write(text)

    def end(self) -> None:
        """Write what is left, which may be part of a character."""
        if self.waiting:
            self.write(self._text())
            self.waiting.clear()

    def _text(self) -> str:
        text = self.tokenizer.decode(self.waiting, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _generation_config(model: BTLMLMHeadModel, options: GenerationOptions) -> GenerationConfig:
    """Every option is spelled out: Transformers would take the top 50 tokens where ``top_k`` is left open."""
    sampling: dict[str, Any] = {}
    if options.samples:
        sampling = {
            "temperature": 1.0 if options.temperature is None else options.temperature,
            "top_p": 1.0 if options.top_p is None else options.top_p,
            "top_k": 0 if options.top_k is None else options.top_k,
        }
    ends = sorted(end_ids(model))
    return GenerationConfig(
        do_sample=options.samples,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        no_repeat_ngram_size=options.no_repeat_ngram_size or 0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
        **sampling,
    )


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Beams pad what ended early."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
