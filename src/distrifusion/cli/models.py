"""`distrifusion models`: what is supported."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from distrifusion import support
from distrifusion.cli import options


def models(answer: options.AnswerFormat = options.Format.TEXT) -> None:
    """List what is supported: every line is proven by tests that pass, and counts them."""
    lines = support.matrix()
    if answer is options.Format.JSON:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False))
        return
    width = max((len(line.name) for line in lines), default=0)
    for area, heading in support.AREAS.items():
        own = [line for line in lines if line.area == area]
        if own:
            typer.echo(typer.style(heading, bold=True))
        for line in own:
            typer.echo(f"  {line.name:<{width}}  {line.proofs} test{'s' * (line.proofs > 1)}")
