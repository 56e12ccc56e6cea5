"""The engine: token ids in, a stream of ids and log-probabilities out. It never sees text.

On the native kernels a token's logits are the same, bit for bit, however the steps are cut, so that neither batching,
nor chunks, nor reused prefixes, nor guesses change what is written.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensor_file import MappedTensor, resident_bytes
from btlm.checkpoint.tokenizer import read_tokenizer
from btlm.console import gigabytes
from btlm.errors import DoesNotFit, DraftVocabulary, EngineFull, LogitsNotFinite, NotSupported, TooLong
from btlm.kernels import Kernels, load_kernels, num_pages
from btlm.kernels.arrays import PAGE_TOKENS
from btlm.model.architecture_btlm import Architecture
from btlm.model.config_keys_btlm import end_ids

from .cache import KVCache, cache_bytes, cache_dtype_of
from .draft import Draft, check_draft
from .memory import available_memory
from .network import LOGIT_ROWS, Network, activation_bytes, weight_dtype
from .options import GenerationOptions
from .scheduler import Mask, Request, Scheduler, Token
from .supported import check_positions, supported

_SPARE = 16_000_000  # bytes beside weights, cache and activations: what kernels and Python allocate


class Engine:
    """Continues and scores prompts.

    Args:
        network: The network, on its kernels.
        cache_dtype: Dtype of keys and values: ``"int4"``, ``"int8"``, ``"bfloat16"``, ``"float32"``, or ``"auto"``:
            int8 for quantized weights, else that of the weights.
        context: Tokens per request, prompt and continuation; ``n_positions`` if it is ``None``.
        num_requests: Number of requests that can be under way at the same time.
        cache_tokens: Tokens of all requests together, at least ``context``; what that many requests of ``context``
            tokens need if it is ``None``. Requests get as much of it as they can use, so short ones do not pay for
            long ones.
        patience: Longest step, in usual ones, that requests wait for their next token while prompts of others are
            read, more than 1. Without it a step reads as much as it can, which is fastest for all together.
        draft: A small network of the same vocabulary, on the same kernels, which guesses tokens that this one checks.
            The result is the same as without it.

    Raises:
        DraftTooLarge, DraftVocabulary: The draft cannot guess for this network.
        ValueError: A value is impossible.
    """

    def __init__(
        self,
        network: Network,
        *,
        cache_dtype: str = "auto",
        context: int | None = None,
        num_requests: int = 1,
        cache_tokens: int | None = None,
        patience: float | None = None,
        draft: Network | None = None,
    ) -> None:
        self.network = network
        self.architecture = network.architecture
        self.end_ids = end_ids(self.architecture.eos_token_id, self.architecture.vocab_size)
        self.context = self.architecture.n_positions if context is None else context
        check_positions(self.architecture, self.context)
        dtype = cache_dtype_of(cache_dtype, network.weight_dtype)
        cache_tokens = _cache_tokens(self.context, num_requests, cache_tokens)
        self.cache = KVCache(network.kernels, self.architecture, dtype, num_requests, self.context, cache_tokens)
        self.draft = None
        if draft is not None:
            check_draft(self.architecture, draft.architecture)
            beside = self.cache.beside(draft.kernels, draft.architecture, cache_dtype_of("auto", draft.weight_dtype))
            self.draft = Draft(draft, beside)
        self._scheduler = Scheduler(self.cache, network.max_tokens, LOGIT_ROWS, patience, self.draft)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint | Path | str,
        *,
        cache_dtype: str = "auto",
        context: int | None = None,
        num_requests: int = 1,
        cache_tokens: int | None = None,
        patience: float | None = None,
        draft: Checkpoint | Path | str | None = None,
        kernels: str = "auto",
        threads: int | None = None,
        factor: float | None = None,
    ) -> Self:
        """Make an engine for a checkpoint; its weights are mapped, not read.

        Args:
            checkpoint: An open checkpoint, its folder, or its id on the Hugging Face Hub; plain (bf16, fp16, fp32) or
                quantized, in safetensors or pickled by `torch.save`.
            cache_dtype, context, num_requests, cache_tokens, patience: See the class.
            draft: A small checkpoint with the same vocabulary, which guesses tokens; see the class.
            kernels, threads: See :func:`btlm.kernels.load_kernels`.
            factor: Factor of position interpolation, instead of the stored one.

        Raises:
            DoesNotFit: Weights and cache do not fit the memory.
            DraftTooLarge, DraftVocabulary: The draft cannot guess for the model.
            NotSupported: The engine cannot run the model.
            ValueError: The checkpoint cannot be used, or a value is impossible.
        """
        checkpoint = Checkpoint.open(checkpoint)
        architecture = supported(checkpoint.architecture, factor)
        available = available_memory()  # before files are mapped, which count as address space
        tensors = checkpoint.tensors
        stored, used = weight_dtype(architecture, tensors), load_kernels(kernels, threads)
        weights = _weight_bytes(architecture, tensors, used)
        context = architecture.n_positions if context is None else context
        check_positions(architecture, context)
        dtype = cache_dtype_of(cache_dtype, stored)
        places = _cache_tokens(context, num_requests, cache_tokens)
        guessing = None
        if draft is not None:
            draft = Checkpoint.open(draft)
            small = supported(draft.architecture)
            check_draft(architecture, small)
            _check_tokens(checkpoint, draft)
            small_dtype = cache_dtype_of("auto", weight_dtype(small, draft.tensors))
            weights += _weight_bytes(small, draft.tensors, used) + activation_bytes(small)
            weights += cache_bytes(small, small_dtype, places)
        _check_memory(architecture, weights, dtype, places, available)
        if draft is not None:
            guessing = Network(used, small, draft.tensors)
        return cls(
            Network(used, architecture, tensors),
            cache_dtype=cache_dtype,
            context=context,
            num_requests=num_requests,
            cache_tokens=cache_tokens,
            patience=patience,
            draft=guessing,
        )

    # One request, or a given number of them

    def generate(
        self,
        ids: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
    ) -> Iterator[Token]:
        """Continue a prompt until a stop id, which is the last token, or for ``max_new_tokens``.

        Args:
            ids: Prompt, at least one token.
            options: How to continue; greedily if they are not given. Beams are not supported.
            stop_ids: Ids that end the request, instead of those of the checkpoint.

        Raises:
            EngineFull: Other requests have all slots.
            LogitsNotFinite: The weights, or what the model computes for this text, are NaN or infinite.
            NotSupported: The options ask for beams.
            TooLong: Prompt and continuation do not fit the context.
            TypeError: The prompt is text; :class:`btlm.generate.TextGenerator` takes text.
            ValueError: The prompt is empty, or has an id beyond the vocabulary.
        """
        for _, token in self.generate_batch([ids], options, stop_ids=stop_ids):
            yield token

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
    ) -> Iterator[tuple[int, Token]]:
        """Continue several prompts together, as many at a time as there is room for.

        Args:
            prompts: Token ids of each prompt.
            options: Options of all prompts, or one per prompt.
            stop_ids: See :meth:`generate`.

        Yields:
            The index of a prompt, and its next token.

        Raises:
            EngineFull, LogitsNotFinite, NotSupported, ValueError: See :meth:`generate`.
        """
        each = list(options) if isinstance(options, Sequence) else [options or GenerationOptions()] * len(prompts)
        for ids, choice in zip(prompts, each, strict=True):
            self._check(ids, choice.max_new_tokens, choice)
        waiting = list(enumerate(zip(prompts, each, strict=True)))[::-1]
        running: dict[Request, int] = {}
        given: dict[Request, int] = {}  # tokens yielded; steps that others take write for these requests too
        try:
            while waiting or running:
                while waiting:
                    index, (ids, choice) = waiting[-1]
                    try:
                        request = self.add(ids, choice, stop_ids=stop_ids)
                    except EngineFull:
                        if not running:
                            raise
                        break
                    waiting.pop()
                    running[request], given[request] = index, 0
                if all(given[request] == request.new_tokens for request in running):
                    self.step()
                for request, index in list(running.items()):
                    while given[request] < request.new_tokens:
                        given[request] += 1
                        yield index, request.tokens[given[request] - 1]
                    if request.error is not None:
                        raise request.error
                    if request.finished:
                        del running[request]
        finally:
            for request in running:
                self.remove(request)

    def score(self, ids: Sequence[int], score_from: int = 1) -> npt.NDArray[np.float32]:
        """Log-probabilities in nats of the tokens of a prompt, each given those before it.

        Args:
            ids: At least two tokens.
            score_from: Index of the first token whose score is wanted, at least 1.

        Returns:
            ``[len(ids) - score_from]``.

        Raises:
            EngineFull: Other requests have all slots, or most of the cache.
            LogitsNotFinite: See :meth:`generate`.
            ValueError: The prompt does not fit the context, or has an id beyond the vocabulary.
        """
        request = self.add_score(ids, score_from)
        try:
            while not request.finished:
                self.step()
        finally:
            self.remove(request)
        if request.error is not None:
            raise request.error
        return np.array([token.logprob for token in request.scores], np.float32)

    # Requests that come and go

    @property
    def has_room(self) -> bool:
        """Whether a slot is free for one more request; the cache may still have too few free places for it."""
        return self._scheduler.has_room

    def add(
        self,
        ids: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
        score_from: int | None = None,
        num_alternatives: int = 0,
        mask: Mask | None = None,
    ) -> Request:
        """Begin a request; :meth:`step` continues it until it is finished or removed.

        It reuses what the cache holds of the beginning of its prompt, also from requests that are under way, and waits
        for what these are about to compute of it: several requests of one prompt compute it once and share its memory.

        Args:
            ids, options, stop_ids: See :meth:`generate`.
            score_from: Index of the first token of the prompt that is scored too, at least 1. What is scored is
                computed even where the cache holds it.
            num_alternatives: Number of the most probable tokens to tell for each token that is written or scored.
            mask: Tells which tokens may be written next.

        Raises:
            EngineFull: Other requests have all slots, or most of the cache.
            NotSupported, TooLong, TypeError, ValueError: See :meth:`generate`.
        """
        options = options or GenerationOptions()
        stop_ids = self.end_ids if stop_ids is None else stop_ids
        return self._add(ids, options, stop_ids, options.max_new_tokens, score_from, num_alternatives, mask)

    def add_score(self, ids: Sequence[int], score_from: int = 1, *, num_alternatives: int = 0) -> Request:
        """Begin a request that scores its prompt and writes nothing.

        Args:
            ids: At least two tokens.
            score_from, num_alternatives: See :meth:`add`.

        Raises:
            EngineFull, TooLong, TypeError, ValueError: See :meth:`add`.
        """
        if len(ids) < 2:
            raise ValueError(f"A score needs at least two tokens, not {len(ids)}.")
        return self._add(ids, GenerationOptions(), frozenset(), 0, score_from, num_alternatives)

    def _add(
        self,
        ids: Sequence[int],
        options: GenerationOptions,
        stop_ids: frozenset[int],
        max_new_tokens: int,
        score_from: int | None,
        num_alternatives: int,
        mask: Mask | None = None,
    ) -> Request:
        self._check(ids, max_new_tokens, options)
        if score_from is not None and not 0 < score_from < max(2, len(ids)):
            raise ValueError(
                f"Scores from token {score_from} on are not possible: a score needs a token before it, and the prompt "
                f"has {len(ids)}."
            )
        request = Request(list(ids), options, stop_ids, max_new_tokens, score_from, num_alternatives, mask)
        self._scheduler.add(request)
        return request

    def remove(self, request: Request) -> None:
        """Stop a request between two steps; nothing happens if it has ended."""
        self._scheduler.remove(request)

    def step(self) -> list[tuple[Request, Token]]:
        """Make one forward pass for all requests.

        Requests whose logits are not finite, or whose mask allows no token, end with an ``error``; the others are not
        disturbed.

        Returns:
            Tokens that were written: none of a request whose prompt is not read to its end, else one, or more where
            guesses were right.
        """
        step = self._scheduler.plan()
        if not step.parts:
            return []
        start = time.perf_counter()
        try:
            logits = self.network.forward(step.ids, step.segments, self.cache, step.rows)
        except LogitsNotFinite as error:
            for i in error.parts:
                self._scheduler.fail(step.parts[i].request, error)
            return []  # the next step computes the others
        return self._scheduler.record(step, logits, time.perf_counter() - start)

    def _check(self, ids: Sequence[int], max_new_tokens: int, options: GenerationOptions | None = None) -> None:
        if isinstance(ids, str):
            raise TypeError("The engine takes token ids, not text; btlm.generate.TextGenerator takes text.")
        if not len(ids):
            raise ValueError("The prompt has no tokens; give at least one.")
        for token in ids:
            if not 0 <= token < self.architecture.vocab_size:
                raise ValueError(f"Token {token} is not in the vocabulary of {self.architecture.vocab_size:,}.")
        if options is not None and options.num_beams > 1:
            raise NotSupported("The engine has no beams.")
        length = len(ids) + max_new_tokens - 1  # the last token is not read again
        if length > self.context:
            raise TooLong(
                f"{len(ids):,} prompt tokens and {max_new_tokens:,} new ones exceed the context of "
                f"{self.context:,} tokens; shorten the prompt, write less, or open the engine with a larger context."
            )


def _cache_tokens(context: int, num_requests: int, cache_tokens: int | None) -> int:
    """Tokens of the cache, in whole pages for each request unless their number is given."""
    if context < 1 or num_requests < 1:
        raise ValueError(
            f"A context of {context} tokens and {num_requests} requests are not possible; both are at least 1."
        )
    if cache_tokens is not None and cache_tokens < context:
        raise ValueError(
            f"A cache of {cache_tokens:,} tokens is too small for one request of {context:,}; give more, or a shorter "
            "context."
        )
    return num_requests * num_pages(context) * PAGE_TOKENS if cache_tokens is None else cache_tokens


def _weight_bytes(architecture: Architecture, tensors: Mapping[str, MappedTensor], kernels: Kernels) -> int:
    """Bytes of the weights in memory, as far as kernels unpack them too."""
    weights = sum(resident_bytes(tensor) for tensor in tensors.values())
    if weight_dtype(architecture, tensors) not in ("float32", "float16"):
        weights += kernels.unpacked_bytes * architecture.num_parameters()
    return weights


def _check_tokens(model: Checkpoint, draft: Checkpoint) -> None:
    """Check that ids mean the same tokens to both, if both say what they mean."""
    ours, theirs = (read_tokenizer(checkpoint.folder) for checkpoint in (model, draft))
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise DraftVocabulary(
            f"The tokens of the draft {draft.title} are not those of {model.title}; a draft needs the vocabulary of "
            "its model."
        )


def _check_memory(
    architecture: Architecture, weights: int, cache_dtype: str, cache_tokens: int, available: int | None
) -> None:
    cache = cache_bytes(architecture, cache_dtype, cache_tokens)
    rest = weights + activation_bytes(architecture) + _SPARE
    needed = rest + cache
    if available is not None and needed > available:
        smallest = cache_bytes(architecture, "int4", cache_tokens)
        remedy = "a shorter context (prompt and new tokens)"
        if rest + cache_bytes(architecture, "int4", 1) > available:
            remedy = "weights in fewer bits (btlm quantize)"
        elif smallest < cache and rest + smallest <= available:
            remedy += f", or an int4 cache ({gigabytes(smallest)})"
        raise DoesNotFit(
            f"A cache of {cache_tokens:,} tokens takes {gigabytes(cache)} in {cache_dtype} beside weights of "
            f"{gigabytes(weights)}: {gigabytes(needed)} in all, and {gigabytes(available)} of memory are free; use "
            f"{remedy}."
        )
