"""What Prometheus reads."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.checkpoint.tiny import save_tiny
from tests.serve.conftest import running, wait


def metrics(server):
    text = httpx.get(f"{server.url}/metrics").text
    families = text_string_to_metric_families(text)
    return {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}


def complete(server, **given):
    body = {"prompt": "abcabcabc", "max_tokens": 12, "temperature": 0, "ignore_eos": True, **given}
    return httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("draft"), n_layer=1)


def test_a_draft_changes_no_text_and_is_counted(checkpoint, draft):
    rules = [{}, {"temperature": 0.7, "seed": 3}, {"frequency_penalty": 1.0}]
    with running(checkpoint) as plain:
        expected = [complete(plain, **rule) for rule in rules]
        assert metrics(plain)["btlm_guessed_tokens_total", "draft"] == 0
    with running(checkpoint, draft=str(draft)) as one:
        assert [complete(one, **rule) for rule in rules] == expected
        found = metrics(one)
    assert found["btlm_guessed_tokens_total", "draft"] > 0
    assert found["btlm_accepted_tokens_total", "draft"] <= found["btlm_guessed_tokens_total", "draft"]


def test_everything_is_counted(checkpoint, monkeypatch):
    with running(checkpoint, max_requests=2) as one:
        complete(one)
        complete(one)  # whose prompt is in the cache
        assert httpx.post(f"{one.url}/v1/completions", json={"stop": ""}).status_code == 400
        text = complete(one)
        step = one.engine.step

        def slow():  # so that the text is stopped before it ends by itself
            if any(request.new_tokens == 11 for request in one.engine._scheduler._slots):
                wait(lambda: not one.service.worker._commands.empty())
                return []
            return step()

        monkeypatch.setattr(one.engine, "step", slow)
        complete(one, stop=text[3:5])
        wait(lambda: one.service.worker.num_running == 0)
        found = metrics(one)
    assert found["btlm_prompt_tokens_total",] == 4 * 9
    assert found["btlm_reused_prompt_tokens_total",] > 0
    assert found["btlm_texts_total", "length"] == 3
    assert found["btlm_texts_total", "stop text"] == 1
    assert found["btlm_http_requests_total", "/v1/completions", "200"] == 4
    assert found["btlm_http_requests_total", "/v1/completions", "400"] == 1
    assert found["btlm_refusals_total", "invalid"] == 1
    assert found["btlm_first_token_seconds_count",] == found["btlm_queue_seconds_count",] == 4
    assert found["btlm_texts_running",] == found["btlm_texts_waiting",] == 0
    assert 0 < found["btlm_cache_pages_used",] <= found["btlm_cache_pages",]
    assert found["btlm_engine_alive",] == 1


def test_paths_that_clients_invent_are_one_series(server):
    for i in range(3):
        httpx.get(f"{server.url}/x{i}")
    paths = {rest for name, *rest in map(tuple, metrics(server)) for rest in rest if name == "btlm_http_requests_total"}
    assert not any(path.startswith("/x") for path in paths)
    assert "other" in paths
