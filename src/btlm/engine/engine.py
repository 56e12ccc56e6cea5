"""The engine: token ids in, a stream of ids and log-probabilities out. It never sees text.

On the native kernels a token's logits are the same, bit for bit, however the steps are cut, so that neither batching,
nor chunks, nor reused prefixes, nor guesses change what is written.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensor_file import resident_bytes
from btlm.console import gigabytes
from btlm.errors import DoesNotFit, LogitsNotFinite, NotSupported, TooLong
from btlm.kernels import load_kernels
from btlm.model.architecture_btlm import Architecture
from btlm.model.config_keys_btlm import end_ids

from .cache import KVCache, cache_bytes, cache_dtype_of
from .memory import available_memory
from .network import LOGIT_ROWS, Network, activation_bytes, weight_dtype
from .options import GenerationOptions
from .scheduler import Request, Scheduler, Token
from .supported import supported

_SPARE = 16_000_000  # bytes beside weights, cache and activations: what kernels and Python allocate


class Engine:
    """Continues and scores prompts.

    Args:
        network: The network, on its kernels.
        cache_dtype: Dtype of keys and values: ``"int4"``, ``"int8"``, ``"bfloat16"``, ``"float32"``, or ``"auto"``:
            int8 for quantized weights, else that of the weights.
        context: Tokens per request, prompt and continuation; ``n_positions`` if it is ``None``.
        num_requests: Number of requests that can be under way at the same time.

    Raises:
        ValueError: A value is impossible.
    """

    def __init__(
        self, network: Network, *, cache_dtype: str = "auto", context: int | None = None, num_requests: int = 1
    ) -> None:
        self.network = network
        self.architecture = network.architecture
        self.end_ids = end_ids(self.architecture.eos_token_id, self.architecture.vocab_size)
        self.context = self.architecture.n_positions if context is None else context
        dtype = cache_dtype_of(cache_dtype, network.weight_dtype)
        self.cache = KVCache(network.kernels, self.architecture, dtype, num_requests, self.context)
        self._scheduler = Scheduler(self.cache, network.max_tokens, LOGIT_ROWS)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint | Path | str,
        *,
        cache_dtype: str = "auto",
        context: int | None = None,
        num_requests: int = 1,
        kernels: str = "auto",
        threads: int | None = None,
        factor: float | None = None,
    ) -> Self:
        """Make an engine for a checkpoint; its weights are mapped, not read.

        Args:
            checkpoint: An open checkpoint, its folder, or its id on the Hugging Face Hub; plain (bf16, fp16, fp32) or
                quantized, in safetensors or pickled by `torch.save`.
            cache_dtype, context, num_requests: See the class.
            kernels, threads: See :func:`btlm.kernels.load_kernels`.
            factor: Factor of position interpolation, instead of the stored one.

        Raises:
            DoesNotFit: Weights and cache do not fit the memory.
            NotSupported: The engine cannot run the model.
            ValueError: The checkpoint cannot be used, or a value is impossible.
        """
        checkpoint = Checkpoint.open(checkpoint)
        architecture = supported(checkpoint.architecture, factor)
        available = available_memory()  # before files are mapped, which count as address space
        tensors = checkpoint.tensors
        stored, used = weight_dtype(architecture, tensors), load_kernels(kernels, threads)
        weights = sum(resident_bytes(tensor) for tensor in tensors.values())
        if stored not in ("float32", "float16"):
            weights += used.unpacked_bytes * architecture.num_parameters()
        context = architecture.n_positions if context is None else context
        dtype = cache_dtype_of(cache_dtype, stored)
        _check_memory(architecture, weights, dtype, context, num_requests, available)
        network = Network(used, architecture, tensors)
        return cls(network, cache_dtype=cache_dtype, context=context, num_requests=num_requests)

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
                while waiting and (self.has_room or not running):
                    index, (ids, choice) = waiting.pop()
                    request = self.add(ids, choice, stop_ids=stop_ids)
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

    def score(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Log-probabilities in nats of the tokens of a prompt, each given those before it.

        Other requests wait meanwhile.

        Args:
            ids: At least two tokens.

        Returns:
            ``[len(ids) - 1]``.

        Raises:
            EngineFull: Other requests have all slots.
            LogitsNotFinite: See :meth:`generate`.
            ValueError: The prompt does not fit the context, or has an id beyond the vocabulary.
        """
        if len(ids) < 2:
            raise ValueError(f"A score needs at least two tokens, not {len(ids)}.")
        self._check(ids, 0)
        scores: list[float] = []
        request = Request(list(ids), GenerationOptions(), frozenset(), max_new_tokens=0, scores=scores)
        self._scheduler.add(request)
        try:
            while not request.finished:
                self._step(request)
        finally:
            self.remove(request)
        if request.error is not None:
            raise request.error
        return np.array(scores, np.float32)

    # Requests that come and go

    @property
    def has_room(self) -> bool:
        """Whether a request can be added."""
        return self._scheduler.has_room

    def add(
        self,
        ids: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
    ) -> Request:
        """Begin a request; :meth:`step` continues it until it is finished or removed.

        It reuses what the cache holds of the beginning of its prompt, also from requests that are under way.

        Args:
            ids, options, stop_ids: See :meth:`generate`.

        Raises:
            EngineFull, NotSupported, ValueError: See :meth:`generate`.
        """
        options = options or GenerationOptions()
        self._check(ids, options.max_new_tokens, options)
        stop_ids = self.end_ids if stop_ids is None else stop_ids
        request = Request(list(ids), options, stop_ids, options.max_new_tokens)
        self._scheduler.add(request)
        return request

    def remove(self, request: Request) -> None:
        """Stop a request between two steps; nothing happens if it has ended."""
        self._scheduler.remove(request)

    def step(self) -> list[tuple[Request, Token]]:
        """Make one forward pass for all requests.

        Requests whose logits are not finite end with an ``error``; the others are not disturbed.

        Returns:
            Tokens that were written: none of a request whose prompt is not read to its end, else one, or more where
            guesses were right.
        """
        return self._step()

    def _step(self, only: Request | None = None) -> list[tuple[Request, Token]]:
        step = self._scheduler.plan(only)
        if not step.parts:
            return []
        try:
            logits = self.network.forward(step.ids, step.segments, self.cache, step.rows)
        except LogitsNotFinite as error:
            for i in error.parts:
                self._scheduler.fail(step.parts[i].request, error)
            return []  # the next step computes the others
        return self._scheduler.record(step, logits)

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


def _check_memory(
    architecture: Architecture, weights: int, cache_dtype: str, context: int, num_requests: int, available: int | None
) -> None:
    if context < 1 or num_requests < 1:
        raise ValueError(
            f"A context of {context} tokens and {num_requests} requests are not possible; both are at least 1."
        )
    cache = cache_bytes(architecture, cache_dtype, num_requests, context)
    rest = weights + activation_bytes(architecture) + _SPARE
    needed = rest + cache
    if available is not None and needed > available:
        smallest = cache_bytes(architecture, "int4", num_requests, context)
        remedy = "a shorter context (prompt and new tokens)"
        if rest + cache_bytes(architecture, "int4", 1, 1) > available:
            remedy = "weights in fewer bits (btlm quantize)"
        elif smallest < cache and rest + smallest <= available:
            remedy += f", or an int4 cache ({gigabytes(smallest)})"
        raise DoesNotFit(
            f"{num_requests} x {context:,} tokens of context take {gigabytes(cache)} in {cache_dtype} beside weights "
            f"of {gigabytes(weights)}: {gigabytes(needed)} in all, and {gigabytes(available)} of memory are free; use "
            f"{remedy}."
        )
