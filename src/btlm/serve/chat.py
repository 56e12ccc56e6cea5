"""`/v1/chat/completions`: a conversation as a text that goes on. BTLM is no chat model, and the answer says so."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from .errors import invalid
from .run import Job, Piece, Run
from .schema import ChatRequest, Message
from .service import Service, options_of
from .text import Placed
from .vocabulary import Vocabulary

NAMES = {"user": "User", "assistant": "Assistant"}
STOP = "\nUser:"
WARNING = (
    "This is a base model, which was not trained for conversations: the messages are written one below the other, as "
    "'User: ...' and 'Assistant: ...', and the text is continued."
)


def conversation(messages: Sequence[Message]) -> str:
    """The messages as a text that ends where the answer begins.

    Messages of the system stand as they are; the others follow the name of who says them. Between two messages there
    is an empty line.
    """
    parts = [f"{NAMES[one.role]}: {one.text}" if one.role in NAMES else one.text for one in messages]
    return "\n\n".join([*parts, f"{NAMES['assistant']}:"])


async def begin_chat(service: Service, asked: ChatRequest) -> Run:
    """Begin what a request asks for.

    Raises:
        ApiError: It cannot be done, or not now.
    """
    service.check_model(asked.model)
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options", "stream_options only matter to streams; add stream or leave them out.")
    if asked.top_logprobs and not asked.logprobs:
        raise invalid("top_logprobs", "top_logprobs need logprobs; set it to true.")
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens differ; give one of them.")
    prompts = await service.encode([conversation(asked.messages)])
    left = max(1, service.context - len(prompts[0]) + 1)  # the last token is not read again
    job = Job(
        prompts,
        options_of(asked, asked.max_completion_tokens or asked.max_tokens or left, service.vocabulary.size),
        candidates=asked.n or 1,
        keep=asked.n or 1,
        stop=[*asked.stops, STOP],
        stop_ids=frozenset() if asked.ignore_eos else service.worker.engine.end_ids,
        alternatives=(asked.top_logprobs or 0) if asked.logprobs else None,
        mask=await service.mask(asked),
        token_ids=bool(asked.return_token_ids),
    )
    return Run(service, job, "chatcmpl")


async def chat_completion(run: Run) -> dict[str, Any]:
    """The answer as a whole."""
    choices = []
    for piece in await run.whole():
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        choices.append({"index": piece.number, "message": message, **_rest(run, piece)})
    return {**run.head("chat.completion"), "choices": choices, "usage": run.usage(), "warning": WARNING}


async def chat_events(run: Run, *, usage: bool, usages: bool) -> AsyncIterator[dict[str, Any]]:
    """The answer in chunks; arguments as of :func:`btlm.serve.completions.completion_events`."""
    head = run.head("chat.completion.chunk")
    async for piece in run.pieces():
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        if piece.first:
            delta = {"role": "assistant", **delta}
        chunk = {**head, "choices": [{"index": piece.number, "delta": delta, **_rest(run, piece)}]}
        if piece.first:
            chunk["warning"] = WARNING
        yield chunk | ({"usage": run.usage() if usages else None} if usage or usages else {})
    if usage:
        yield {**head, "choices": [], "usage": run.usage()}


def chat_logprobs(vocabulary: Vocabulary, tokens: Sequence[Placed], alternatives: int) -> dict[str, Any]:
    """Log-probabilities in the shape of OpenAI's chat API."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": vocabulary.name(token), "logprob": logprob, "bytes": list(vocabulary.bytes[token])}

    content = []
    for placed in tokens:
        others = [entry(*other) for other in placed.token.alternatives[:alternatives]]
        content.append({**entry(placed.token.id, placed.token.logprob), "top_logprobs": others})
    return {"content": content, "refusal": None}


def _rest(run: Run, piece: Piece) -> dict[str, Any]:
    job = run.job
    logprobs = None
    if job.alternatives is not None:
        logprobs = chat_logprobs(run.service.vocabulary, piece.tokens, job.alternatives)
    rest: dict[str, Any] = {"logprobs": logprobs, "finish_reason": piece.finish_reason}
    return rest | ({"token_ids": piece.ids} if job.token_ids else {})
