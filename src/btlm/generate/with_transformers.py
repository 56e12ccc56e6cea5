"""A prompt to its continuation, piece by piece."""

import math
import secrets
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.to_transformers import end_ids, load_model
from btlm.console import note, one_line, plain_messages, warn
from btlm.devices import has_cuda
from btlm.engine.options import GenerationOptions
from btlm.errors import DoesNotFit, LogitsNotFinite, OptionError, TooLong
from btlm.model import BTLMConfig, BTLMLMHeadModel

from .options import Run
from .report import GenerationReport
from .text import TextPieces, encode, longer_than_trained, write_text


def run_transformers(text: str, checkpoint: Checkpoint, options: GenerationOptions, run: Run) -> None:
    """Write a prompt and its continuation to standard output; arguments as of ``run_generate``."""
    if options.penalizes_written:
        raise OptionError("Only the engine has {presence_penalty} and {frequency_penalty}; use {repetition_penalty}.")
    with plain_messages():
        dtype, group_size = run.dtype, None
        if run.dtype == "auto" and run.device != "cpu" and has_cuda():
            group_size = _four_bits(checkpoint)
            dtype = run.dtype if group_size is None else "bfloat16"
        loaded, tokenizer = load_model(checkpoint, dtype=dtype, device=run.device, context_scaling=run.context_scaling)
        if group_size is not None and loaded.device.type == "cuda":
            if find_spec("torchao") is None:
                note("the four-bit weights are decoded to bfloat16; with torchao installed they keep four bits")
            else:
                from .cuda import to_int4

                loaded = to_int4(loaded, group_size)
        config = loaded.config
        note(
            f"{checkpoint.title}, {config.num_parameters():,} parameters, {str(loaded.dtype).removeprefix('torch.')} "
            f"on {loaded.device}"
        )
        if warning := length_warning(config, len(encode(backend(tokenizer), text)) + options.max_new_tokens):
            warn(warning)
        write_text("" if run.no_echo else text)
        try:
            report = generate_text(loaded, tokenizer, text, options, write_text)
        finally:
            write_text("\n")
        note(str(report))


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
        DoesNotFit: The memory of the device ends.
        LogitsNotFinite: The weights, or what the model computes for this text, are NaN or infinite.
        ValueError: The prompt has no tokens.
    """
    inputs = torch.tensor([encode(backend(tokenizer), prompt)], device=model.device)
    seed = options.seed
    if options.samples and seed is None:
        seed = secrets.randbelow(2**31)
    if seed is not None:
        torch.manual_seed(seed)
    pieces = _Streamer(tokenizer, write)
    generation_config = _generation_config(model, options)
    # What the checkpoint recommends would fill in what the options leave open: they alone decide.
    recommended, model.generation_config = model.generation_config, GenerationConfig()
    start = time.perf_counter()
    try:
        output = cast(Any, model).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=generation_config,
            logits_processor=[_Finite(model)],
            streamer=pieces if options.num_beams == 1 else None,
        )
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
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


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer without what Transformers adds to it."""
    return cast(Tokenizer, cast(Any, tokenizer).backend_tokenizer)


def length_warning(config: BTLMConfig, length: int) -> str | None:
    """What to know of a text of ``length`` tokens, prompt and continuation, if it is longer than the training length.

    Raises:
        TooLong: It does not fit learned positions.
    """
    scaling = config.alibi_scaling
    if config.position_embedding_type == "learned" and length > config.n_positions:
        raise TooLong(
            f"The prompt and max_new_tokens make {length:,} tokens, and this model's learned positions end at "
            f"{config.n_positions:,}; shorten one of them."
        )
    trained = config.n_positions * (1.0 if scaling is None else scaling.get("factor", math.inf))
    return longer_than_trained(trained, length)


class _Finite(LogitsProcessor):
    """Passes logits on; those that are not finite end the text."""

    def __init__(self, model: BTLMLMHeadModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not (scores < torch.inf).all():  # tokens that may not come have minus infinity
            wrong = (name for name, tensor in self.model.named_parameters() if not tensor.isfinite().all())
            raise LogitsNotFinite(LogitsNotFinite.problem_of(next(wrong, None)), [0])
        return scores


class _Streamer(BaseStreamer):
    """Receives token ids, the prompt's first, and passes on the others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.pieces, self.write = TextPieces(backend(tokenizer)), write
        self.seen_prompt = False
        self.first_token_at = self.last_token_at = 0.0

    def put(self, value: Tensor) -> None:
        """Take the next ids."""
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        self.last_token_at = time.perf_counter()
        self.first_token_at = self.first_token_at or self.last_token_at
        self._write(self.pieces.put(value.flatten().tolist()))

    def end(self) -> None:
        """Write what is left."""
        self._write(self.pieces.end())

    def _write(self, text: str) -> None:
        if text:
            self.write(text)


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
    dynamic = (model.config.alibi_scaling or {}).get("train_seq_len") is not None
    # On CUDA, Transformers compiles the steps of a static cache and captures them in a graph.
    graphs = model.device.type == "cuda" and options.num_beams == 1 and not dynamic
    return GenerationConfig(
        cache_implementation="static" if graphs else None,
        do_sample=options.samples,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        repetition_penalty=1.0 if options.repetition_penalty is None else options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size or 0,
        sequence_bias={(token,): bias for token, bias in (options.logit_bias or {}).items()} or None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
        **sampling,
    )


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    """Beams pad what ended early."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def _four_bits(checkpoint: Checkpoint) -> int | None:
    """The group size of weights in four bits; None for other weights."""
    quantization = getattr(checkpoint.config(), "quantization_config", None) or {}
    return quantization.get("group_size") if quantization.get("bits") == 4 else None
