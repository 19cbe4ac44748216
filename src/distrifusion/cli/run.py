"""`distrifusion run`: draw one picture."""

from __future__ import annotations

import json
import secrets
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrifusion.cli import options
from distrifusion.cli.drawing import Wish, dtype_keyword, quiet_libraries, refuse_torchrun
from distrifusion.cli.editing import Edit
from distrifusion.cli.preview import Preview
from distrifusion.cli.spoken import cancelled_by_ctrl_c, spoken_errors
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from distrifusion.runtime.pipeline import LoadedPipeline
    from distrifusion.timeline import Timeline

_NUM_PREVIEWS = 10


def run(
    model: options.Model,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="What to draw.", show_default=False, rich_help_panel=options.PICTURE
        ),
    ],
    negative_prompt: options.NegativePrompt = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="Draw from this picture (image-to-image) instead of from noise alone.",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
    mask_image: Annotated[
        Path | None,
        typer.Option(
            "--mask-image",
            metavar="FILE",
            help="Draw only what is white in this picture anew (inpainting).",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            metavar="X",
            help="How much of --image is drawn anew: 1 all of it, near 0 hardly anything. "
            r"[dim]\[default: the pipeline's own][/dim]",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(
            "--lora",
            metavar="PATH",
            help="LoRA weights, a file or a folder; takes the package peft.",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
    size: options.Size = None,
    steps: options.Steps = 30,
    guidance: options.Guidance = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help=r"Of the noise. [dim]\[default: a new one, printed][/dim]",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
    scheduler: options.Scheduler = None,
    sampler: options.Sampler = None,
    window: options.Window = None,
    tolerance: options.Tolerance = None,
    dtype: options.Dtype = "float32",
    devices: options.Devices = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="PLAN",
            help="What to divide: words joined by dots. cfg2: the two branches of guidance; dp2: several pictures; "
            "patch4: four bands of rows; displaced: old keys and values, not exact; forecast: nearer; delta4: few "
            "bytes, for slow links; w4: warm-up calls that stay exact; tp2: the weights of every layer; async2: parts "
            "of the network at once; for transformers also ulysses2, ring2 and pipe2; see docs/methods.md. "
            "auto: the fastest on this machine that keeps --fidelity. "
            r"[dim]\[default: the exact plan for the devices][/dim]",
            show_default=False,
            rich_help_panel=options.DIVISION,
        ),
    ] = None,
    fidelity: options.WishedFidelity = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write the picture; its ending says how.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = Path("out.png"),
    preview: Annotated[
        Path | None,
        typer.Option(
            "--preview",
            metavar="FILE",
            help="Also write the picture so far into this file, about ten times; decoding it takes time.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also draw on one device (on CPU: one process with the threads of one rank, because a rank stands "
            "for a device); print speed-up, PSNR and SSIM, and write both pictures and their error map side by side.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    trace: options.Trace = None,
    answer: options.AnswerFormat = options.Format.TEXT,
) -> None:
    """Draw a picture and say how long a step took.

    [bold]Examples[/bold]

    distrifusion run demo --prompt "a sunset over green mountains with a lake" --devices 2

    distrifusion run demo -p "a lake at night" -d 2 --plan patch2.displaced.w4 --seed 7 --compare
    """
    call = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "window": window,
        "tolerance": tolerance,
    }
    with spoken_errors():
        order = Order(
            Wish(model, devices, plan, size, scheduler, dtype, call, fidelity),
            Edit.of(image, mask_image, strength),
            secrets.randbelow(2**32) if seed is None else options.check_seed(seed),
            lora,
            preview,
            trace,
        )
        _draw(order, out, compare, answer)


@dataclass(frozen=True)
class Order:
    """What is drawn, from what, and what is put on the model."""

    wish: Wish
    edit: Edit | None
    seed: int
    lora: Path | None
    preview: Path | None
    trace: Path | None

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call.

        Raises:
            ConfigError, OSError: if a value or a file cannot work.
        """
        drawing = self.wish.arguments()
        return self.edit.arguments(drawing, to_size=self.wish.size is not None) if self.edit else drawing

    def source(self) -> tuple[Any, dict[str, Any]]:
        """What `load` opens, and its keywords for `from_pretrained`."""
        keywords = dtype_keyword(self.wish.dtype)
        return (self.edit.source(self.wish.model, keywords), {}) if self.edit else (self.wish.model, keywords)


@dataclass(frozen=True)
class Drawn:
    """A picture and how it came out: plan, devices, seconds per step and in all; what the ranks did, if traced.

    Attributes:
        calls: denoiser calls of a sampler that solves steps together, where a step is a call; None otherwise.
    """

    picture: Image
    plan: str
    devices: str
    per_step: float
    total: float
    timeline: Timeline | None
    calls: int | None = None

    def __str__(self) -> str:
        step = "step" if self.calls is None else f"call, {self.calls} calls"
        return f"{self.plan} on {self.devices}: {self.per_step:.3g} s per {step}, {self.total:.3g} s in all"

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON."""
        return {
            "plan": self.plan,
            "devices": self.devices,
            "seconds_per_step": self.per_step,
            "seconds": self.total,
            **({} if self.calls is None else {"calls": self.calls}),
        }


@dataclass(frozen=True)
class Comparison:
    """What one device drew beside it."""

    alone: Drawn
    speedup_per_step: float
    speedup: float
    psnr: float
    ssim: float
    side_by_side: Path

    def __str__(self) -> str:
        return (
            f"against {self.alone.devices} ({self.alone.per_step:.3g} s per step): {self.speedup_per_step:.2f}x per "
            f"step, {self.speedup:.2f}x in all, PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}, "
            f"side by side in {self.side_by_side}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures for JSON; a PSNR of null is that of equal pictures."""
        return {
            "one_device": self.alone.as_dict(),
            "speedup_per_step": self.speedup_per_step,
            "speedup": self.speedup,
            "psnr_db": self.psnr if self.psnr < float("inf") else None,
            "ssim": self.ssim,
            "side_by_side": str(self.side_by_side),
        }


def _draw(order: Order, out: Path, compare: bool, answer: options.Format) -> None:
    # Torch and diffusers take seconds to import; `--help` and a wrong option do not wait for them.
    quiet_libraries()
    from distrifusion.engine.words import WORDS
    from distrifusion.loading import load
    from distrifusion.timeline import check_trace_path

    arguments = order.arguments()
    for path in (out, order.preview):
        if path is not None:
            _check_picture_path(path)
    if order.trace is not None:
        check_trace_path(order.trace)
    if order.lora is not None and not order.lora.exists():
        raise ConfigError(f"--lora '{order.lora}': there is no such file or folder")
    source, keywords = order.source()
    order.wish.scheduler_class()
    plan, spec = order.wish.plan, order.wish.device_spec()
    if order.wish.automatic:
        plan, spec = order.wish.choose(arguments)
    if compare:
        _check_comparable(spec, plan)
    with load(source, spec, plan, **keywords) as pipe:
        drawn = _once(pipe, order, arguments, str(pipe.plan), first=True)
        where, threads, chief = pipe.devices, pipe.threads, pipe.rank == 0
    if not chief:
        return
    drawn.picture.save(out)
    if drawn.timeline is not None and order.trace is not None:
        drawn.timeline.write(order.trace)
    as_json = answer is options.Format.JSON
    if not as_json:
        typer.echo(f"{drawn}, seed {order.seed}, picture in {out}")
        if drawn.timeline is not None:
            typer.echo(f"{drawn.timeline.text()}\ntrace in {order.trace}")
    comparison = None
    if compare:
        with load(source, [where[0]], threads=threads, **keywords) as pipe:
            plain = {name: value for name, value in arguments.items() if name not in WORDS}
            alone = _once(pipe, order, plain, "1 device", first=False)
        comparison = _compare(drawn, alone, out)
    if as_json:
        more = {"compared": comparison.as_dict()} if comparison else {}
        more |= {"trace": {"file": str(order.trace), **drawn.timeline.as_dict()}} if drawn.timeline else {}
        typer.echo(json.dumps({**drawn.as_dict(), "seed": order.seed, "picture": str(out), **more}, indent=1))
    elif comparison:
        typer.echo(comparison)


def _once(pipe: LoadedPipeline, order: Order, arguments: dict[str, Any], label: str, first: bool) -> Drawn:
    """Draw; `first` is what was ordered, with its preview and its trace, and not what it is compared with."""
    import diffusers
    import torch

    from distrifusion.doctor.machine import devices_in_words

    scheduler = order.wish.scheduler_class()
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    if order.lora is not None:
        pipe.load_lora_weights(str(order.lora.resolve()))
    pipe.set_progress_bar_config(desc=label, dynamic_ncols=True, **({} if pipe.rank == 0 else {"disable": True}))
    more: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(order.seed)}
    if first and order.preview is not None:
        every = max(1, arguments["num_inference_steps"] // _NUM_PREVIEWS)
        more["callback_on_step_end"] = Preview(order.preview, every, pipe.rank)
    with cancelled_by_ctrl_c(pipe), pipe.trace() if first and order.trace else nullcontext() as timeline:
        picture = pipe(**arguments, **more).images[0]
    times = pipe.last_run
    assert times is not None
    where = devices_in_words(pipe.devices, pipe.threads)
    calls = len(times.steps) if arguments.get("sampler") else None
    return Drawn(picture, str(pipe.plan), where, times.seconds_per_step, times.total, timeline, calls)


def _compare(drawn: Drawn, alone: Drawn, out: Path) -> Comparison:
    from distrifusion.quality.metrics import psnr, ssim
    from distrifusion.quality.panel import side_by_side

    path = out.with_name(f"{out.stem}-compare{out.suffix}")
    side_by_side(alone.picture, drawn.picture, "1 device", drawn.plan).save(path)
    return Comparison(
        alone,
        alone.per_step / drawn.per_step,
        alone.total / drawn.total,
        psnr(drawn.picture, alone.picture),
        ssim(drawn.picture, alone.picture),
        path,
    )


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

    refuse_torchrun("--compare")
    where, _ = resolve(spec, None if plan is None else Plan.parse(plan))
    if len(where) == 1:
        raise ConfigError("--compare compares with one device, and this is one; name two or more by --devices")
