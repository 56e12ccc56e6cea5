"""Errors of the server, and how OpenAI's API tells them."""

from typing import Any


class ApiError(Exception):
    """What a client gets instead of an answer.

    Args:
        status: HTTP status.
        message: What cannot be done, and the remedy.
        param: Field of the request that it is about.
        code: A word for programs, as OpenAI's API has them.
        reason: Label of the refusals in the metrics.
        retry_after: Seconds after which a client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        reason: str = "invalid",
        retry_after: int | None = None,
    ) -> None:
        message = message.encode(errors="backslashreplace").decode()  # it may quote what is no Unicode
        super().__init__(message)
        self.status, self.message, self.code, self.reason = status, message, code, reason
        self.param = None if param is None else param.encode(errors="backslashreplace").decode()
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer, and the last event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def type(self) -> str:
        """The kind of error, as OpenAI's API names it."""
        named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return named.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str | None, message: str) -> ApiError:
    """The error of a value that cannot be used."""
    return ApiError(400, message, param=param)


def too_long(message: str) -> ApiError:
    """The error of a request that exceeds the context."""
    return ApiError(
        400,
        f"{message} Shorten the prompt or write less.",
        param="prompt",
        code="context_length_exceeded",
        reason="too long",
    )


class TooManyTexts(ApiError):
    """More texts would wait than may."""

    def __init__(self, texts: int, running: int, waiting: int, max_waiting: int) -> None:
        super().__init__(
            429,
            f"The server is busy: {running} texts are being written and {waiting} of at most {max_waiting} are "
            f"waiting, which leaves no place for {texts} more; try again later.",
            code="rate_limit_exceeded",
            reason="queue",
            retry_after=1,
        )


class Stopping(ApiError, ValueError):
    """The server is being stopped."""

    def __init__(self) -> None:
        super().__init__(
            503,
            "The server is being stopped; ask another one, or this one later.",
            code="stopping",
            reason="stopping",
            retry_after=5,
        )


class EngineDead(ApiError, ValueError):
    """The engine has stopped, so that no text can be written."""

    def __init__(self, error: BaseException | None) -> None:
        why = f" ({type(error).__name__})" if error is not None else ""
        super().__init__(
            503,
            f"The engine has stopped{why}; the server has to be started again.",
            code="engine_stopped",
            reason="dead",
        )
