"""The engine: token ids in, a stream of ids and log-probabilities out. It never sees text.

On the native kernels a token's logits are the same, bit for bit, however the steps are cut, so that neither batching,
nor chunks, nor reused prefixes, nor guesses change what is written.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.open import Checkpoint
from btlm.errors import EngineFull, LogitsNotFinite, NotSupported, TooLong
from btlm.kernels import load_kernels
from btlm.model.config_keys_btlm import end_ids

from .budget import cache_places, check_memory, fitting_places, weight_bytes
from .cache import KVCache, cache_bytes, cache_dtype_of
from .draft import Draft, check_draft, check_tokens
from .memory import available_memory
from .network import LOGIT_ROWS, Network, activation_bytes, weight_dtype
from .options import GenerationOptions
from .request import Request, Token
from .sampling import Mask
from .scheduler import Scheduler
from .supported import check_positions, supported


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
        cache_tokens = cache_places(self.context, num_requests, cache_tokens)
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
        cache_tokens: int | Literal["fit"] | None = None,
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
            cache_dtype, context, num_requests, patience: See the class.
            cache_tokens: See the class; ``"fit"`` for what half of the memory holds that the weights leave, at least
                ``context``, at most what all requests can use.
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
        weights = weight_bytes(architecture, tensors, used)
        context = architecture.n_positions if context is None else context
        check_positions(architecture, context)
        dtype, small_dtype = cache_dtype_of(cache_dtype, stored), ""
        guessing = small = None
        if draft is not None:
            draft = Checkpoint.open(draft)
            small = supported(draft.architecture)
            check_draft(architecture, small)
            check_tokens(checkpoint, draft)
            small_dtype = cache_dtype_of("auto", weight_dtype(small, draft.tensors))
            weights += weight_bytes(small, draft.tensors, used) + activation_bytes(small)

        def drafted(places: int) -> int:
            return 0 if small is None else cache_bytes(small, small_dtype, places)

        if cache_tokens == "fit":
            cache_tokens = fitting_places(
                architecture,
                context,
                num_requests,
                lambda places: cache_bytes(architecture, dtype, places) + drafted(places),
                None if available is None else available - weights,
            )
        places = cache_places(context, num_requests, cache_tokens)
        weights += drafted(places)
        check_memory(architecture, weights, dtype, places, available)
        if draft is not None and small is not None:
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
        yield from self.follow(self.add(ids, options, stop_ids=stop_ids))

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
            self.check(ids, choice.max_new_tokens, choice)
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
            mask: Tells which tokens may be written next, by those that were written; it is asked about guesses, too.

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
        self.check(ids, max_new_tokens, options)
        if score_from is not None and not 0 < score_from < max(2, len(ids)):
            raise ValueError(
                f"Scores from token {score_from} on are not possible: a score needs a token before it, and the prompt "
                f"has {len(ids)}."
            )
        request = Request(list(ids), options, stop_ids, max_new_tokens, score_from, num_alternatives, mask)
        self._scheduler.add(request)
        return request

    def follow(self, request: Request) -> Iterator[Token]:
        """The tokens of a request as they are written, by steps that continue the other requests, too.

        The request is removed if the iteration is left before its end.

        Raises:
            LogitsNotFinite, NothingAllowed, RequestCancelled: The request ended with that error.
        """
        given = 0
        try:
            while given < request.new_tokens or not request.finished:
                if given == request.new_tokens:
                    self.step()
                while given < request.new_tokens:
                    given += 1
                    yield request.tokens[given - 1]
        finally:
            self.remove(request)
        if request.error is not None:
            raise request.error

    def remove(self, request: Request) -> None:
        """Cancel a request between two steps, which ends with ``RequestCancelled``; nothing happens if it has ended."""
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

    def check(self, ids: Sequence[int], max_new_tokens: int, options: GenerationOptions | None = None) -> None:
        """Check that a request is possible, apart from room for it; this can be called from any thread.

        Args:
            ids: Prompt.
            max_new_tokens: Number of tokens to write at most; 0 for a score.
            options: How to continue.

        Raises:
            NotSupported, TooLong, TypeError, ValueError: See :meth:`generate`.
        """
        if isinstance(ids, str):
            raise TypeError("The engine takes token ids, not text; btlm.generate.TextGenerator takes text.")
        if not len(ids):
            raise ValueError("The prompt has no tokens; give at least one.")
        for token in ids:
            if not 0 <= token < self.architecture.vocab_size:
                raise ValueError(f"Token {token} is not in the vocabulary of {self.architecture.vocab_size:,}.")
        if options is not None and options.num_beams > 1:
            raise NotSupported("The engine has no beams.")
        for token in (options and options.logit_bias) or ():
            if not 0 <= token < self.architecture.vocab_size:
                raise ValueError(
                    f"Token {token} of logit_bias is not in the vocabulary of {self.architecture.vocab_size:,}."
                )
        length = len(ids) + max_new_tokens - 1  # the last token is not read again
        if length > self.context:
            raise TooLong(
                f"{len(ids):,} prompt tokens and {max_new_tokens:,} new ones exceed the context of "
                f"{self.context:,} tokens; shorten the prompt, write less, or open the engine with a larger context."
            )
