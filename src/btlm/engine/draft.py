"""Drafts: a small model guesses the next tokens of several requests, and the large one checks them in one step.

A guess counts only where it is the token that the large model chooses by its own draw, so drafts change no result.
"""

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tokenizer import read_tokenizer
from btlm.errors import DraftTooLarge, DraftVocabulary, LogitsNotFinite, NothingAllowed
from btlm.model.architecture_btlm import Architecture

from .cache import Layers
from .network import Network
from .sampling import Mask, Sampler

_FIRST = 2  # guesses while their cost is not known
_SLOWEST = 0.08  # weight of the latest guess in the running share of right ones
_SHORTEST_WAIT, _LONGEST_WAIT = 8, 64  # tokens until a draft that does not pay is tried again
_NEW = 0.03  # weight of the latest step or guess in the running means of costs


class DraftCosts:
    """Learns what a step and a guess cost, to tell how many guesses pay.

    The duration of a step is taken to grow linearly with its tokens. Durations decide only how much is guessed, which
    changes no result.
    """

    def __init__(self) -> None:
        self._means = np.zeros(4)  # of tokens, seconds, and their products with tokens
        self._per_token = 0.0
        self._per_pass = 0.0
        self._steps = self._passes = 0

    def learn_step(self, tokens: int, seconds: float) -> None:
        """Record a step of the large model that read no prompts."""
        self._steps += 1
        new = np.array([tokens, seconds, tokens * tokens, tokens * seconds])
        self._means += max(_NEW, 1 / self._steps) * (new - self._means)
        mean, mean_s, square, product = self._means
        if (variance := square - mean * mean) > 0.1:
            self._per_token = max(0.0, (product - mean * mean_s) / variance)

    def learn_pass(self, seconds: float) -> None:
        """Record a pass of the draft with one token per request."""
        self._passes += 1
        self._per_pass += max(_NEW, 1 / self._passes) * (seconds - self._per_pass)

    def best(self, share: float, most: int, writing: int) -> int:
        """Number of guesses that gives most tokens per second.

        Args:
            share: Probability that a guess is right if those before it are.
            most: Largest number.
            writing: Number of requests that share a step.
        """
        if not (self._steps and self._passes):
            return min(most, _FIRST)
        step = max(self._means[1] - self._per_token * (self._means[0] - writing), 0.0) / writing  # for one token each
        per_guess = self._per_token + self._per_pass / writing
        best, fastest, tokens = 0, 0.0, 0.0
        for number in range(most + 1):
            tokens += share**number
            if (speed := tokens / max(step + number * per_guess, 1e-9)) > fastest:
                best, fastest = number, speed
        return best


