"""The engine: token ids in, a stream of ids and log-probabilities out. It never sees text.

Texts share every step: each brings the tokens that are not in the cache, be it a piece of its prompt, its last token,
or that token and guesses of the next ones. On the native kernels a token's logits are the same, bit for bit, however
the steps are cut, so that neither batching, nor chunks, nor reused prefixes, nor guesses change what is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.locate import checkpoint_folder
from btlm.checkpoint.shape import Shape, read_shape
from btlm.checkpoint.tensor_file import map_tensors, resident_bytes
from btlm.console import gigabytes
from btlm.errors import NotSupported
from btlm.kernels import load_kernels

from .cache import KVCache, cache_bytes, cache_dtype_of, common_prefix
from .memory import available_memory
from .network import LOGIT_ROWS, Network, activation_bytes, weight_dtype
from .options import GenerationOptions
from .sampling import Sampler, log_probability
from .speculation import PromptLookup

_SPARE = 16_000_000  # bytes beside weights, cache and activations: what kernels and Python allocate


class Token(NamedTuple):
    """A token that was written.

    Args:
        id: Of the token.
        logprob: Its log-probability in nats under the model, before temperature and the other rules.
    """

    id: int
    logprob: float


@dataclass(eq=False)
class Text:
    """A text that the engine continues: see :meth:`Engine.add`.

    Args:
        ids: The prompt, then what was written.
        prompt_tokens: Length of the prompt.
        reused_tokens: Of the prompt, already in the cache when the text came.
        tokens: What was written.
        finished: ``None``, ``"stop"`` at a stop id, or ``"length"`` at ``max_new_tokens``.
    """

    ids: list[int]
    prompt_tokens: int
    reused_tokens: int
    slot: int
    cached: int
    sampler: Sampler
    lookup: PromptLookup
    stop_ids: frozenset[int]
    tokens: list[Token] = field(default_factory=list)
    finished: str | None = None

    @property
    def new_tokens(self) -> int:
        """Number of tokens written."""
        return len(self.tokens)


@dataclass
class _Slot:
    """A place in the cache, with what it holds; the oldest one is given away first."""

    ids: list[int]
    used: int = 0
    text: Text | None = None


class Engine:
    """Continues texts.

    Args:
        network: On its kernels.
        cache_dtype: Of keys and values: ``"int4"``, ``"int8"``, ``"bfloat16"``, ``"float32"``, or ``"auto"``: int8 for
            quantized weights, else that of the weights.
        context: Tokens of a text, prompt and continuation; ``n_positions`` where not given.
        num_texts: That can be under way at the same time.

    Raises:
        ValueError: The cache does not fit the memory, or a value is impossible.
    """

    def __init__(
        self, network: Network, *, cache_dtype: str = "auto", context: int | None = None, num_texts: int = 1
    ) -> None:
        shape = network.shape
        context = shape.n_positions if context is None else context
        dtype = cache_dtype_of(cache_dtype, network.weight_dtype)
        self.network = network
        self.shape = shape
        self.context = context
        self.cache = KVCache(network.kernels, shape, dtype, num_texts, context)
        self._slots = [_Slot([]) for _ in range(num_texts)]
        self._clock = 0

    @classmethod
    def open(
        cls,
        name_or_path: Path | str,
        *,
        cache_dtype: str = "auto",
        context: int | None = None,
        num_texts: int = 1,
        kernels: str = "auto",
        threads: int | None = None,
        factor: float | None = None,
    ) -> Self:
        """An engine for a checkpoint, whose weights are mapped, not read.

        Args:
            name_or_path: Folder, or id on the Hugging Face Hub; plain (bf16, fp32) or quantized, in safetensors.
            cache_dtype, context, num_texts: See the class.
            kernels, threads: See :func:`btlm.kernels.load_kernels`.
            factor: Position interpolation instead of the stored one.

        Raises:
            ValueError: One line that says what cannot be used, and what to do.
        """
        shape = read_shape(name_or_path, factor=factor)
        available = available_memory()  # before files are mapped, which count as address space
        tensors = map_tensors(checkpoint_folder(name_or_path))
        weights = sum(resident_bytes(tensor) for tensor in tensors.values())
        context = shape.n_positions if context is None else context
        dtype = cache_dtype_of(cache_dtype, weight_dtype(shape, tensors))
        _check_memory(shape, weights, dtype, context, num_texts, available)
        network = Network(load_kernels(kernels, threads), shape, tensors)
        return cls(network, cache_dtype=cache_dtype, context=context, num_texts=num_texts)

    # One text, or a given number

    def generate(
        self,
        ids: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
    ) -> Iterator[Token]:
        """Continue a text; the last token is a stop id, or the text has ``max_new_tokens``.

        Args:
            ids: At least one token.
            options: Greedily where not given; without beams.
            stop_ids: Instead of those of the checkpoint.

        Raises:
            ValueError: The text does not fit the context, or no text can be added now.
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
        """Continue some texts together, as many at a time as there is room for.

        Args:
            prompts: Token ids.
            options: For all of them, or for each.
            stop_ids: As for :meth:`generate`.

        Yields:
            The index of a prompt, and its next token.
        """
        each = list(options) if isinstance(options, Sequence) else [options or GenerationOptions()] * len(prompts)
        for ids, choice in zip(prompts, each, strict=True):
            self._check(ids, choice)
        waiting = list(enumerate(zip(prompts, each, strict=True)))[::-1]
        running: dict[Text, int] = {}
        given: dict[Text, int] = {}  # a step that others take writes for these texts too
        try:
            while waiting or running:
                while waiting and self.has_room:
                    index, (ids, choice) = waiting.pop()
                    text = self.add(ids, choice, stop_ids=stop_ids)
                    running[text], given[text] = index, 0
                if not running:
                    raise ValueError("The engine is full with the texts of others; remove one.")
                if all(given[text] == len(text.tokens) for text in running):
                    self.step()
                for text, index in list(running.items()):
                    while given[text] < len(text.tokens):
                        given[text] += 1
                        yield index, text.tokens[given[text] - 1]
                    if text.finished:
                        del running[text]
        finally:
            for text in running:
                self.remove(text)

    # Texts that come and go

    @property
    def has_room(self) -> bool:
        """Whether a text can be added."""
        return any(slot.text is None for slot in self._slots)

    def add(
        self,
        ids: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        stop_ids: frozenset[int] | None = None,
    ) -> Text:
        """Begin a text; it is continued by :meth:`step` until it is finished, or removed.

        What the cache holds of its beginning, from this text's predecessors or from others that are under way, is
        reused.

        Raises:
            ValueError: It does not fit the context, has a token that the vocabulary has not, or there is no room.
        """
        options = options or GenerationOptions()
        self._check(ids, options)
        free = [slot for slot in self._slots if slot.text is None]
        if not free:
            raise ValueError(f"The engine is full: {len(self._slots)} texts are under way; remove one.")
        prompt = list(ids)
        # The last token is computed in any case: its logits are needed.
        shared = {id(slot): min(common_prefix(prompt, slot.ids), len(prompt) - 1) for slot in self._slots}
        best = max(self._slots, key=lambda slot: (shared[id(slot)], slot.text is None))
        reused = shared[id(best)]
        goes_on = best.text is None and (reused == len(best.ids) or len(free) == 1)
        slot = best if goes_on else min(free, key=lambda slot: slot.used)  # else leave what others may want to reuse
        if reused and slot is not best:
            self.cache.copy(self._slots.index(best), self._slots.index(slot), reused)
        self._clock += 1
        text = Text(
            ids=prompt,
            prompt_tokens=len(prompt),
            reused_tokens=reused,
            slot=self._slots.index(slot),
            cached=reused,
            sampler=Sampler(options),
            lookup=PromptLookup(options.lookup_tokens),
            stop_ids=self.shape.end_ids if stop_ids is None else stop_ids,
        )
        slot.text, slot.used, slot.ids = text, self._clock, prompt[:reused]
        return text

    def remove(self, text: Text) -> None:
        """Stop a text; its tokens stay in the cache until their place is needed."""
        slot = self._slots[text.slot]
        if slot.text is text:
            slot.text = None

    def step(self) -> list[tuple[Text, Token]]:
        """One forward pass for all texts.

        Returns:
            What was written: of each text nothing while its prompt is read, else a token, or more where guesses were
            right.
        """
        texts = [slot.text for slot in self._slots if slot.text is not None]
        batch = _Batch(self.network.max_tokens)
        # Texts that write come first: a long prompt must not hold them up.
        for text in sorted(texts, key=lambda text: len(text.ids) - text.cached):
            guess = []
            if text.cached == len(text.ids) - 1 and len(texts) <= 2:  # with more texts a step is no longer free
                left = text.sampler.options.max_new_tokens - text.new_tokens - 1
                guess = text.lookup.guess(text.ids)[: max(0, left)]
            batch.put(text, guess)
        if not batch.parts:
            return []
        logits = self.network.forward(batch.ids(), batch.segments(), self.cache, batch.rows())
        written: list[tuple[Text, Token]] = []
        row = 0
        for part in batch.parts:
            slot = self._slots[part.text.slot]
            part.text.cached += part.known
            slot.ids = part.text.ids[: part.text.cached]
            if part.wants_logits:
                tokens = self._write(part, logits[row : row + 1 + len(part.guess)])
                row += 1 + len(part.guess)
                written += [(part.text, token) for token in tokens]
                slot.ids = part.text.ids[: part.text.cached]
            if part.text.finished:
                self.remove(part.text)
        return written

    def score(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Log-probabilities in nats of the tokens of a text, each given those before it.

        Args:
            ids: At least two tokens.

        Returns:
            ``[len(ids) - 1]``.

        Raises:
            ValueError: It does not fit the context, or no text can be added now.
        """
        if len(ids) < 2:
            raise ValueError(f"A score needs at least two tokens, and these are {len(ids)}.")
        text = self.add(ids, GenerationOptions(max_new_tokens=1), stop_ids=frozenset())
        slot = self._slots[text.slot]
        slot.ids = []  # all of it is computed
        tokens = np.asarray(ids, np.int64)
        scores: list[npt.NDArray[np.float32]] = []
        size = min(self.network.max_tokens, LOGIT_ROWS)
        try:
            for start in range(0, len(tokens) - 1, size):
                chunk = tokens[start : min(start + size, len(tokens) - 1)]
                segments = np.array([[0, text.slot, start, len(chunk)]])
                logits = self.network.forward(chunk, segments, self.cache, np.arange(len(chunk)))
                most = logits.max(axis=1, keepdims=True)
                total = np.log(np.exp(logits - most).sum(axis=1, dtype=np.float64)) + most[:, 0]
                following = tokens[start + 1 : start + 1 + len(chunk)]
                scores.append((logits[np.arange(len(chunk)), following] - total).astype(np.float32))
            slot.ids = tokens[:-1].tolist()
        finally:
            self.remove(text)
        return np.concatenate(scores)

    def _check(self, ids: Sequence[int], options: GenerationOptions) -> None:
        if not len(ids):
            raise ValueError("The prompt has no tokens; give at least one.")
        for token in ids:
            if not 0 <= token < self.shape.vocab_size:
                raise ValueError(f"Token {token} is not in the vocabulary of {self.shape.vocab_size:,}.")
        if options.num_beams > 1:
            raise NotSupported("The engine has no beams; use --engine transformers.")
        length = len(ids) + options.max_new_tokens - 1  # the last token is not read again
        if length > self.context:
            raise ValueError(
                f"{len(ids):,} prompt tokens and {options.max_new_tokens:,} new ones exceed the context of "
                f"{self.context:,} tokens; shorten the prompt, write less, or open the engine with a larger context."
            )

    def _write(self, part: "_Part", logits: npt.NDArray[np.float32]) -> list[Token]:
        """Choose tokens as long as they are what was guessed, each by its own draw: the text is the same without."""
        text = part.text
        tokens: list[Token] = []
        for i, row in enumerate(logits):
            choice = text.sampler.choose(row, text.ids)
            text.ids.append(choice)
            tokens.append(Token(choice, log_probability(row, choice)))
            text.tokens.append(tokens[-1])
            if choice in text.stop_ids:
                text.finished = "stop"
            elif text.new_tokens >= text.sampler.options.max_new_tokens:
                text.finished = "length"
            right = i < len(part.guess) and choice == part.guess[i]
            if text.finished or not right:
                break
            text.cached += 1
        text.lookup.learn(len(part.guess), len(tokens) - 1)
        return tokens


class _Part(NamedTuple):
    """What a text brings to a step: tokens of its own, and guesses behind them."""

    text: Text
    known: int
    guess: list[int]
    wants_logits: bool


class _Batch:
    """The tokens of a step, at most ``room`` of them."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.parts: list[_Part] = []
        self._ids: list[int] = []
        self._segments: list[tuple[int, int, int, int]] = []
        self._rows: list[int] = []

    def put(self, text: Text, guess: list[int]) -> None:
        known = min(len(text.ids) - text.cached, self.room - len(self._ids))
        if known <= 0:
            return
        guess = guess[: self.room - len(self._ids) - known]
        row = len(self._ids)
        self._ids += text.ids[text.cached : text.cached + known] + guess
        self._segments.append((row, text.slot, text.cached, known + len(guess)))
        complete = text.cached + known == len(text.ids)
        if complete:
            self._rows += range(row + known - 1, row + known + len(guess))
        self.parts.append(_Part(text, known, guess, complete))

    def ids(self) -> npt.NDArray[np.int64]:
        return np.array(self._ids, np.int64)

    def segments(self) -> npt.NDArray[np.int64]:
        return np.array(self._segments, np.int64)

    def rows(self) -> npt.NDArray[np.int64]:
        return np.array(self._rows, np.int64)


def _check_memory(
    shape: Shape, weights: int, cache_dtype: str, context: int, num_texts: int, available: int | None
) -> None:
    if context < 1 or num_texts < 1:
        raise ValueError(f"A context of {context} tokens and {num_texts} texts are not possible; both are at least 1.")
    cache = cache_bytes(shape, cache_dtype, num_texts, context)
    rest = weights + activation_bytes(shape) + _SPARE
    needed = rest + cache
    if available is not None and needed > available:
        smallest = cache_bytes(shape, "int4", num_texts, context)
        remedy = "a shorter context (for btlm generate, fewer --max-new-tokens)"
        if rest + cache_bytes(shape, "int4", 1, 1) > available:
            remedy = "weights in fewer bits (btlm quantize)"
        elif smallest < cache and rest + smallest <= available:
            remedy += f", or an int4 cache ({gigabytes(smallest)})"
        raise ValueError(
            f"{num_texts} x {context:,} tokens of context take {gigabytes(cache)} in {cache_dtype} beside weights of "
            f"{gigabytes(weights)}: {gigabytes(needed)} in all, and {gigabytes(available)} of memory are free; use "
            f"{remedy}."
        )
