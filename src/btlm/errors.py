"""Errors that a command line or a server must tell apart; each is a ``ValueError`` with a message for the user."""

from collections.abc import Callable
from string import Formatter


class OptionError(ValueError):
    """Options that cannot be used. The message names them, and a command line shows its flags in their place.

    Args:
        template: A format string: ``{name}`` stands for the option ``name``, which is an argument of a function or a
            field of a dataclass, and ``{}`` for the next of the values.
        values: Values for the message.
    """

    def __init__(self, template: str, *values: object) -> None:
        super().__init__(template, *values)  # `args`, so that the error can be pickled

    def text(self, name_of: Callable[[str], str]) -> str:
        """The message with the options called by ``name_of``."""
        template, *values = self.args
        return Formatter().vformat(template, values, _Names(name_of))

    def __str__(self) -> str:
        return self.text(str)


class NotSupported(ValueError):
    """The engine cannot run this model or this request; Transformers can."""


class EngineFull(ValueError):
    """As many requests as the engine has room for are under way; one can be added when another ends."""


class TooLong(ValueError):
    """Prompt and continuation do not fit the context; a shorter request does."""


class DoesNotFit(ValueError):
    """The memory or the disk is too small for what was asked."""


class NothingAllowed(ValueError):
    """A request forbids every token that could come next."""


class ResultsError(ValueError):
    """A file of results that is damaged, of another format, or no file of results."""


class RequestCancelled(ValueError):
    """A request was removed before its end."""


class DraftVocabulary(ValueError):
    """A draft whose vocabulary is not that of its model."""


class DraftTooLarge(ValueError):
    """A draft that is not smaller than its model."""


class NotFinite(ValueError, FloatingPointError):
    """A training step whose loss or gradient is not finite; nothing was updated.

    Args:
        problem: Message for the user.
        losses: Loss of every micro-batch of the step, by rank.
    """

    def __init__(self, problem: str, losses: list[list[float]]) -> None:
        super().__init__(problem, losses)
        self.problem = problem
        self.losses = losses

    def __str__(self) -> str:
        return self.problem


class LogitsNotFinite(ValueError):
    """Texts that the model has no numbers for: its weights, or what it computed for these texts, are NaN or infinite.

    Args:
        problem: Message for the user.
        parts: Indices of the texts in the step.
    """

    @staticmethod
    def problem_of(weight: str | None) -> str:
        """The message about a weight that is not finite, or about logits that are not though all weights are."""
        if weight is None:
            return "The activations for this text are not finite, though the weights are; the text cannot be continued."
        return (
            f"{weight} holds NaN or infinity, so the model cannot continue a text; get the weights again, or use an "
            "earlier checkpoint."
        )

    def __init__(self, problem: str, parts: list[int]) -> None:
        super().__init__(problem, parts)
        self.problem = problem
        self.parts = parts

    def __str__(self) -> str:
        return self.problem


class _Names(dict[str, str]):
    """Calls every option by a function."""

    def __init__(self, name_of: Callable[[str], str]) -> None:
        super().__init__()
        self.name_of = name_of

    def __missing__(self, name: str) -> str:
        return self.name_of(name)
