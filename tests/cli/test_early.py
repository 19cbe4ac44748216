"""The fork server that a command starts before it imports: used where it can be, ended where it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from shell import run

import distrifusion.loading
from distrifusion.cli import early
from distrifusion.cli.drawing import Wish
from distrifusion.runtime import server_process, surroundings
from distrifusion.runtime.server_process import ServerProcess
from runtime.faulty import gone_within, is_alive

CALLER = """
import sys
sys.path.insert(0, sys.argv[1])
from distrifusion.runtime.server_process import ServerProcess
print(ServerProcess.start(1, {}).process.pid, flush=True)
sys.stdin.read()
"""
LEVELS = dict.fromkeys(server_process.VERBOSITY, 40)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[ServerProcess]:
    """The fork servers that the test has started, on a machine of four cores."""
    started: list[ServerProcess] = []
    start_one = ServerProcess.start

    def noted(*args: Any) -> ServerProcess:
        started.append(start_one(*args))
        return started[-1]

    monkeypatch.setattr(ServerProcess, "start", noted)
    monkeypatch.setattr(surroundings, "num_cores", lambda: 4)
    return started


def wish(devices: str | None, plan: str | None) -> Wish:
    return Wish("demo", devices, plan, None, None, "float32", {})


def test_what_starts_it_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers'}"
    script = f"import sys, distrifusion.runtime.server_process, distrifusion.cli; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_run_uses_the_one_that_was_started_before_it_imported(
    folder: Path, tmp_path: Path, servers: list[ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = distrifusion.loading.load

    def load_later(*args: Any, **kwargs: Any) -> Any:
        assert len(servers) == 1
        return load(*args, **kwargs)

    monkeypatch.setattr(distrifusion.loading, "load", load_later)
    out = tmp_path / "a.png"
    done = run("run", folder, "-p", "a", "-d", "2", "--steps", "1", "--size", "64x64", "-o", out)
    assert done.exit_code == 0 and "2 threads" in done.stdout and out.exists(), done.stderr
    assert len(servers) == 1 and not servers[0].is_alive


@pytest.mark.parametrize("command", [["run", "-p", "a"], ["verify", "-p", "a"], ["serve", "--port", "0"]])
def test_it_is_ended_where_the_words_are_wrong(folder: Path, servers: list[ServerProcess], command: list[str]) -> None:
    name, *words = command
    done = run(name, folder, *words, "-d", "2", "--size", "large")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1 and "size 'large'" in done.stderr
    assert [server.process.returncode for server in servers] == [-signal.SIGKILL]


def test_it_is_ended_by_ctrl_c(folder: Path, servers: list[ServerProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["distrifusion.cli.run"]
    monkeypatch.setattr(module, "quiet_libraries", lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs it in the background
    try:
        done = run("run", folder, "-p", "a", "-d", "2")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130 and done.stderr == "distrifusion: interrupted\n"
    assert [server.process.returncode for server in servers] == [-signal.SIGKILL]


def test_it_ends_with_a_caller_that_is_killed_while_it_imports(tmp_path: Path) -> None:
    importing = tmp_path / "importing"
    (tmp_path / "torch.py").write_text(f"import time; open({str(importing)!r}, 'w').close(); time.sleep(1e6)")
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CALLER, tmp_path], **pipes) as caller:
        assert caller.stdout is not None
        server = int(caller.stdout.readline())
        end = time.monotonic() + 100
        while not importing.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert is_alive(server)
        caller.kill()
    gone = gone_within([server], 10)
    with suppress(ProcessLookupError):
        os.kill(server, signal.SIGKILL)
    assert gone


@pytest.mark.parametrize(
    ("devices", "plan", "num_ranks"),
    [
        ("2", None, 2),
        (" cpu, cpu,cpu", None, 3),
        (None, "cfg2.patch2", 4),
        ("cuda", "patch2.displaced.w4", 2),
        ("cuda", None, 1),
        ("1", None, 1),
        ("cpu:0", None, 1),
        ("many", None, 1),
        ("-2", None, 1),
        (None, None, 1),
        ("2", "auto", 1),
        ("2", " Auto ", 1),
        ("2", "nonsense", 1),
    ],
)
def test_the_words_say_how_many_ranks(
    servers: list[ServerProcess], devices: str | None, plan: str | None, num_ranks: int
) -> None:
    with early.early_server(wish(devices, plan)):
        assert [server.threads for server in servers] == ([4 // num_ranks] if num_ranks > 1 else [])
    assert not any(server.is_alive for server in servers)


def test_none_is_started_under_torchrun(servers: list[ServerProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in surroundings.TORCHRUN:
        monkeypatch.setitem(os.environ, name, "0")
    with early.early_server(wish("2", None)):
        assert not servers


def test_none_is_started_on_one_core(servers: list[ServerProcess], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "num_cores", lambda: 1)
    with early.early_server(wish("2", None)):
        assert not servers


def test_only_one_that_lives_and_has_the_same_threads_is_taken(servers: list[ServerProcess]) -> None:
    with server_process.started_early(2, LEVELS):
        assert server_process.started(3, LEVELS) is servers[1]
        assert server_process.started(2, LEVELS) is servers[0]
        assert server_process.started(2, LEVELS) is servers[2]
    assert all(server.is_alive for server in servers)
    with server_process.started_early(2, LEVELS):
        servers[3].process.kill()
        servers[3].process.wait()
        assert server_process.started(2, LEVELS) is servers[4]
    for server in servers:
        server.end_now()
