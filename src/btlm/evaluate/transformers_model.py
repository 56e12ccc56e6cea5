"""lm-evaluation-harness on Transformers, for models that the engine does not run: those with dynamic interpolation."""

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from lm_eval.models.huggingface import HFLM

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.to_transformers import load_model

from .journal import Journal
from .results import model_digest

_TOGETHER = 32  # requests after which the answers are kept


class TransformersLM(HFLM):  # type: ignore[misc]  # lm_eval has no type hints
    """The harness' own model, with a journal of its answers.

    Requests are computed one at a time: with dynamic interpolation, what a row of a batch gives would depend on the
    padding that the others need.

    Args:
        checkpoint: The model.
        max_length: Tokens of a request, at most; ``n_positions`` if it is ``None``. Longer texts lose their beginning.
        journal: Holds the answers that are known, and receives the others.
        on_requests: Called with the kind of request, the number of requests that were answered since the last call, and
            that of all requests to answer.

    Raises:
        ValueError: The checkpoint cannot be used.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_length: int | None,
        journal: Journal,
        on_requests: Callable[[str, int, int], object] = lambda kind, done, total: None,
    ) -> None:
        model, tokenizer = load_model(checkpoint)
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)
        self._journal, self._on_requests = journal, on_requests
        self._of_model = f"{model_digest(checkpoint)} transformers {model.dtype}"

    def settings(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {"context": self.max_length, "engine": "transformers", "dtype": str(self.model.dtype)}

    def _loglikelihood_tokens(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        keys = [self._key("score", ids) for _, *ids in requests]

        def ask(some: Sequence[Any]) -> list[Any]:
            found: list[Any] = super(TransformersLM, self)._loglikelihood_tokens(some, disable_tqdm=True)
            return found

        return [(nats, bool(best)) for nats, best in self._answers("score", requests, keys, ask)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each text; see the harness."""
        keys = [self._key("write", [*request.args, i]) for i, request in enumerate(requests)]

        def ask(some: Sequence[Any]) -> list[Any]:
            whole = [request if request.args[0] else self._beginning(request) for request in some]
            found: list[Any] = super(TransformersLM, self).generate_until(whole, disable_tqdm=True)
            return found

        return self._answers("write", requests, keys, ask)

    def _beginning(self, request: Any) -> Any:
        """A request for the beginning of a text, which needs a token before it."""
        begun = copy(request)
        begun.arguments = (self.tokenizer.decode([self.prefix_token_id]), *request.args[1:])
        return begun

    def _key(self, kind: str, asked: Any) -> str:
        return hashlib.sha256(f"{self._of_model} {kind} {json.dumps(asked, sort_keys=True)}".encode()).hexdigest()

    def _answers(
        self, kind: str, requests: Sequence[Any], keys: Sequence[str], ask: Callable[[Sequence[Any]], list[Any]]
    ) -> list[Any]:
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._journal}
        self._on_requests(kind, 0, len(missing))
        for start in range(0, len(missing), _TOGETHER):
            some = list(missing.items())[start : start + _TOGETHER]
            for (key, _), answer in zip(some, ask([request for _, request in some]), strict=True):
                self._journal[key] = answer
            self._on_requests(kind, len(some), len(missing))
        return [self._journal[key] for key in keys]
