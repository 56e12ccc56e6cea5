"""`btlm serve`: opens the model, and answers until it is told to stop."""

import asyncio
import faulthandler
import hashlib
import logging
import signal
import sys
import time
from pathlib import Path

import uvicorn

from btlm import __version__
from btlm.checkpoint.adapter import open_checkpoint
from btlm.checkpoint.open import Checkpoint
from btlm.console import gigabytes, note, plural, warn
from btlm.engine.cache import cache_bytes
from btlm.engine.engine import Engine
from btlm.engine.supported import interpolation
from btlm.errors import OptionError

from .app import make_app
from .guard import read_keys
from .metrics import Metrics
from .options import Serve
from .service import Service
from .vocabulary import Vocabulary
from .weights import Weights
from .worker import Worker

_BACKLOG = 2048  # connections that the system accepts before the server does


def run_serve(model: Checkpoint | Path | str, settings: Serve, base: Path | str | None = None) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Args:
        model: An open checkpoint, its folder, its id on the Hugging Face Hub, or a folder of adapters.
        settings: Options.
        base: See :func:`btlm.checkpoint.adapter.open_checkpoint`.

    Raises:
        NotSupported: The engine cannot run the model.
        OptionError: A key cannot be used, or the address cannot be listened on.
        ValueError: The checkpoint cannot be used, or does not fit the memory.
    """
    faulthandler.enable()  # a file of weights that is cut off ends the process; this tells where
    keys = read_keys(settings)
    checkpoint = open_checkpoint(model, base)
    service = open_service(checkpoint, settings)
    asyncio.run(_serve(service, keys))


def open_service(checkpoint: Checkpoint, settings: Serve) -> Service:
    """Open the engine, and tell what it takes.

    Raises:
        DoesNotFit, NotSupported, ValueError: See :meth:`btlm.engine.Engine.open`.
    """
    draft = None if settings.draft is None else Checkpoint.open(settings.draft)
    engine = Engine.open(
        checkpoint,
        cache_dtype=settings.cache_dtype,
        context=settings.context,
        num_requests=settings.max_requests,
        cache_tokens="fit" if settings.cache_tokens is None else settings.cache_tokens,
        patience=settings.patience,
        draft=draft,
        kernels=settings.kernels,
        threads=settings.threads,
    )
    architecture, cache, kernels = engine.architecture, engine.cache, engine.network.kernels
    note(
        f"{checkpoint.title}, {architecture.num_parameters():,} parameters, {engine.network.weight_dtype} on cpu "
        f"({kernels.name}, {plural(kernels.threads, 'thread')}); {plural(settings.max_requests, 'text')} at a time of "
        f"{engine.context:,} tokens at most, {cache.num_tokens:,} together "
        f"({gigabytes(cache_bytes(architecture, cache.dtype, cache.num_tokens))} in {cache.dtype})"
    )
    trained = architecture.n_positions * interpolation(architecture)
    if engine.context > trained:
        warn(f"the model is made for {trained:,.0f} tokens; texts longer than that may get worse")
    weights = Weights([*checkpoint.weight_files, *(draft.weight_files if draft is not None else ())])
    metrics = Metrics()
    worker = Worker(
        engine,
        max_waiting=settings.max_waiting,
        unchanged=weights.check,
        on_step=metrics.stepped,
        on_end=metrics.ended,
    )
    metrics.watch(worker)
    about = [__version__, kernels.name, cache.dtype, engine.context, weights.marks, checkpoint.folder.name]
    return Service(
        settings,
        worker,
        Vocabulary(checkpoint.tokenizer, architecture.vocab_size),
        metrics,
        settings.served_name or checkpoint.title,
        f"btlm-{hashlib.sha256(repr(about).encode()).hexdigest()[:12]}",
    )


async def _serve(service: Service, keys: tuple[str, ...]) -> None:
    settings = service.settings
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("btlm.serve")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    config = uvicorn.Config(
        make_app(service, keys),
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_level="warning",
        backlog=_BACKLOG,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,  # after the time that running requests were given
        timeout_keep_alive=30,
    )
    server = uvicorn.Server(config)
    try:
        socket = config.bind_socket()
    except SystemExit:  # uvicorn ends the process itself
        raise OptionError(
            "{host} {} and {port} {} cannot be listened on; choose others.", settings.host, settings.port
        ) from None
    host, port = socket.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    serving = asyncio.create_task(server.serve(sockets=[socket]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    loop, draining = asyncio.get_running_loop(), []
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, lambda: draining.append(loop.create_task(_drain(service, server))))
    if not serving.done():
        note(f"serving at http://{shown}:{port} (the page there is a playground; the API is under /v1)")
    await serving
    for task in draining:
        task.cancel()


async def _drain(service: Service, server: uvicorn.Server) -> None:
    """Let running requests finish, refuse new ones, and stop the server; at once when it is asked a second time."""
    if service.draining:
        server.should_exit = True
        return
    service.draining = True
    worker, left = service.worker, service.settings.drain
    note(
        f"stopping: {plural(worker.num_running, 'running text')} and {worker.num_waiting} waiting have {left:g} seconds"
    )
    end = time.monotonic() + left
    while (worker.num_running or worker.num_waiting) and worker.alive and time.monotonic() < end:
        await asyncio.sleep(0.05)
    if worker.num_running or worker.num_waiting:
        warn(f"{plural(worker.num_running + worker.num_waiting, 'text')} did not finish in time")
        await worker.stop()  # which tells their clients
    await asyncio.sleep(0.1)  # the last answers are on their way
    server.should_exit = True
