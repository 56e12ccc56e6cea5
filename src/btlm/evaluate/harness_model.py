"""lm-evaluation-harness on our engine: log-likelihoods and continuations for its tasks.

What is asked is tokenized and cut as by the harness' own class for Transformers, ``HFLM``. It is then sorted by its
tokens, so that the engine finds what begins alike, such as the examples before a question or the answers of one, in its
cache, and computes it once.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from btlm.checkpoint.open import Checkpoint
from btlm.engine.engine import Engine
from btlm.engine.options import GenerationOptions
from btlm.engine.request import Request
from btlm.errors import EngineFull, NotSupported
from btlm.model.architecture_btlm import END_OF_TEXT_ID

from .journal import Journal
from .results import model_digest

# Requests that are under way together, and tokens in their cache, unless one request needs more.
_REQUESTS, _CACHE_TOKENS = 32, 8192
# The end of a paragraph. Examples before a question end there, and their tokens are kept.
_PARAGRAPH = re.compile(r"(?<=\S)(?=\n\n)")
# Options of a continuation that the engine has under the same name.
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size")


class EngineLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no type hints
    """A model of lm-evaluation-harness that runs on the engine.

    Args:
        pretrained: An open checkpoint, its folder, or its id on the Hugging Face Hub.
        batch_size: Number of requests that are computed together, at most; ``None``, 1 and ``"auto"`` let it be 32. It
            changes the speed, and not the results.
        max_batch_size, device: Given by the harness and without effect: the engine runs on the CPU.
        max_length: Tokens of a request, at most; ``n_positions`` if it is ``None``. Longer texts lose their beginning.
        max_gen_toks: Tokens of a continuation, at most, where a task does not say.
        cache_dtype, kernels, threads: See :meth:`btlm.engine.Engine.open`.
        journal: Holds the answers that are known, and receives the others; one in memory by default.
        on_tokens: Called with the kind of request, the number of tokens that were answered since the last call, and
            that of all tokens to answer.

    Raises:
        DoesNotFit, NotSupported, ValueError: See :meth:`btlm.engine.Engine.open`.
    """

    def __init__(
        self,
        pretrained: Checkpoint | Path | str,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        cache_dtype: str = "auto",
        kernels: str = "auto",
        threads: int | None = None,
        journal: Journal | None = None,
        on_tokens: Callable[[str, int, int], object] | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint = Checkpoint.open(pretrained)
        context = self.checkpoint.architecture.n_positions if max_length is None else max_length
        self.engine = Engine.open(
            self.checkpoint,
            context=context,
            num_requests=_REQUESTS if batch_size in (None, 1, "1", "auto") else int(batch_size or 0),
            cache_tokens=max(context, _CACHE_TOKENS),
            cache_dtype=cache_dtype,
            kernels=kernels,
            threads=threads,
        )
        self.max_length, self.max_gen_toks = context, max_gen_toks
        self.num_asked = 0  # requests that the engine answered, not the journal
        self._tokenizer = self.checkpoint.tokenizer
        self._journal = Journal() if journal is None else journal
        self._on_tokens = on_tokens
        self._sha256 = model_digest(self.checkpoint)
        self._model_key = " ".join(
            (self._sha256, self.engine.cache.dtype, self.engine.network.kernels.name, version("btlm"))
        )
        self._encode = lru_cache(maxsize=4096)(self._encode_piece)
        self._splits = _splits_at_spaces(self._tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, which also stands before the first one."""
        return min(self.engine.end_ids, default=END_OF_TEXT_ID)

    @property
    def tokenizer_name(self) -> str:
        """Name of the checkpoint, for caches of the harness."""
        return self.checkpoint.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; nothing is added to it."""
        pieces = _PARAGRAPH.split(string) if self._splits else [string]
        return [token for piece in pieces for token in self._encode(piece)]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes about the model beside its results."""
        return {"model_num_parameters": self.checkpoint.architecture.num_parameters(), "model_sha": self._sha256}

    def settings(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {"context": self.max_length, "cache_dtype": self.engine.cache.dtype}

    # What the harness asks

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [(nats, bool(best)) for nats, best in self._answer([self._score(*ids) for _, *ids in requests], "score")]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation, and whether greedy decoding would write it.

        Raises:
            ValueError: A continuation has no tokens, or more than the context.
        """
        asked = []
        for context, continuation in (request.args for request in requests):
            if context == "":
                ids = self.tok_encode(continuation)
                if ids[:1] != [self.prefix_token_id]:  # as in the harness: a text may begin with end-of-text itself
                    ids = [self.prefix_token_id, *ids]
                asked.append(self._score(ids[:1], ids[1:]))
            else:
                asked.append(self._score(*self._encode_pair(context, continuation)))
        return [(nats, bool(best)) for nats, best in self._answer(asked, "score")]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability in nats of each text, every token predicted once, in windows of ``max_length`` tokens."""
        asked: list[_Score] = []
        numbers = []
        for (text,) in (request.args for request in requests):
            windows = list(
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            )
            numbers.append(len(windows))
            asked += [self._score(*make_disjoint_window(window)) for window in windows]
        answers = iter(self._answer(asked, "score"))
        return [sum(next(answers)[0] for _ in range(number)) for number in numbers]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each text up to a stop string, which is cut off, or to the number of tokens asked for.

        Samples are drawn with a seed that follows from the request and from how often it is repeated.

        Raises:
            NotSupported: A task asks for beams.
            ValueError: A task asks for more tokens than the context, or for an option that the engine does not have.
        """
        repeated: Counter[str] = Counter()
        asked = []
        for context, arguments in (request.args for request in requests):
            write = self._write(context, arguments)
            if write.options.samples:
                repeated[write.key] += 1
                write = self._write(context, arguments, repeated[write.key])
            asked.append(write)
        return list(self._answer(asked, "write"))

    # Requests to the engine

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> "_Score":
        number = len(continuation)
        if not 0 < number <= self.max_length:
            raise ValueError(
                f"A continuation of {number:,} tokens cannot be scored in a context of {self.max_length:,}; it needs "
                "at least one, and no more than the context."
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        packed = _packed(ids)
        return _Score(self._key("score", packed, len(ids) - number), packed, len(ids) - number)

    def _write(self, context: str, arguments: dict[str, Any], repeat: int = 0) -> "_Write":
        given = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        end = self._tokenizer.id_to_token(self.eot_token_id)
        until = handle_stop_sequences(given.pop("until", None), eos=end)
        most, samples = given.pop("max_gen_toks"), given.pop("do_sample")
        if given.pop("num_beams", 1) != 1:
            raise NotSupported("The task asks for beams, which the engine does not have.")
        options = {name: given.pop(name) for name in _SAMPLING if given.get(name) is not None}
        given = {name: value for name, value in given.items() if name not in _SAMPLING}
        if given:
            raise ValueError(f"The task asks for {', '.join(given)}, which the engine does not have.")
        if not 0 < most < self.max_length:
            raise ValueError(
                f"The task asks for {most:,} tokens in a context of {self.max_length:,}; give it a longer context."
            )
        samples = samples and options.setdefault("temperature", 1.0) != 0
        if not samples:
            options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        ids = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        packed = _packed(ids)
        key = self._key("write", packed, json.dumps([most, samples, options, until, repeat], sort_keys=True))
        seed = int(key[:12], 16) if samples else None
        return _Write(key, packed, until, GenerationOptions(max_new_tokens=most, seed=seed, **options), self._decode)

    def _answer(self, asked: "Sequence[_Score] | Sequence[_Write]", kind: str) -> list[Any]:
        """The answers, those of the journal included, in the order of the questions."""
        missing = {each.key: each for each in asked if each.key not in self._journal}
        waiting: list[_Score | _Write] = sorted(missing.values(), key=lambda each: each.ids, reverse=True)
        total = sum(each.size for each in waiting)
        running: dict[Request, _Score | _Write] = {}
        self._tell(kind, 0, total)
        try:
            while waiting or running:
                while waiting and self.engine.has_room:
                    try:
                        running[waiting[-1].begin(self.engine)] = waiting[-1]
                    except EngineFull:
                        if not running:
                            raise
                        break
                    waiting.pop()
                self.engine.step()
                for request, each in list(running.items()):
                    if request.error is not None:
                        raise request.error
                    if (answer := each.answer(request)) is None:
                        continue
                    self.engine.remove(request)
                    del running[request]
                    self._journal[each.key] = answer
                    self.num_asked += 1
                    self._tell(kind, each.size, total)
        finally:
            for request in running:
                self.engine.remove(request)
        return [self._journal[each.key] for each in asked]

    def _tell(self, kind: str, tokens: int, total: int) -> None:
        if self._on_tokens is not None:
            self._on_tokens(kind, tokens, total)

    def _key(self, kind: str, ids: bytes, more: object) -> str:
        return hashlib.sha256(f"{self._model_key} {kind} {more} ".encode() + ids).hexdigest()

    def _encode_piece(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class _Score:
    """A text whose last tokens are scored.

    Args:
        key: Digest.
        ids: Tokens; see :func:`_packed`.
        first: Index of the first token that is scored.
    """

    key: str
    ids: bytes
    first: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.ids) // 4

    def begin(self, engine: Engine) -> Request:
        """Give it to the engine."""
        return engine.add_score(_unpacked(self.ids), self.first)

    def answer(self, request: Request) -> tuple[float, bool] | None:
        """The answer; ``None`` before the end."""
        if request.finished is None:
            return None
        nats = float(np.sum([token.logprob for token in request.scores], dtype=np.float64))
        return nats, all(token.best for token in request.scores)


@dataclass(frozen=True)
class _Write:
    """A text that is continued.

    Args:
        key: Digest.
        ids: Tokens; see :func:`_packed`.
        until: Strings that end it.
        options: How to continue it.
        decode: Text of token ids.
    """

    key: str
    ids: bytes
    until: list[str]
    options: GenerationOptions
    decode: Callable[[Iterable[int]], str]

    @property
    def size(self) -> int:
        """Number of tokens, with those that may be written."""
        return len(self.ids) // 4 + self.options.max_new_tokens

    def begin(self, engine: Engine) -> Request:
        """Give it to the engine."""
        return engine.add(_unpacked(self.ids), self.options)

    def answer(self, request: Request) -> str | None:
        """The answer; ``None`` before the end."""
        ids = [token.id for token in request.tokens]
        if request.finished == "stop":
            ids.pop()
        elif request.finished is None and not self._stops(ids):
            return None
        text: str = postprocess_generated_text(self.decode(ids), stop=self.until, think_end_token=None)
        return text

    def _stops(self, ids: list[int]) -> bool:
        """Whether a stop string is in the text; it can only be in the last tokens, of a byte or more each."""
        longest = max((len(stop.encode()) for stop in self.until), default=0)
        # Several tokens may be new after a step with guesses, and the first ones may begin within a character.
        end = self.decode(ids[-(longest + 20) :])
        return any(stop in end for stop in self.until if stop)


def _splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a text cut between a character and a space has the tokens of its parts, as with the rule of GPT-2."""
    content = json.loads(tokenizer.to_str())
    rule = content["pre_tokenizer"] or {}
    plain = content["normalizer"] is None and not rule.get("add_prefix_space", True)
    return plain and rule["type"] == "ByteLevel" and rule.get("use_regex", True)


def _packed(ids: Sequence[int]) -> bytes:
    """Tokens as bytes that sort as the tokens do, in four bytes each where a list needs up to forty."""
    return np.asarray(ids, ">u4").tobytes()


def _unpacked(ids: bytes) -> list[int]:
    tokens: list[int] = np.frombuffer(ids, ">u4").tolist()
    return tokens
