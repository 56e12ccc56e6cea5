"""What Prometheus reads at `/metrics`."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from btlm.engine.request import Request
from btlm.errors import RequestCancelled

if TYPE_CHECKING:
    from .worker import Text, Worker

_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts what the server does."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each, which nobody asks for
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"btlm_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"btlm_{name}", text, registry=registry, buckets=buckets)

        self.answers = counter("http_requests", "HTTP requests answered, by path and status.", "path", "status")
        self.refusals = counter("refusals", "Requests that were refused, by reason.", "reason")
        self.texts = counter("texts", "Texts that have ended, by how.", "finished")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.reused_tokens = counter("reused_prompt_tokens", "Tokens of prompts that other texts had computed.")
        self.new_tokens = counter("new_tokens", "Tokens that were written.")
        self.guesses = counter("guessed_tokens", "Tokens that were guessed, by who guessed.", "guesser")
        self.accepted = counter("accepted_tokens", "Guesses that were right, by who guessed.", "guesser")
        self.queue_s = histogram("queue_seconds", "Time that texts waited for the engine.", _WAITS)
        self.first_token_s = histogram("first_token_seconds", "Time from a request to its first token.", _WAITS)
        self.token_s = histogram("token_seconds", "Mean time per token of a text after its first one.", _STEPS)
        self.step_s = histogram("step_seconds", "Time of a step of the engine.", _STEPS)

    def watch(self, worker: "Worker") -> None:
        """Tell what a worker has to do, too."""
        cache = worker.engine.cache

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"btlm_{name}", text, registry=self.registry)

        gauge("texts_waiting", "Texts that wait.").set_function(lambda: worker.num_waiting)
        gauge("texts_running", "Texts that are being written.").set_function(lambda: worker.num_running)
        gauge("cache_pages", "Pages of the cache of keys and values.").set(cache.num_pages)
        gauge("cache_pages_used", "Pages that hold texts, those of ended ones included.").set_function(
            lambda: cache.num_pages - cache.free_pages
        )
        gauge("engine_alive", "1 while the engine can write, else 0.").set_function(lambda: worker.alive)

    def ended(self, text: "Text", request: Request) -> None:
        """Count a text of the engine that has ended."""
        cancelled = isinstance(request.error, RequestCancelled)
        self.texts.labels(text.cancelled_for if cancelled else request.finished).inc()
        self.prompt_tokens.inc(request.prompt_tokens)
        self.reused_tokens.inc(request.reused_tokens)
        for name, guesser in (("draft", request.draft), ("lookup", request.lookup)):
            self.guesses.labels(name).inc(guesser.guessed)
            self.accepted.labels(name).inc(guesser.accepted)
        if request.started is not None:
            self.queue_s.observe(request.started - text.submitted)
        if request.written is not None:
            self.first_token_s.observe(request.written[0] - text.submitted)
        if request.tokens_per_s is not None:
            self.token_s.observe(1 / request.tokens_per_s)

    def stepped(self, tokens: int, seconds: float) -> None:
        """Count a step of the engine."""
        self.new_tokens.inc(tokens)
        self.step_s.observe(seconds)

    def text(self) -> bytes:
        """All of it in the format of Prometheus."""
        return generate_latest(self.registry)
