"""The HTTP API."""

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from btlm import __version__
from btlm.settings import did_you_mean

from . import chat, completions, schema
from .errors import ApiError, EngineDead, Stopping, invalid
from .guard import Guard
from .run import Run
from .service import Service
from .stream import EventStream

NOTE = "This is a base model: it continues texts, and was not trained to answer or to follow instructions."
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": text}
    for status, text in {
        400: "A value cannot be used.",
        401: "The key is missing or wrong.",
        403: "The header Host does not name this server.",
        404: "There is no such model.",
        408: "The body did not arrive.",
        413: "The body is too large.",
        415: "The body is no JSON.",
        429: "Too many requests are running.",
        500: "The server has failed.",
        503: "The server is being stopped, or its engine has stopped.",
        504: "The request takes too long.",
    }.items()
}


def make_app(service: Service, keys: Sequence[str] = ()) -> ASGIApp:
    """The application, whose engine runs while it does.

    Args:
        service: The model.
        keys: Keys of which a request has to bring one.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        yield
        await service.worker.stop()
        service.compiler.shutdown(wait=False)

    app = FastAPI(
        title="BTLM",
        version=__version__,
        summary="Continues texts. The API is OpenAI's, as far as it makes sense for a base model.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from the network
        redoc_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    _handle_errors(app, service)
    _add_texts(app, service)
    _add_state(app, service)
    guarded: ASGIApp = Guard(app, service, keys)
    if origins := service.settings.cors_origins:
        guarded = CORSMiddleware(guarded, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    return guarded


def _add_texts(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_answers(schema.CompletionAnswer, stream=True))
    async def complete(asked: schema.CompletionRequest, request: Request) -> Response:
        """Continue texts, tell how probable they are, or both."""
        run = await completions.begin_completion(service, asked)
        return await _answer(request, asked, run, completions.completion, completions.completion_events)

    @app.post("/v1/chat/completions", responses=_answers(schema.ChatAnswer, stream=True))
    async def talk(asked: schema.ChatRequest, request: Request) -> Response:
        """Continue a conversation, which is written as a text; this is a base model."""
        run = await chat.begin_chat(service, asked)
        return await _answer(request, asked, run, chat.chat_completion, chat.chat_events)

    @app.post("/tokenize", responses=_answers(schema.TokenizeAnswer))
    async def tokenize(asked: schema.TokenizeRequest) -> Response:
        """Tell the token ids of a text."""
        service.check_model(asked.model)
        (ids,) = await service.encode([asked.prompt], add_special_tokens=asked.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.context})

    @app.post("/detokenize", responses=_answers(schema.DetokenizeAnswer))
    async def detokenize(asked: schema.DetokenizeRequest) -> Response:
        """Tell the text of token ids."""
        service.check_model(asked.model)
        if asked.tokens and (largest := max(asked.tokens)) >= service.vocabulary.size:
            raise invalid("tokens", f"Token {largest} is not in the vocabulary of {service.vocabulary.size:,}.")
        return JSONResponse({"prompt": await asyncio.to_thread(service.vocabulary.text, asked.tokens)})


def _answers(answer: type, *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """What an endpoint may answer, for the description of the API."""
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    events = {"content": {"text/event-stream": {"schema": event}}} if stream else {}
    return {200: {"model": answer, **events}, **_PROBLEMS}


async def _answer(
    request: Request,
    asked: schema.Sampling,
    run: Run,
    whole: Callable[[Run], Awaitable[dict[str, Any]]],
    events: Callable[..., AsyncIterator[dict[str, Any]]],
) -> Response:
    """Answer with a stream of events if that was asked for, else as a whole."""
    log = request.state.log
    if run.service.settings.log_prompts:
        log["prompts"] = [run.service.vocabulary.text(ids) for ids in run.job.prompts]
    log["stream"] = bool(asked.stream)
    request.state.run = run
    if asked.stream:
        told = asked.stream_options or schema.StreamOptions()
        return EventStream(run, events(run, usage=told.include_usage, usages=told.continuous_usage_stats))
    try:
        async with run.watched(request.receive):
            answer = await whole(run)
    except ApiError:
        if run.gone:
            return Response(status_code=499)  # nobody reads it
        raise
    if run.service.settings.log_prompts:
        log["texts"] = [choice.get("text", choice.get("message")) for choice in answer["choices"]]
    return JSONResponse(answer)


def page_policy(page: str) -> str:
    """A policy for browsers that allows a page its own scripts and styles, this server, and nothing else."""
    allowed = {}
    for tag in ("script", "style"):
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [b64encode(sha256(part.encode()).digest()).decode() for part in parts]
        allowed[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _add_state(app: FastAPI, service: Service) -> None:
    page = files("btlm.serve").joinpath("playground.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": page_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get("/v1/models", responses=_answers(schema.Models))
    async def models() -> dict[str, Any]:
        """Name the model."""
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", responses=_PROBLEMS)
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        service.check_model(name)
        return _model(service)

    @app.get("/tokenizer_info", responses=_PROBLEMS)
    async def tokenizer_info() -> dict[str, Any]:
        """Tell the special tokens, which lm-evaluation-harness asks for."""
        ends = [service.vocabulary.name(token) for token in sorted(service.worker.engine.end_ids)]
        end = ends[0] if ends else None
        return {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "pad_token": end}

    @app.get("/health", responses=_PROBLEMS)
    async def health() -> dict[str, str]:
        """Tell whether the server can ever answer again; start it anew if not."""
        if not service.worker.alive:
            raise EngineDead(service.worker.error)
        return {"status": "ok"}

    @app.get("/ready", responses=_PROBLEMS)
    async def ready() -> dict[str, str]:
        """Tell whether the server takes requests now."""
        if service.draining:
            raise Stopping()
        return await health()

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=_METRICS_TYPE)

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers=headers)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "btlm",
        "max_model_len": service.context,
        "warning": NOTE,
    }


def _handle_errors(app: FastAPI, service: Service) -> None:
    def answer(error: ApiError) -> JSONResponse:
        service.metrics.refusals.labels(error.reason).inc()
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(_validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        found = {
            404: f"There is nothing at {request.url.path[:200]}; see /openapi.json.",
            405: f"{request.method} is not possible here; see /openapi.json.",
        }
        problem = ApiError(error.status_code, found.get(error.status_code, str(error.detail)), reason="http")
        response = answer(problem)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:  # the log has the traceback
        return answer(ApiError(500, "The server has failed; its log says why.", code="internal_error", reason="bug"))


def _validation_error(problems: Sequence[Any]) -> ApiError:
    """The error of a request that does not fit the schema, about its first problem."""
    field = next((part for part in problems[0]["loc"][1:2] if isinstance(part, str)), None)
    # Where a value may be of several types, each was tried; the one that got furthest was meant.
    tried = [one for one in problems if one["loc"][:2] == problems[0]["loc"][:2]]
    problem = max(tried, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    kind = problem["type"]
    if kind == "json_invalid":
        return invalid(None, f"The body is not JSON: {problem.get('ctx', {}).get('error', 'it cannot be read')}.")
    # Names of types are among the parts of the place; those of fields are known.
    place = [str(part) for part in problem["loc"][1:] if isinstance(part, int) or part in _FIELDS]
    if kind == "extra_forbidden":
        last = str(problem["loc"][-1])[:100]
        near = did_you_mean(last, _FIELDS) or "."
        return invalid(last, f"{'.'.join([*place, last])} is not known here; leave it out{near}")
    if kind == "missing":
        return invalid(field, f"The request lacks {place[-1] if place else 'a body'}.")
    shown = _shown(problem.get("input"))
    name = ".".join(place) or "The body"
    if kind.endswith("_type") and str(problem["loc"][-1]) not in place and len(tried) > 1:
        return invalid(field, f"{name} is {shown}, which is of none of the types that it may have; see /openapi.json.")
    message = problem["msg"].removeprefix("Value error, ")
    return invalid(field, f"{name} is {shown}: {message[:1].lower()}{message[1:]}.")


def _shown(value: Any) -> str:
    """A value in a message, which may be megabytes long."""
    if isinstance(value, (list, dict)) and value:
        return f"a list of {len(value):,}" if isinstance(value, list) else f"an object of {len(value):,}"
    if isinstance(value, str) and len(value) > 100:
        return f"{json.dumps(value[:100])}..."
    return json.dumps(value, default=str)


_FIELDS = {
    field.alias or name
    for model in vars(schema).values()
    if isinstance(model, type) and issubclass(model, BaseModel)
    for name, field in model.model_fields.items()
}
