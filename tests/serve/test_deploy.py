"""The files in deploy/ and the page about clients are in step with the server."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml

from btlm.serve.guard import OPEN_PATHS
from tests.test_docs import known_options

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = "/opt/btlm/bin"
PORT = "8000"
CLIENTS = (ROOT / "docs/serve-clients.md").read_text()


class Unit(configparser.RawConfigParser):
    """A file of systemd, in which a key may stand several times."""

    def __init__(self, name):
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # type: ignore[assignment]
        self.lines = (DEPLOY / name).read_text().splitlines()
        self.read_string("\n".join(self.lines))

    def words(self, key):
        return shlex.split(" ".join(line.partition("=")[2] for line in self.lines if line.startswith(f"{key}=")))


def instructions():
    """Name and text of each instruction of the Containerfile."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE)
    return [tuple(line.split(maxsplit=1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def of_image(name):
    """The last instruction of a name."""
    return [text for found, text in instructions() if found == name][-1]


def option(words, name):
    return words[words.index(name) + 1]


def health_check():
    return json.loads(of_image("HEALTHCHECK").partition("CMD")[2])


def python_of(words):
    """The program in a command of the form `python -c PROGRAM`."""
    return words[words.index("-c") + 1]


def asked_path(program):
    (path,) = re.findall(r"'GET', '(.*?)'", program)
    return path


def status_of(program, url):
    """Exit status of a program that asks port 8000, with the port of a server instead."""
    assert program.count(PORT) == 1
    given = {"http_proxy": "http://127.0.0.1:9"}  # which it must not ask
    program = program.replace(PORT, url.rpartition(":")[2])
    return subprocess.run([sys.executable, "-c", program], env=given, stderr=subprocess.DEVNULL).returncode


# What both use


def test_options_of_the_commands_exist():
    command = json.loads(of_image("ENTRYPOINT")) + json.loads(of_image("CMD"))
    assert command[:2] == ["btlm", "serve"]
    unit = Unit("btlm-serve.service").words("ExecStart")
    assert unit[:2] == [f"{BIN}/btlm", "serve"]
    known = known_options("btlm serve")
    assert known
    for words in (command, unit):
        assert {word for word in words if word.startswith("--")} <= known
        assert option(words, "--port") == PORT
        assert "--api-key-file" in words


def test_requirements_are_those_of_the_server_without_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *project["optional-dependencies"]["serve"]}
    without = {one for one in needed if not re.match("(torch|transformers)>", one)}
    lines = (DEPLOY / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == sorted(without)


def test_the_server_imports_neither_torch_nor_transformers():
    program = """
import sys
from btlm.checkpoint import BUNDLED_MODEL, Checkpoint
from btlm.serve.app import make_app
from btlm.serve.command import open_service
from btlm.serve.options import Serve
make_app(open_service(Checkpoint.open(BUNDLED_MODEL), Serve(threads=1, context=64)))
sys.exit(bool({"torch", "transformers"} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# The image


def test_the_image_listens_where_it_says():
    assert of_image("EXPOSE") == PORT
    assert option(json.loads(of_image("ENTRYPOINT")), "--host") == "0.0.0.0"
    assert of_image("STOPSIGNAL") == "SIGTERM"
    assert of_image("USER").split(":")[0].isdecimal()  # a number, which orchestrators can see is not 0
    assert int(of_image("USER").split(":")[0]) > 0


def test_the_build_copies_what_exists_and_is_not_ignored():
    ignore = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    copied = [
        word for name, text in instructions() if name == "COPY" and "--from" not in text for word in text.split()[:-1]
    ]
    assert "src" in copied
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignore
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= set(copied)
    assert {Path(path).parts[0] for path in project["tool"]["scikit-build"]["wheel"]["packages"].values()} <= set(
        copied
    )


def test_the_health_check_of_the_image(server):
    program = python_of(health_check())
    assert asked_path(program) in OPEN_PATHS
    assert status_of(program, server.url) == 0
    server.service.draining = True
    try:
        assert status_of(program, server.url) != 0
    finally:
        server.service.draining = False
    assert status_of(program, "http://127.0.0.1:1") != 0


# The units


def test_the_service_has_time_to_finish_requests():
    unit = Unit("btlm-serve.service")
    assert float(unit["Service"]["TimeoutStopSec"]) > float(option(unit.words("ExecStart"), "--drain"))
    assert unit["Service"]["KillSignal"] == "SIGTERM"
    assert unit["Service"]["LoadCredential"].partition(":")[0] in option(unit.words("ExecStart"), "--api-key-file")


def test_the_service_is_restarted_only_if_its_engine_has_stopped(server, monkeypatch):
    unit = Unit("btlm-serve-health.service")
    assert unit.words("ExecStart")[1:] == ["try-restart", "btlm-serve.service"]
    program = python_of(unit.words("ExecCondition"))
    assert asked_path(program) in OPEN_PATHS
    assert 1 <= status_of(program, server.url) <= 254  # the range in which systemd skips the rest
    monkeypatch.setattr(type(server.service.worker), "alive", False)
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert status_of(program, server.url) == 0
    assert 1 <= status_of(program, "http://127.0.0.1:1") <= 254


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_understands_the_units(tmp_path):
    for source in DEPLOY.glob("btlm-serve*.*"):
        text = source.read_text().replace(BIN, str(Path(sys.executable).parent))
        (tmp_path / source.name).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    assert len(units) == 3
    found = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert str(tmp_path) not in found.stderr
    assert "btlm-serve" not in found.stderr


# Prometheus


def test_alerts_name_metrics_that_exist(server):
    rules = yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())["groups"][0]["rules"]
    used = {name for rule in rules for name in re.findall(r"\bbtlm_\w+", rule["expr"])}
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "n": 0})  # a refusal
    known = set(re.findall(r"^(\w+)", httpx.get(f"{server.url}/metrics").text, re.MULTILINE))
    assert used
    assert used <= known


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_prometheus_understands_its_files(tmp_path):
    for source in DEPLOY.glob("prometheus*.yml"):
        shutil.copy(source, tmp_path)
    (tmp_path / "btlm-key").write_text("key")
    subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], check=True, capture_output=True)


# Clients


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", CLIENTS, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("program", blocks("python"), ids=lambda program: program.split()[1])
def test_programs_of_the_page_run(server, program, capsys):
    pytest.importorskip(program.split()[1].split(".")[0])
    exec(program.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out


def test_requests_of_the_page_are_answered(server):
    found = re.findall(r"http://127\.0\.0\.1:8000(/\S+) .*?-d '(.*?)'\n", "\n".join(blocks("bash")), re.DOTALL)
    assert found
    for path, body in found:
        answer = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=60)
        assert answer.status_code == 200, answer.text