class DraftGuesses:
    """What the draft has read of one request, and how often it was right.

    Args:
        most: Guesses at a time at most; 0 turns them off.

    Attributes:
        read: Number of tokens that the draft has read, guesses included. What is behind the tokens that the model has
            read counts only until the next step.
        guessed, accepted: Number of guesses, and of right ones.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.read = self.guessed = self.accepted = 0
        self._tried = 0
        self._share = 0.5
        self._wait = _SHORTEST_WAIT
        self._pause = 0

    def number(self, costs: DraftCosts, most: int, writing: int) -> int:
        """Number of tokens to guess for the next step; see :meth:`DraftCosts.best`."""
        most = min(most, self.most)
        if most <= 0:
            return 0
        if self._pause:
            self._pause -= 1
            return 0
        if number := costs.best(self._share, most, writing):
            return number
        self._pause = self._wait
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        return 1  # tells whether the draft has become better

    def learn(self, guessed: int, accepted: int) -> None:
        """Record how many tokens of a guess were right."""
        self.guessed += guessed
        self.accepted += accepted
        for i in range(min(guessed, accepted + 1)):
            self._tried += 1
            weight = max(_SLOWEST, 1 / (self._tried + 2))
            self._share += weight * ((i < accepted) - self._share)
        if accepted:
            self._wait = _SHORTEST_WAIT


class Wanted(NamedTuple):
    """What a request wants of the draft.

    Args:
        ids: Tokens of the request.
        sampler: Chooses its tokens; it is not changed.
        draft: What the draft has read of it.
        slot: Its slot in the cache.
        end: Number of tokens that the draft shall have read.
        number: Number of tokens to guess after them; if it is not 0, ``end`` is all that the request has.
        mask: Tells which tokens may come next.
        prompt_tokens: Number of ``ids`` that the mask is not given.
    """

    ids: list[int]
    sampler: Sampler
    draft: DraftGuesses
    slot: int
    end: int
    number: int
    mask: Mask | None
    prompt_tokens: int


class Draft:
    """A small network that guesses for the requests of an engine.

    Args:
        network: The network.
        cache: Its layers of the engine's cache.
    """

    def __init__(self, network: Network, cache: Layers) -> None:
        self.network = network
        self.costs = DraftCosts()
        self._cache = cache

    def guess(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """Read what requests have, and guess what follows; the requests share each pass.

        Returns:
            The guesses of each, fewer than wanted where the draft has too much to read first, where the text is longer
            than its positions, where its numbers are not finite, or where the mask of the request allows no token.
        """
        guesses: list[list[int]] = [[] for _ in wanted]
        left, parts = self.network.max_tokens, []
        for i, (ids, _, draft, _, end, number, *_) in enumerate(wanted):
            new = ids[draft.read : min(end, draft.read + left)]
            if not new or end + number > self.network.architecture.n_positions:
                continue
            left -= len(new)
            parts.append((i, new, number if draft.read + len(new) == end else 0))
        # Draws of its own that are those which the request will make.
        samplers = {i: copy.deepcopy(wanted[i].sampler) for i, _, number in parts if number}
        while parts:
            start = time.perf_counter()
            logits = self._pass([(wanted[i], new, number > 0) for i, new, number in parts])
            if logits is None:
                break
            if all(len(new) == 1 for _, new, _ in parts):
                self.costs.learn_pass(time.perf_counter() - start)
            rows = zip([(i, number) for i, _, number in parts if number], logits, strict=True)
            parts = []
            for (i, number), row in rows:
                before = [*wanted[i].ids, *guesses[i]]
                allowed = None if (mask := wanted[i].mask) is None else mask(before[wanted[i].prompt_tokens :])
                try:
                    guess = samplers[i].choose(row, before, allowed)
                except NothingAllowed:
                    continue
                guesses[i].append(self.choose(before, guess))
                if number > 1:
                    parts.append((i, guesses[i][-1:], number - 1))
        return guesses

    def choose(self, before: Sequence[int], guess: int) -> int:
        """The guess after some tokens; a program that measures can replace this to impose how many are right."""
        return guess

    def _pass(self, parts: Sequence[tuple[Wanted, list[int], bool]]) -> npt.NDArray[np.float32] | None:
        """Logits after each part that wants them; ``None`` if some are not finite: those requests get no guesses."""
        ids: list[int] = []
        segments, rows = [], []
        for one, new, guesses in parts:
            segments.append((len(ids), one.slot, one.draft.read, len(new)))
            ids += new
            rows += [len(ids) - 1] * guesses
        arrays = [np.array(values, np.int64) for values in (ids, segments, rows)]
        try:
            logits = self.network.forward(arrays[0], arrays[1], self._cache, arrays[2])
        except LogitsNotFinite as error:
            for i in error.parts:
                parts[i][0].draft.most = 0
            return None
        for one, new, _ in parts:
            one.draft.read += len(new)
        return logits


def check_draft(model: Architecture, draft: Architecture) -> None:
    """Check that a network can guess for another one.

    Raises:
        DraftTooLarge: It is not smaller.
        DraftVocabulary: It has another vocabulary.
    """
    if draft.vocab_size != model.vocab_size:
        raise DraftVocabulary(
            f"The draft has a vocabulary of {draft.vocab_size:,} tokens and the model one of {model.vocab_size:,}; a "
            "draft needs that of its model."
        )
    if draft.num_parameters() >= model.num_parameters():
        raise DraftTooLarge(
            f"The draft has {draft.num_parameters():,} parameters and the model {model.num_parameters():,}; a draft "
            "must be smaller than its model, best by twenty times or more."
        )


def check_tokens(model: Checkpoint, draft: Checkpoint) -> None:
    """Check that ids mean the same tokens to both, if both say what they mean.

    Raises:
        DraftVocabulary: They do not.
    """
    ours, theirs = (read_tokenizer(checkpoint.folder) for checkpoint in (model, draft))
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise DraftVocabulary(
            f"The tokens of the draft {draft.title} are not those of {model.title}; a draft needs the vocabulary of "
            "its model."
        )
