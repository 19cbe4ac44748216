"""The command line: one file per command, and what they share."""

from __future__ import annotations

from typing import Annotated

import typer

from distrifusion.cli.bench import bench
from distrifusion.cli.doctor import doctor
from distrifusion.cli.models import models
from distrifusion.cli.plan import plan
from distrifusion.cli.run import run
from distrifusion.cli.serve import serve
from distrifusion.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from distrifusion import __version__

        typer.echo(f"distrifusion {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Draw one picture of a diffusion model on all your devices at once.

    The same picture as one device draws, or nearly the same and faster.
    """


for command in (run, serve, verify, plan, bench, doctor, models):
    app.command()(command)
