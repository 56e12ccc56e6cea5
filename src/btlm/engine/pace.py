"""How many tokens of prompts a step may read while others are being written."""

_NEW = 0.2  # weight of the latest step in the running means
_ENOUGH = 8  # prompt tokens that a step needs to tell what one costs; fewer of them count less


class Pace:
    """Learns from the durations of steps, so that reading a long prompt does not hold up other requests.

    Durations decide only how prompts are cut into steps, which changes no result.

    Args:
        patience: Longest step, in usual ones, that a request under way waits for its next token, more than 1; no limit
            if it is ``None``.

    Raises:
        ValueError: ``patience`` is 1 or less.
    """

    def __init__(self, patience: float | None = None) -> None:
        if patience is not None and not patience > 1:
            raise ValueError(f"A patience of {patience} usual steps leaves no time to read prompts; give more than 1.")
        self._patience = patience
        self._usual: float | None = None  # seconds of a step without prompts
        self._cost: float | None = None  # seconds per token of a prompt

    def learn(self, prompt_tokens: int, written: int, seconds: float) -> None:
        """Record a step.

        Args:
            prompt_tokens: Number of tokens of prompts that it read.
            written: Number of requests for which it only wrote.
            seconds: Its duration.
        """
        if not prompt_tokens:
            self._usual = _mean(self._usual, seconds)
        elif prompt_tokens >= _ENOUGH or self._cost is not None:
            rest = self._usual if written and self._usual is not None else 0.0
            weight = _NEW * min(1.0, prompt_tokens / _ENOUGH)
            self._cost = _mean(self._cost, max(seconds - rest, 0.0) / prompt_tokens, weight)

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of prompts in a step for which others wait; ``None`` without a limit, or while nothing is known."""
        if self._patience is None or self._usual is None or not self._cost:
            return None
        return max(1, int((self._patience - 1) * self._usual / self._cost))


def _mean(old: float | None, new: float, weight: float = _NEW) -> float:
    return new if old is None else old + weight * (new - old)
