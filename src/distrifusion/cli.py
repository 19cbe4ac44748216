"""The command line: `distrifusion run`."""

from __future__ import annotations

import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrifusion.errors import ConfigError, DistrifusionError

if TYPE_CHECKING:
    from PIL.Image import Image

    from distrifusion.runtime.pipeline import LoadedPipeline

# By the names that diffusers users give them.
_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++sde": "DPMSolverSDEScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_DTYPES = ("float32", "bfloat16", "float16")
_DEMO_SIZE = (512, 512)
_BAD_USE = 2
_INTERRUPTED = 130

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


@app.command()
def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="'demo' (the embedded model), a folder of a diffusers pipeline, or a hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.", show_default=False)],
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="What to keep out of the picture.", show_default=False)
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            "-d",
            help="How many (2: GPUs where CUDA is, else CPU processes) or which (0,1  cuda:1  cpu  cpu,cpu). "
            r"[dim]\[default: as the plan needs, else all GPUs, else one CPU][/dim]",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            help="What to divide: words joined by dots. cfg2: the two branches of guidance; patch4: four bands of "
            "rows; displaced: faster, not exact; w4: warm-up calls that stay exact. "
            r"[dim]\[default: the exact plan for the devices][/dim]",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WIDTHxHEIGHT",
            help=r"In pixels, multiples of 8. [dim]\[default: the model's own; 512x512 for demo][/dim]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.")] = 30,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            help="Weight of the prompt; 1 or below draws without guidance, in half the time. "
            r"[dim]\[default: the model's own][/dim]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=2**63 - 1,
            help=r"Of the noise. [dim]\[default: a new one, printed][/dim]",
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            help=rf"One of {', '.join(_SCHEDULERS)}. [dim]\[default: the model's own][/dim]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help=f"Of the weights: {', '.join(_DTYPES)}.")] = "float32",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the picture; its ending says how.")] = Path(
        "out.png"
    ),
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also draw on one device (on CPU: one process with the threads of one rank, because a rank stands "
            "for a device); print speed-up, PSNR and SSIM, and write both pictures and their error map side by side.",
        ),
    ] = False,
) -> None:
    """Draw a picture and say how long a step took.

    [bold]Examples[/bold]

    distrifusion run demo --prompt "a sunset over green mountains with a lake" --devices 2

    distrifusion run demo -p "a lake at night" -d 2 --plan patch2.displaced.w4 --seed 7 --compare
    """
    with _spoken_errors():
        wish = Wish(model, prompt, negative_prompt, devices, plan, size, steps, guidance, seed, scheduler, dtype, out)
        _draw(wish, compare)


@dataclass(frozen=True)
class Wish:
    """What the options of `run` say, as they were typed."""

    model: str
    prompt: str
    negative_prompt: str | None
    devices: str | None
    plan: str | None
    size: str | None
    steps: int
    guidance: float | None
    seed: int | None
    scheduler: str | None
    dtype: str
    out: Path


def _draw(wish: Wish, compare: bool) -> None:
    # Torch and diffusers take seconds to import; `--help` and a wrong option do not wait for them.
    _quiet_libraries()
    from distrifusion.loading import load
    from distrifusion.runtime import devices as device_specs

    arguments = _arguments(wish)
    _check_picture_path(wish.out)
    seed = secrets.randbelow(2**32) if wish.seed is None else wish.seed
    options = _dtype(wish.dtype)
    scheduler = wish.scheduler and _one_of(wish.scheduler, _SCHEDULERS, "scheduler")
    spec = None if wish.devices is None else device_specs.parse(wish.devices)
    if compare:
        _check_comparable(spec, wish.plan)
    with load(wish.model, spec, wish.plan, **options) as pipe:
        drawn = _once(pipe, arguments, seed, scheduler, label=str(pipe.plan))
        where, threads, chief = pipe.devices, pipe.threads, pipe.rank == 0
    if not chief:
        return
    drawn.picture.save(wish.out)
    typer.echo(f"{drawn}, seed {seed}, picture in {wish.out}")
    if compare:
        with load(wish.model, [where[0]], threads=threads, **options) as pipe:
            alone = _once(pipe, arguments, seed, scheduler, label="1 device")
        _tell_difference(drawn, alone, wish.out)


