"""Ctrl-C: the first ends the call after its step, the second ends everything at once."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from shell import start

from distrifusion.cli.spoken import cancelled_by_ctrl_c


class Cancellable:
    """Counts how often it was cancelled."""

    cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


def test_the_first_cancels_and_the_second_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    pipe: Any = Cancellable()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), cancelled_by_ctrl_c(pipe):
        signal.raise_signal(signal.SIGINT)
        assert pipe.cancelled == 1
        assert "stopping after this step; Ctrl-C again ends at once" in capsys.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert pipe.cancelled == 1 and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_run_is_cancelled(folder: Path, tmp_path: Path, devices: str) -> None:
    words = ["run", folder, "-p", "a", "-d", devices, "--steps", "900", "--size", "256x256", "-o", tmp_path / "a.png"]
    said = tmp_path / "said"
    process = start(*words, said=said)
    try:
        end = time.monotonic() + 200
        while "2/900" not in said.read_text():
            assert time.monotonic() < end and process.poll() is None, said.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, said.read_text()
    finally:
        process.kill()
        process.wait()
    assert "stopping after this step" in said.read_text() and "Traceback" not in said.read_text()
    assert not (tmp_path / "a.png").exists()
