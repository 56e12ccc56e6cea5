"""Text to text on the engine: a prompt in, its continuation out, piece by piece or whole."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.locate import BUNDLED_MODEL
from btlm.checkpoint.open import Checkpoint
from btlm.engine.engine import Engine
from btlm.engine.options import GenerationOptions

from .report import GenerationReport
from .text import StopStrings, TextPieces, encode


class TextGenerator:
    """Continues text.

    Args:
        engine: Engine of the model.
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer

    @classmethod
    def open(
        cls, model: Checkpoint | Path | str = BUNDLED_MODEL, *, base: Path | str | None = None, **engine: Any
    ) -> Self:
        """Make a generator for a checkpoint.

        Args:
            model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
            base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.
            **engine: Arguments of :meth:`btlm.engine.Engine.open`, such as ``context`` and ``threads``.

        Raises:
            DoesNotFit, NotSupported, ValueError: See :meth:`btlm.engine.Engine.open`.
        """
        checkpoint = open_checkpoint(model, base)
        return cls(Engine.open(checkpoint, **engine), checkpoint.tokenizer)

    def generate(self, prompt: str, options: GenerationOptions | None = None, *, stop: Sequence[str] = ()) -> str:
        """The continuation of a prompt, without the prompt; arguments and errors as of :meth:`stream`."""
        return "".join(self.stream(prompt, options, stop=stop))

    def stream(
        self, prompt: str, options: GenerationOptions | None = None, *, stop: Sequence[str] = ()
    ) -> "TextStream":
        """Continue a prompt, piece by piece: iterate over the result, once.

        Args:
            prompt: Text of at least one character.
            options: How to continue it; greedily if they are not given. Beams are not supported.
            stop: Texts before which the continuation ends; they are not part of it.

        Raises:
            EngineFull, NotSupported, TooLong: See :meth:`btlm.engine.Engine.generate`; raised by the first piece.
            ValueError: The prompt or a text in ``stop`` is empty.
        """
        if isinstance(stop, str):
            raise TypeError(f"stop is the text {stop!r}; give a list of texts.")
        return TextStream(self, encode(self.tokenizer, prompt), options or GenerationOptions(), StopStrings(stop))


class TextStream:
    """A continuation that is being written; see :meth:`TextGenerator.stream`.

    Args:
        generator: Generator that writes it.
        ids: Token ids of the prompt.
        options: How to continue it.
        stop: Finds the texts that end it.

    Attributes:
        report: What was done; ``None`` until the continuation has ended.
    """

    def __init__(self, generator: TextGenerator, ids: list[int], options: GenerationOptions, stop: StopStrings) -> None:
        if options.samples and options.seed is None:
            options = replace(options, seed=secrets.randbelow(2**31))  # to be reported
        self.ids, self.options = ids, options
        self._generator, self._stop = generator, stop
        self.report: GenerationReport | None = None

    def __iter__(self) -> Iterator[str]:
        """Whole characters, as soon as they are known; what may be the beginning of a stop text waits."""
        engine, stop = self._generator.engine, self._stop
        pieces = TextPieces(self._generator.tokenizer)
        start = first = last = time.perf_counter()
        count, ended = 0, False
        request = engine.add(self.ids, self.options)
        with closing(engine.follow(request)) as tokens:  # type: ignore[type-var]  # a generator
            for token in tokens:
                last = time.perf_counter()
                count += 1
                first = last if count == 1 else first
                ended = token.id in engine.end_ids
                if text := stop.pass_on("" if ended else pieces.put([token.id])):
                    yield text
                if stop.found is not None:
                    break
        if text := stop.pass_on(pieces.end()) + stop.end():
            yield text
        self.report = GenerationReport(
            prompt_tokens=len(self.ids),
            new_tokens=count,
            first_token_s=first - start,
            total_s=last - start,
            end_of_text=ended,
            seed=self.options.seed,
            stop=stop.found,
            guesses=request.draft.guessed + request.lookup.guessed,
            right_guesses=request.draft.accepted + request.lookup.accepted,
        )
