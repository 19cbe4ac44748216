"""`distrifusion serve`: draw what is asked for over HTTP."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrifusion.cli import options
from distrifusion.cli.drawing import Wish, dtype_keyword, quiet_libraries
from distrifusion.cli.early import early_server
from distrifusion.cli.spoken import FAILED, spoken_errors
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from distrifusion.serve.http import Settings

_SERVER = "The server"
_OWN_MACHINE = ("127.0.0.1", "::1", "localhost")


def serve(
    model: options.Model,
    size: options.Size = None,
    steps: options.Steps = 30,
    guidance: options.Guidance = None,
    scheduler: options.Scheduler = None,
    dtype: options.Dtype = "float32",
    devices: options.Devices = None,
    plan: options.WishedPlan = None,
    fidelity: options.WishedFidelity = None,
    graphs: options.Graphs = False,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", help="0: any that is free.", rich_help_panel=_SERVER)
    ] = 8000,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue", metavar="N", help="Requests that may wait for the running one.", rich_help_panel=_SERVER
        ),
    ] = 16,
    request_timeout: Annotated[
        float,
        typer.Option(
            "--request-timeout",
            metavar="SECONDS",
            help="From a request's arrival to its end; then it is cancelled.",
            rich_help_panel=_SERVER,
        ),
    ] = 600.0,
    max_pixels: Annotated[
        int,
        typer.Option(
            "--max-pixels",
            metavar="N",
            help="Of a request, all its pictures together.",
            rich_help_panel=_SERVER,
        ),
    ] = 2048 * 2048,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="DISTRIFUSION_API_KEY",
            metavar="KEY",
            help="That requests must bear; better in the environment, where other users do not see it. "
            r"[dim]\[default: none is asked for][/dim]",
            show_default=False,
            show_envvar=True,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            help="That the running request gets to end when the server is stopped.",
            rich_help_panel=_SERVER,
        ),
    ] = 30.0,
) -> None:
    """Draw pictures that are asked for over HTTP, in the form of OpenAI's images, one request after the other.

    --size, --steps and --guidance are what a request gets that says nothing, and what --plan auto plans for.
    Ctrl-C or SIGTERM stops it after the running request. docs/serving.md has the routes.

    [bold]Example[/bold]

    distrifusion serve demo --devices 2 --plan auto --size 512x512
    """
    with spoken_errors():
        wish = Wish(
            *(model, devices, plan, size, scheduler, dtype),
            call={"num_inference_steps": steps, "guidance_scale": guidance},
            fidelity=fidelity,
        )
        server = Server(host, port, max_queue, request_timeout, max_pixels, api_key, grace)
        server.check()
        import distrifusion.serve  # noqa: F401 - says what to install, before anything is started

        with early_server(wish):
            _serve(wish, server, graphs)


@dataclass(frozen=True)
class Server:
    """What the options of the server say."""

    host: str
    port: int
    max_queue: int
    request_timeout: float
    max_pixels: int
    api_key: str | None
    grace: float

    def check(self) -> None:
        """Check what can be checked before anything is imported.

        Raises:
            ConfigError: if a value cannot work.
        """
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port {self.port} is not in 0 to 65535")
        if self.max_queue < 0:
            raise ConfigError(f"--max-queue {self.max_queue} must be at least 0")
        if not 0 < self.request_timeout < math.inf:
            raise ConfigError(f"--request-timeout {self.request_timeout:g} must be above 0 and finite")
        if not 0 <= self.grace < math.inf:
            raise ConfigError(f"--grace {self.grace:g} must be at least 0 and finite")
        if self.max_pixels < 1:
            raise ConfigError(f"--max-pixels {self.max_pixels} must be at least 1")
        if self.api_key is not None and re.fullmatch(r"[!-~]+", self.api_key) is None:
            raise ConfigError("--api-key must have letters, digits and signs of ASCII, and no spaces")

    def settings(self, model: str, defaults: Mapping[str, Any]) -> Settings:
        """For the application.

        Raises:
            ConfigError: if the size for requests that name none is larger than a request may be.
        """
        from distrifusion.serve.http import Settings

        pixels = defaults.get("width", 0) * defaults.get("height", 0)
        if pixels > self.max_pixels:
            raise ConfigError(
                f"--size {defaults['width']}x{defaults['height']} has {pixels} pixels, and --max-pixels is "
                f"{self.max_pixels}; raise it, or use a smaller size"
            )
        return Settings(model, defaults, self.max_pixels, self.request_timeout, self.api_key)


def _serve(wish: Wish, server: Server, graphs: bool) -> None:
    quiet_libraries()
    from distrifusion.doctor.machine import devices_in_words
    from distrifusion.loading import load
    from distrifusion.serve.engine import Engine
    from distrifusion.serve.running import bind, run

    _check_place(wish)
    arguments = wish.arguments()
    settings = server.settings(wish.model, arguments)
    wish.scheduler_class()
    keywords = dtype_keyword(wish.dtype)
    plan, spec = wish.plan, wish.device_spec()
    with _sigterm_as_ctrl_c(), bind(server.host, server.port) as bound:
        if wish.automatic:
            plan, spec = wish.choose(arguments)
        with load(wish.model, spec, plan, graphs=graphs, **keywords) as pipe:
            wish.put_scheduler(pipe)
            pipe.set_progress_bar_config(disable=True)
            where = devices_in_words(pipe.devices, pipe.threads)
            typer.echo(f"{wish.model}: {pipe.plan} on {where}, at {_address(bound)}; its routes: /docs", err=True)
            if server.api_key is None and server.host not in _OWN_MACHINE:
                typer.echo(f"distrifusion: whoever reaches {server.host} may draw; --api-key asks for a key", err=True)
            if not run(Engine(pipe, server.max_queue), settings, bound, server.grace):
                typer.echo("distrifusion: the running request does not end; its ranks are ended with this", err=True)
                # Closing the pipeline would wait for it. Ranks end when the process that started them is gone.
                os._exit(FAILED)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """While weights are being read, SIGTERM too ends this process through the ends of all blocks."""
    # Python hands signals to the main thread only, and lets nobody else ask for them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_place(wish: Wish) -> None:
    from distrifusion.runtime.in_process import TorchrunPlace

    if TorchrunPlace.of(os.environ) is not None:
        raise ConfigError("serve starts its own ranks; start it without torchrun")
    if wish.makes_video():
        raise ConfigError(f"'{wish.model}' makes videos, and serve draws pictures; use `distrifusion run`")


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"
