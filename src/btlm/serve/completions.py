"""`/v1/completions`: texts that go on, in the shape of OpenAI's older API."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from .errors import invalid
from .run import Job, Piece, Run, check_number
from .schema import CompletionRequest
from .service import Service, options_of
from .text import Placed
from .vocabulary import Vocabulary

_KIND = "text_completion"
_USUAL_TOKENS = 16  # of a continuation, as in OpenAI's API


async def begin_completion(service: Service, asked: CompletionRequest) -> Run:
    """Begin what a request asks for.

    Raises:
        ApiError: It cannot be done, or not now.
    """
    service.check_model(asked.model)
    keep = asked.n or 1
    candidates = asked.best_of or keep
    if candidates < keep:
        raise invalid("best_of", f"best_of {candidates} is less than n {keep}; give at least as many.")
    if asked.stream and candidates > keep:
        raise invalid("best_of", "The best candidates are known only at the end; leave best_of or stream out.")
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options", "stream_options only matter to streams; add stream or leave them out.")
    prompts, texts = await _prompts(service, asked)
    max_tokens = _USUAL_TOKENS if asked.max_tokens is None else asked.max_tokens
    job = Job(
        prompts,
        options_of(asked, max_tokens, service.vocabulary.size),
        candidates=candidates,
        keep=keep,
        stop=asked.stops,
        stop_ids=frozenset() if asked.ignore_eos else service.worker.engine.end_ids,
        alternatives=asked.logprobs,
        echo=texts if asked.echo else None,
        mask=await service.mask(asked),
        token_ids=bool(asked.return_token_ids),
    )
    return Run(service, job, "cmpl")


async def completion(run: Run) -> dict[str, Any]:
    """The answer as a whole."""
    job, pieces = run.job, await run.whole()
    choices: list[dict[str, Any]] = []
    for prompt in range(len(job.prompts)):
        for index in run.best(range(prompt * job.candidates, (prompt + 1) * job.candidates)):
            choices.append({**_choice(run, pieces[index]), "index": len(choices)})
    return {**run.head(_KIND), "choices": choices, "usage": run.usage()}


async def completion_events(run: Run, *, usage: bool, usages: bool) -> AsyncIterator[dict[str, Any]]:
    """The answer in chunks.

    Args:
        run: The texts.
        usage: End with a chunk that has the numbers of tokens.
        usages: Tell them in every chunk.
    """
    async for piece in run.pieces():
        chunk = {**run.head(_KIND), "choices": [_choice(run, piece)]}
        yield chunk | ({"usage": run.usage() if usages else None} if usage or usages else {})
    if usage:
        yield {**run.head(_KIND), "choices": [], "usage": run.usage()}


def classic_logprobs(vocabulary: Vocabulary, tokens: Sequence[Placed], alternatives: int) -> dict[str, Any]:
    """Log-probabilities in the shape of OpenAI's older API.

    The alternatives include the token itself, also where it is not one of the most probable. Places are in characters
    from the beginning of the prompt where it is told, else of the continuation.
    """
    best: list[dict[str, float] | None] = []
    for placed in tokens:
        others = {vocabulary.name(token): logprob for token, logprob in placed.token.alternatives}
        others.setdefault(vocabulary.name(placed.token.id), placed.token.logprob)
        best.append(others if placed.scored and alternatives else None)
    return {
        "tokens": [vocabulary.name(placed.token.id) for placed in tokens],
        "token_logprobs": [placed.token.logprob if placed.scored else None for placed in tokens],
        "top_logprobs": best if alternatives else None,
        "text_offset": [placed.start for placed in tokens],
    }


async def _prompts(service: Service, asked: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of the prompts. An empty one is the beginning of a text, which a special token stands for."""
    given = asked.prompt if asked.prompt is not None else ""
    many: list[Any] = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    check_number(service, len(many) * (asked.best_of or asked.n or 1))
    if isinstance(many[0], str):
        prompts, texts = await service.encode(many), list(many)
    else:
        largest = max(map(max, many))
        if largest >= service.vocabulary.size:
            raise invalid("prompt", f"Token {largest} is not in the vocabulary of {service.vocabulary.size:,}.")
        prompts, texts = [list(ids) for ids in many], [service.vocabulary.text(ids) for ids in many]
    beginning = sorted(service.worker.engine.end_ids)[:1]
    if not beginning and not all(prompts):
        raise invalid("prompt", "The prompt is empty, and this model has no token for the beginning of a text.")
    return [ids or beginning for ids in prompts], texts


def _choice(run: Run, piece: Piece) -> dict[str, Any]:
    job, vocabulary = run.job, run.service.vocabulary
    logprobs = None
    if job.alternatives is not None:
        logprobs = classic_logprobs(vocabulary, [*piece.prompt, *piece.tokens], job.alternatives)
    choice: dict[str, Any] = {
        "index": piece.number,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
    }
    if job.token_ids:
        if piece.first:
            choice["prompt_token_ids"] = job.prompts[job.prompt_of(piece.number)]
        choice["token_ids"] = piece.ids
    return choice
