import asyncio
import threading
import time
from contextlib import contextmanager

import openai
import pytest
import uvicorn

from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.serve.app import make_app
from btlm.serve.command import open_service
from btlm.serve.options import Serve
from tests.checkpoint.fixtures import checkpoint, copy, torch_state

__all__ = ["checkpoint", "copy", "torch_state"]


def wait(condition, seconds=60):
    """Wait until something is so; a test fails where it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Running:
    """A server in a thread of this process."""

    def __init__(self, service, url, key):
        self.service, self.url = service, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def engine(self):
        return self.service.worker.engine


@contextmanager
def running(model=BUNDLED_MODEL, keys=(), **settings):
    service = open_service(Checkpoint.open(model), Serve(threads=1, **settings))
    config = uvicorn.Config(make_app(service, keys), port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(service, f"http://127.0.0.1:{port}", keys[0] if keys else "none")
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def server():
    """The bundled model; tests must leave it idle."""
    with running(context=256, max_requests=4) as one:
        yield one
        assert one.service.worker.num_running == one.service.worker.num_waiting == 0


@pytest.fixture
def client(server):
    return server.client
