"""`distrifusion serve` as a person starts and stops it."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
from shell import run, start

import distrifusion.loading
from runtime.faulty import gone_within


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--port", "99999"), "--port 99999 is not in 0 to 65535"),
        (("--max-queue", "-1"), "--max-queue -1 must be at least 0"),
        (("--request-timeout", "0"), "--request-timeout 0 must be above 0"),
        (("--grace", "inf"), "--grace inf must be at least 0 and finite"),
        (("--max-pixels", "0"), "--max-pixels 0 must be at least 1"),
        (("--api-key", "two words"), "no spaces"),
        (("--size", "abc"), "size 'abc' is not of the form WIDTHxHEIGHT"),
        (("--size", "70x64"), "width=70 must be a multiple of 8"),
        (("--size", "4096x4096"), "raise it, or use a smaller size"),
        (("--steps", "0"), "num_inference_steps=0 must be"),
        (("--scheduler", "dim"), "scheduler 'dim' is unknown"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--fidelity", "close"), "--plan auto"),
        (("--plan", "patch3", "--devices", "2"), "patch3"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.setattr("distrifusion.runtime.source.Source.open", _unexpected)
    done = run("serve", folder, "--port", "0", *words)
    assert done.exit_code == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distrifusion.loading, "load", _unexpected)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", folder, "--port", port)
    assert done.exit_code == 2 and f"cannot listen at 127.0.0.1, port {port}" in done.stderr
    assert "choose another --port" in done.stderr


def test_without_its_packages_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "distrifusion.serve", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    done = run("serve", folder)
    assert done.exit_code == 2
    assert done.stderr == "distrifusion: serving takes fastapi, not installed here; pip install 'distrifusion[serve]'\n"


@pytest.mark.supports("server", "Ctrl-C and SIGTERM end the server and its ranks")
def test_a_signal_ends_everything(folder: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    draws = ("--devices=2", "--plan=patch2", "--size=256x256", "--steps=900")
    process = start("serve", folder, *draws, "--port=0", "--grace=0", "--api-key=secret", said=said)
    try:
        port = int(_found(r"at http://127\.0\.0\.1:(\d+); its routes: /docs", said, process))
        server = HTTPConnection("127.0.0.1", port, timeout=120)
        _until(lambda: _ask(server, "GET", "/ready")[0] == 200)
        assert _ask(server, "GET", "/v1/models")[0] == 401
        body = json.dumps({"prompt": "a", "stream": True})
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        server.request("POST", "/v1/images/generations", body, headers)
        events = server.getresponse()
        assert events.status == 200, events.read()
        while re.search(rb'"step": [1-9]', line := events.readline()) is None:
            assert line, said.read_text()
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 3  # two ranks, and what starts them
        process.send_signal(signal.SIGTERM)
        assert b'"code": "shutting_down"' in events.read()
        assert process.wait(60) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()
    assert gone_within([rank.pid for rank in ranks], 20)
    assert "Traceback" not in said.read_text()


def _unexpected(*_: Any, **__: Any) -> None:
    raise AssertionError("it should have been refused before")


def _until(holds: Any) -> None:
    end = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _found(pattern: str, said: Path, process: Any) -> str:
    def found() -> re.Match[str] | None:
        assert process.poll() is None, said.read_text()
        return re.search(pattern, said.read_text())

    _until(found)
    match = found()
    assert match is not None
    return match[1]


def _ask(server: HTTPConnection, method: str, path: str) -> tuple[int, bytes]:
    try:
        server.request(method, path)
        answer = server.getresponse()
        return answer.status, answer.read()
    except ConnectionRefusedError:
        server.close()
        return 0, b""
