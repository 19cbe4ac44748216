"""`distrifusion plan`: which plan, how fast, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from distrifusion.cli import options
from distrifusion.cli.drawing import dtype_keyword, quiet_libraries
from distrifusion.cli.spoken import spoken_errors
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from distrifusion.planner.choice import Ranking
    from distrifusion.planner.links import Links
    from distrifusion.planner.speeds import Speed

_MOST_DEVICES = 64


def plan(
    model: options.Model,
    devices: Annotated[
        int, typer.Option("--devices", "-d", metavar="N", help="How many devices may be used, 1 to 64.")
    ] = 1,
    size: options.Size = None,
    fidelity: Annotated[
        str,
        typer.Option(
            "--fidelity",
            metavar="WISH",
            help="How near to one device's pictures: exact (to rounding), close (about 45 dB and more on the embedded "
            "model), any.",
        ),
    ] = "exact",
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="PROFILE",
            help="Links that are not here: nvlink-a100, nvlink-h100, pcie4, ethernet-25g, or a JSON file. "
            r"[dim]\[default: this machine, measured][/dim]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help=r"The GPU beside --on: a100, h100, l20. [dim]\[default: the profile's][/dim]",
            show_default=False,
        ),
    ] = None,
    steps: options.Steps = 30,
    guidance: options.Guidance = None,
    dtype: options.Dtype = "float32",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Also say what every plan's seconds are spent on, what was refused, and what is not counted.",
        ),
    ] = False,
    answer: options.AnswerFormat = options.Format.TEXT,
) -> None:
    """Predict what every plan takes, fastest first, and say which one would be taken; no weight is read.

    [bold]Examples[/bold]

    distrifusion plan demo --devices 2 --size 512x512 --fidelity close

    distrifusion plan stabilityai/stable-diffusion-xl-base-1.0 -d 8 --size 3840x3840 --dtype float16 --on nvlink-a100
    """
    with spoken_errors():
        if not 1 <= devices <= _MOST_DEVICES:
            raise ConfigError(f"--devices {devices}: 1 to {_MOST_DEVICES} can be weighed")
        if device is not None and on is None:
            raise ConfigError("--device names a GPU that is not here; say also --on and its links")
        wanted = options.size(size) if size else None
        quiet_libraries()
        ranking, speed, links = _rank(model, devices, wanted, fidelity, on, device, steps, guidance, dtype)
    if answer is options.Format.JSON:
        table = {**ranking.as_dict(), "speed": speed.as_dict(), "links": links.as_dict()}
        typer.echo(json.dumps(table, indent=1))
    else:
        typer.echo(_text(ranking, speed, links, explain))


def _rank(
    model: str,
    devices: int,
    size: tuple[int, int] | None,
    fidelity: str,
    on: str | None,
    device: str | None,
    steps: int,
    guidance: float | None,
    dtype: str,
) -> tuple[Ranking, Speed, Links]:
    import torch

    from distrifusion.planner import auto, calibration, speeds
    from distrifusion.planner import links as profiles
    from distrifusion.planner.blueprint import open_blueprint
    from distrifusion.planner.choice import rank
    from distrifusion.planner.costs import Costs
    from distrifusion.runtime.devices import resolve
    from distrifusion.runtime.surroundings import threads_of_each

    wish = auto.fidelity(fidelity)
    links = profiles.find(on) if on is not None else None
    name = device or speeds.DEVICE_OF.get(on or "", "a100")
    if name not in speeds.DEVICES:
        raise ConfigError(f"device '{name}' is unknown; it is one of {', '.join(speeds.DEVICES)}")
    kind = getattr(torch, options.one_of(dtype, options.DTYPES, "dtype"))
    dtype_keyword(dtype)
    blueprint = open_blueprint(model, kind, guided=guidance is None or guidance > 1)
    costs = Costs.of_size(blueprint, *(size or auto.model_size(blueprint)))
    counts = auto.counts_of(devices)
    if links is not None:
        return rank(costs, counts, wish, speeds.DEVICES[name], links, steps), speeds.DEVICES[name], links
    where, _ = resolve(devices, None)
    threads = threads_of_each(devices)
    found = calibration.calibrated(blueprint, where[0], threads, devices)
    for library, before in found.stale.items():
        typer.echo(f"the calibration was made with {library} {before}; measured again", err=True)
    return rank(costs, counts, wish, found.speed, found.links, steps), found.speed, found.links


def _text(ranking: Ranking, speed: Speed, links: Links, explain: bool) -> str:
    from distrifusion.memory.free import size_in_words
    from distrifusion.planner.candidates import fidelity_of

    lines = [f"predicted for {speed.name} ({speed.source}), links {links.name} ({links.source})", ""]
    head = f"{'plan':<36} {'devices':>7} {'s/step':>9} {'s/picture':>9} {'speed-up':>8} {'memory':>9}"
    lines.append(f"{head}  fidelity  limited by")
    for p in ranking.predictions:
        mark = "* " if p is ranking.chosen else "  "
        lines.append(
            f"{mark}{p.plan!s:<34} {p.plan.num_ranks:>7} {p.per_step:>9.4g} {p.per_picture:>9.4g} "
            f"{ranking.speedup(p):>7.2f}x {size_in_words(p.memory.total):>9}  {fidelity_of(p.plan):<8}  "
            f"{p.limit}"
        )
        if explain:
            parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in p.parts.items() if seconds)
            lines.append(f"      {parts}; sends {p.sent / 1e6:.4g} MB a step; keeps {size_in_words(p.memory.kept)}")
    if explain and ranking.refused:
        lines += ["", *(f"not {refused.plan}: {refused.reason}" for refused in ranking.refused)]
    if explain and ranking.left_out:
        lines += ["", *(f"not counted, {left.part}: {left.reason}" for left in ranking.left_out)]
    return "\n".join([*lines, "", ranking.reason])
