"""What a generation did."""

from dataclasses import dataclass

from btlm.console import plural


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """What a generation did.

    Args:
        prompt_tokens, new_tokens: Counts; end-of-text is one of the new tokens.
        first_token_s: Seconds to the first new token; ``None`` with beams.
        total_s: Seconds to the last one.
        end_of_text: The model ended the text; otherwise it met ``max_new_tokens`` or a stop text.
        seed: Seed to draw the samples again; ``None`` if nothing was sampled.
        stop: Stop text that ended it, if one did.
        guesses, right_guesses: Numbers of tokens that were guessed, by a draft or from the text itself, and of those
            that were right.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_s: float | None
    total_s: float
    end_of_text: bool
    seed: int | None
    stop: str | None = None
    guesses: int = 0
    right_guesses: int = 0

    def __str__(self) -> str:
        ended = "end of text" if self.end_of_text else "max_new_tokens" if self.stop is None else repr(self.stop)
        if self.first_token_s is None:
            speed = f"in {self.total_s:.2f} s, prompt included"
        else:
            speed = f"first after {self.first_token_s:.2f} s"
            if self.new_tokens > 1 and self.total_s > self.first_token_s:
                speed += f", then {(self.new_tokens - 1) / (self.total_s - self.first_token_s):.1f} tokens/s"
        seed = "" if self.seed is None else f"; seed {self.seed}"
        guessed = f"; {self.right_guesses:,} of {self.guesses:,} guesses right" if self.guesses else ""
        written = f"{plural(self.prompt_tokens, 'prompt token')}, {self.new_tokens:,} new ({speed})"
        return f"{written}{guessed}; stopped at {ended}{seed}"
