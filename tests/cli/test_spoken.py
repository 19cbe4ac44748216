"""Every error that a person can put right is one line and a status."""

from __future__ import annotations

import warnings

import pytest
import torch
import typer

import distrifusion
from distrifusion import Cancelled, ConfigError, OutOfMemory, PoolTooLarge, RankFailed
from distrifusion.cli.spoken import spoken_errors


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Cancelled("stopped after step 3", step=3), 130, "stopped after step 3"),
        (OutOfMemory("rank 1 had not enough memory", rank=1), 2, "rank 1 had not enough memory"),
        (PoolTooLarge("'patch2' fits", needed=9, free=8, fits="patch2"), 2, "'patch2' fits"),
        (
            torch.OutOfMemoryError("no memory"),
            2,
            "out of memory; use more devices, a smaller --size, or --dtype float16",
        ),
        (RankFailed("rank 1 was ended by SIGKILL", rank=1), 2, "rank 1 was ended by SIGKILL"),
        (ConfigError("no"), 2, "no"),
        (ValueError("diffusers says no"), 2, "diffusers says no"),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "a.png"),
        (ImportError("peft is needed"), 2, "peft is needed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_told(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, says: str) -> None:
    with pytest.raises(typer.Exit) as ended, spoken_errors():
        raise error
    assert ended.value.exit_code == status
    said = capsys.readouterr().err
    assert said.startswith("distrifusion: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [BrokenPipeError(), RuntimeError("a mistake of ours"), KeyError("x")])
def test_what_nobody_can_put_right_and_a_reader_that_left_are_not(error: Exception) -> None:
    with pytest.raises(type(error)), spoken_errors():
        raise error


def test_a_warning_of_ours_is_a_line_and_others_are_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="theirs"), spoken_errors():
        warnings.warn_explicit("ours", UserWarning, distrifusion.__file__, 1)
        warnings.warn_explicit("theirs", UserWarning, "elsewhere.py", 1)
    assert capsys.readouterr().err == "distrifusion: ours\n"
