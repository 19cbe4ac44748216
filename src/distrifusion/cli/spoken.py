"""How a command ends: in one clear line, with a status that a script can read."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from distrifusion.errors import Cancelled, DistrifusionError, OutOfMemory

if TYPE_CHECKING:
    from distrifusion.runtime.pipeline import LoadedPipeline

_PACKAGE = Path(__file__).parents[1]
FAILED = 1
BAD_USE = 2
INTERRUPTED = 130


@contextmanager
def spoken_errors() -> Iterator[None]:
    """One clear message instead of a traceback for what a person can put right, or a line of code for a warning."""
    try:
        with _spoken_warnings():
            yield
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except Cancelled as error:
        _end(str(error), INTERRUPTED)
    except OutOfMemory as error:
        _end(str(error), BAD_USE)
    except BrokenPipeError:
        # Whoever read the output has read enough; click ends in silence.
        raise
    except (DistrifusionError, ValueError, OSError, ImportError) as error:
        _end(str(error), BAD_USE)
    except RuntimeError as error:
        # torch.OutOfMemoryError outside of a call; by name, so that torch is not imported for it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _end(f"out of memory; use more devices, a smaller --size, or --dtype float16 ({error})", BAD_USE)


@contextmanager
def _spoken_warnings() -> Iterator[None]:
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any) -> None:
        if Path(filename).is_relative_to(_PACKAGE):
            typer.echo(f"distrifusion: {message}", err=True)
        else:
            shown(message, category, filename, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def cancelled_by_ctrl_c(pipe: LoadedPipeline) -> Iterator[None]:
    """Within, the first Ctrl-C ends the running call after its step, and the second ends everything at once."""

    def cancel(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        typer.echo("\ndistrifusion: stopping after this step; Ctrl-C again ends at once", err=True)
        pipe.cancel()

    # Python hands signals to the main thread only, and lets nobody else ask for them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(message: str, status: int) -> NoReturn:
    typer.echo(f"distrifusion: {message}", err=True)
    raise typer.Exit(status) from None
