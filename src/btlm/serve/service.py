"""What the parts of the server share: the model, who writes with it, and what they need to know of it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from btlm.engine.options import GenerationOptions
from btlm.engine.sampling import Mask
from btlm.errors import OptionError

from .errors import ApiError, invalid, too_long
from .metrics import Metrics
from .options import Serve
from .schema import Sampling
from .vocabulary import Vocabulary
from .worker import Worker


@dataclass
class Service:
    """The model and what is known of it.

    Args:
        settings: Options of the command.
        worker: Who writes.
        vocabulary: The tokens.
        metrics: Counts what is done.
        name: Name of the model.
        fingerprint: Changes with anything that the same seed's text depends on.
        created: Unix time of the start.
        draining: Whether the server is being stopped.
        compiler: Compiles grammars, one at a time.
    """

    settings: Serve
    worker: Worker
    vocabulary: Vocabulary
    metrics: Metrics
    name: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    compiler: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "btlm-grammars"))

    @property
    def context(self) -> int:
        """Tokens of a request, at most."""
        return self.worker.engine.context

    @cached_property
    def grammars(self) -> Any:
        """Compiles grammars; made in the thread of ``compiler``, since that takes half a second or more."""
        from .structured import Grammars

        engine = self.worker.engine
        return Grammars(self.vocabulary.tokenizer, self.vocabulary.size, sorted(engine.end_ids))

    def check_model(self, name: str | None) -> None:
        """Check the name of the model in a request.

        Raises:
            ApiError: The server has another model.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
                reason="model",
            )

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of texts, long ones without stopping the event loop.

        Raises:
            ApiError: A text is surely too long.
        """
        for text in texts:
            if not self.vocabulary.can_fit(text, self.context):
                raise too_long(f"A prompt of {len(text):,} characters exceeds the context of {self.context:,} tokens.")

        encode = partial(self.vocabulary.encode, texts, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode) if sum(map(len, texts)) > 10_000 else encode()

    async def mask(self, asked: Sampling) -> Callable[[], Mask] | None:
        """See :meth:`btlm.serve.structured.Grammars.mask`."""
        if not asked.forms:
            return None
        made: Callable[[], Mask] | None = await asyncio.get_running_loop().run_in_executor(
            self.compiler, lambda: self.grammars.mask(asked)
        )
        return made


def options_of(asked: Sampling, max_new_tokens: int, vocab_size: int) -> GenerationOptions | None:
    """How to continue; ``None`` to write nothing.

    Raises:
        ApiError: A value cannot be used.
    """
    if max_new_tokens == 0:
        return None
    sampling: dict[str, Any] = {"temperature": 1.0 if asked.temperature is None else asked.temperature}
    if sampling["temperature"] > 0:
        top_k = asked.top_k if asked.top_k is not None and asked.top_k > 0 else None
        sampling |= {"top_p": asked.top_p, "top_k": top_k, "seed": asked.seed_of_first}
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    if (largest := max(bias, default=0)) >= vocab_size:
        raise invalid("logit_bias", f"Token {largest} of logit_bias is not in the vocabulary of {vocab_size:,}.")
    try:
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            repetition_penalty=asked.repetition_penalty,
            logit_bias=bias or None,
            **sampling,
        )
    except OptionError as error:
        raise invalid(None, str(error)) from error
