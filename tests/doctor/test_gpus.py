"""GPUs are asked for in a process of their own, with a limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distrifusion.doctor import gpus
from distrifusion.doctor.gpus import Gpu, NoAnswer

GPU = {"index": 0, "name": "a GPU", "memory": 8, "free_memory": 7, "capability": "9.0", "peers": [1]}


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands in for the interpreter that asks torch; the test writes what it does."""
    monkeypatch.setattr(gpus.torch.version, "cuda", "13.0")
    file = tmp_path / "python"
    monkeypatch.setattr(gpus.sys, "executable", str(file))
    return file


def write(file: Path, line: str) -> None:
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


def test_the_answer_is_read(python: Path) -> None:
    write(python, f"echo '{json.dumps([GPU])}'")
    assert gpus.gpus() == (Gpu(0, "a GPU", 8, 7, "9.0", (1,)),)


def test_silence_and_failure_are_told(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(python, "echo 'CUDA driver error' >&2; exit 1")
    with pytest.raises(NoAnswer, match="could not say which GPUs there are: CUDA driver error"):
        gpus.gpus()
    monkeypatch.setattr(gpus, "_TORCH_LIMIT", 0.3)
    write(python, "exec sleep 30")
    with pytest.raises(NoAnswer, match="did not say within 0 s"):
        gpus.gpus()


@pytest.mark.skipif(gpus.torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_a_torch_without_cuda_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.sys, "executable", "/nowhere/at/all")
    assert gpus.gpus() == ()


def test_torch_itself_answers(capsys: pytest.CaptureFixture[str]) -> None:
    gpus.main()
    assert len(json.loads(capsys.readouterr().out)) == (
        gpus.torch.cuda.device_count() if gpus.torch.cuda.is_available() else 0
    )
