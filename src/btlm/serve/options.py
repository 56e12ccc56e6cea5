"""Options of `btlm serve`."""

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

from btlm.engine.options import Positive, Threads
from btlm.errors import OptionError
from btlm.settings import Count, Number, Range, Whole, check


@dataclass(frozen=True, kw_only=True)
class Serve:
    """The address, the memory, and what clients may ask.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one, which is reported.
        served_name: Name of the model in the API (default: that of its folder or id).
        context: Most tokens of a request, prompt and continuation (default: the length that the model is made for).
        max_requests: Number of texts that are written at the same time; others wait.
        cache_tokens: Tokens of keys and values of all requests together (default: what half of the free memory holds,
            at most what all requests can use).
        cache_dtype: Dtype of keys and values: int4, int8, bfloat16, float32, or auto: int8 for quantized models, else
            the dtype of the weights.
        draft: Small checkpoint with the same vocabulary, folder or id, whose guesses the model checks several at a
            time: the same text, faster where they are right.
        patience: How many times longer than usual a step may take while prompts of others are read.
        threads: Number of threads (default: one per core).
        kernels: Kernels to use: native, torch, an instruction set, or auto, which is the fastest here.
        api_key: Keys, of which a client has to give one; other users of the machine can see them in the list of
            processes, but not those of a file.
        api_key_file: File with one key per line.
        public: Listen on an address that others reach, though no key is set.
        max_waiting: Number of texts that may wait; further requests are refused (429).
        max_per_key: Number of requests that a key may have under way; further ones are refused (429).
        max_body: Largest body of a request, in bytes.
        timeout: Longest time of a request, in seconds, with the time that it waits.
        drain: Time in seconds that running requests get to finish when the server is told to stop.
        cors_origins: Origins of web pages on other servers that may use this one, such as https://example.org.
        log_prompts: Write prompts, and the texts of whole answers, to the log, too.
    """

    host: Annotated[str, "ADDRESS"] = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000
    served_name: Annotated[str, "NAME"] | None = None
    context: Count | None = None
    max_requests: Count = 16
    cache_tokens: Count | None = None
    cache_dtype: Annotated[str, "DTYPE"] = "auto"
    draft: Annotated[str, "MODEL"] | None = None
    patience: Annotated[float, Range(above=1)] = 2.5
    threads: Threads | None = None
    kernels: Annotated[str, "NAME"] = "auto"
    api_key: tuple[Annotated[str, "KEY"], ...] = ()
    api_key_file: Annotated[str, "FILE"] | None = None
    public: bool = False
    max_waiting: Whole = 256
    max_per_key: Count = 64
    max_body: Count = 4_194_304
    timeout: Positive = 600.0
    drain: Number = 30.0
    cors_origins: tuple[Annotated[str, "ORIGIN"], ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        check(self)
        if not (self.public or self.api_key or self.api_key_file or self.is_local):
            raise OptionError(
                "{host} {} can be reached by others, and no key is set: add {api_key_file}, or {public} if everybody "
                "may use the model.",
                self.host,
            )
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise OptionError(
                    "{cors_origins} has {!r}, which is not of the form https://example.org; give the scheme, too.",
                    origin,
                )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