def _arguments(wish: Wish) -> dict[str, Any]:
    """Arguments of the pipeline's call, checked against its class before any weight is read."""
    from distrifusion.runtime import call_checks, source

    size = _size(wish.size) if wish.size else (_DEMO_SIZE if wish.model == "demo" else (None, None))
    given = {
        "prompt": wish.prompt,
        "negative_prompt": wish.negative_prompt,
        "width": size[0],
        "height": size[1],
        "num_inference_steps": wish.steps,
        "guidance_scale": wish.guidance,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    facts = source.find(wish.model, {}).facts
    if facts is not None:
        call_checks.check(facts, call_checks.bind(facts, (), arguments))
    return arguments


@dataclass(frozen=True)
class Drawn:
    """A picture and how it came out: plan, devices, seconds per step and in all."""

    picture: Image
    plan: str
    devices: str
    per_step: float
    total: float

    def __str__(self) -> str:
        return f"{self.plan} on {self.devices}: {self.per_step:.3g} s per step, {self.total:.3g} s in all"


def _once(pipe: LoadedPipeline, arguments: dict[str, Any], seed: int, scheduler: str | None, label: str) -> Drawn:
    import diffusers
    import torch

    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, _SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(desc=label, dynamic_ncols=True, **({} if pipe.rank == 0 else {"disable": True}))
    picture = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed)).images[0]
    times = pipe.last_run
    assert times is not None
    return Drawn(picture, str(pipe.plan), _devices_in_words(pipe), times.seconds_per_step, times.total)


def _devices_in_words(pipe: LoadedPipeline) -> str:
    count, kind = len(pipe.devices), pipe.devices[0].type
    if kind != "cpu":
        return f"{count} GPU{'s' * (count > 1)}"
    words = f"{count} CPU process{'es' * (count > 1)}"
    return words if pipe.threads is None else f"{words} of {pipe.threads} thread{'s' * (pipe.threads > 1)}"


def _tell_difference(drawn: Drawn, alone: Drawn, out: Path) -> None:
    from distrifusion.quality.metrics import psnr, ssim
    from distrifusion.quality.panel import side_by_side

    path = out.with_name(f"{out.stem}-compare{out.suffix}")
    side_by_side(alone.picture, drawn.picture, "1 device", drawn.plan).save(path)
    decibels = psnr(drawn.picture, alone.picture)
    typer.echo(
        f"against {alone.devices} ({alone.per_step:.3g} s per step): {alone.per_step / drawn.per_step:.2f}x per step, "
        f"{alone.total / drawn.total:.2f}x in all, PSNR {decibels:.1f} dB, "
        f"SSIM {ssim(drawn.picture, alone.picture):.4f}, side by side in {path}"
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if match is None:
        raise ConfigError(f"size '{text}' is not of the form WIDTHxHEIGHT, such as 512x384")
    return int(match[1]), int(match[2])


def _one_of(word: str, known: Any, what: str) -> str:
    if word.lower() not in known:
        raise ConfigError(f"{what} '{word}' is unknown; it is one of {', '.join(known)}")
    return word.lower()


def _check_picture_path(path: Path) -> None:
    from PIL import Image

    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder '{path.parent}' for the picture '{path.name}'; make it first")
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder; name a file in it, such as {path / 'out.png'}")
    Image.init()
    if path.suffix.lower() not in Image.EXTENSION or Image.EXTENSION[path.suffix.lower()] not in Image.SAVE:
        raise ConfigError(f"'{path.name}' does not end in a kind of picture; use .png, .jpg or .webp")


def _check_comparable(spec: Any, plan: str | None) -> None:
    from distrifusion.plan import Plan
    from distrifusion.runtime.devices import resolve
    from distrifusion.runtime.in_process import TorchrunPlace

    if TorchrunPlace.of(os.environ) is not None:
        raise ConfigError("--compare draws on one device after all others, which torchrun's ranks cannot; leave it out")
    where, _ = resolve(spec, None if plan is None else Plan.parse(plan))
    if len(where) == 1:
        raise ConfigError("--compare compares with one device, and this is one; name two or more by --devices")


def _dtype(name: str) -> dict[str, Any]:
    """The keyword of from_pretrained for a dtype, which diffusers has renamed; none for what it takes by itself."""
    import diffusers
    import torch
    from packaging.version import Version

    if _one_of(name, _DTYPES, "dtype") == "float32":
        return {}
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    return {keyword: getattr(torch, name.lower())}


def _quiet_libraries() -> None:
    """Leave the terminal to the picture's own bar."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@contextmanager
def _spoken_errors() -> Iterator[None]:
    """One clear message instead of a traceback for what a person can put right."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("distrifusion: interrupted", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except (DistrifusionError, ValueError, OSError, ImportError) as error:
        typer.echo(f"distrifusion: {error}", err=True)
        raise typer.Exit(_BAD_USE) from None
    except RuntimeError as error:
        # torch.OutOfMemoryError; by name, so that torch is not imported for it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        typer.echo(
            f"distrifusion: out of memory; use more devices, a smaller --size, or --dtype float16 ({error})", err=True
        )
        raise typer.Exit(_BAD_USE) from None


if __name__ == "__main__":
    sys.exit(app())
