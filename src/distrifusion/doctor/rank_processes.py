"""Short-lived processes that are the ranks of a measurement, with a limit on all of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


class RoundTripError(Exception):
    """The processes did not exchange messages; says why."""


def run_ranks(module: str, num_ranks: int, words: Sequence[str], limit: float) -> str:
    """Start `python -m MODULE WORDS MEETING RANK LIMIT` for every rank; gives what rank 0 prints.

    Args:
        module: of this package.
        num_ranks: how many.
        words: what the module is told before the file of the meeting, the rank and the limit.
        limit: seconds for all of it, the processes' start included.

    Raises:
        RoundTripError: if one fails, or the limit passes.
    """
    with tempfile.TemporaryDirectory(prefix="distrifusion-") as folder:
        command = [sys.executable, "-m", module, *words, str(Path(folder) / "meeting")]
        # One thread each, and no word of a launcher that this process may have.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(limit)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(num_ranks)
        ]
        try:
            return _answers(ranks, time.monotonic() + limit)[0]
        finally:
            for process in ranks:
                process.kill()
                process.communicate()


def _answers(ranks: Sequence[subprocess.Popen[str]], end: float) -> list[str]:
    answers = []
    for process in ranks:
        try:
            output, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RoundTripError(f"{_in_words(len(ranks))} processes did not exchange a message in time") from None
        if process.returncode:
            lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
            raise RoundTripError(f"a process that should exchange messages failed: {lines[-1]}")
        answers.append(output)
    return answers


def _in_words(number: int) -> str:
    return "two" if number == 2 else str(number)
