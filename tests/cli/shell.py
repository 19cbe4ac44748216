"""Commands as a person types them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

import distrifusion
from distrifusion.cli import app

_SOURCE = Path(distrifusion.__file__).parents[1]


def run(*words: object) -> Result:
    """A command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def start(*words: object, said: Path) -> subprocess.Popen[str]:
    """A command in a process of its own; what it says to standard error goes to the file `said`."""
    with said.open("w") as file:
        return subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=file, **_surroundings())


def finish(*words: object, limit: float = 280) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, to its end."""
    return subprocess.run(command(*words), capture_output=True, timeout=limit, **_surroundings())


def command(*words: object) -> list[str]:
    """The words for a new process."""
    return [sys.executable, "-m", "distrifusion", *map(str, words)]


def _surroundings() -> dict[str, Any]:
    return {"env": {**os.environ, "PYTHONPATH": str(_SOURCE)}, "text": True}
