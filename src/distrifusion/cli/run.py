"""`distrifusion run`: draw one picture, or one video."""

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
from distrifusion.cli.drawn import Comparison, Drawn
from distrifusion.cli.early import early_server
from distrifusion.cli.editing import Edit
from distrifusion.cli.output import Output, check_picture
from distrifusion.cli.preview import Preview
from distrifusion.cli.spoken import cancelled_by_ctrl_c, spoken_errors
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from distrifusion.runtime.pipeline import LoadedPipeline

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
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames",
            metavar="N",
            help=r"Of a video. [dim]\[default: the pipeline's own][/dim]",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
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
    plan: options.WishedPlan = None,
    fidelity: options.WishedFidelity = None,
    graphs: options.Graphs = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write the picture; its ending says how. A video: .webp, .gif, .mp4, or a picture for every "
            r"frame, out-%03d.png. [dim]\[default: out.png; out.webp for a video][/dim]",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    fps: Annotated[
        int | None,
        typer.Option(
            "--fps",
            metavar="N",
            help=r"Frames per second of a video. [dim]\[default: 16][/dim]",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
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
    """Draw a picture, or a video where the model makes one, and say how long a step took.

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
        "num_frames": frames,
    }
    with spoken_errors():
        order = Order(
            Wish(model, devices, plan, size, scheduler, dtype, call, fidelity),
            Edit.of(image, mask_image, strength),
            secrets.randbelow(2**32) if seed is None else options.check_seed(seed),
            lora,
            preview,
            trace,
            graphs,
        )
        with early_server(order.wish):
            _draw(order, out, fps, compare, answer)


@dataclass(frozen=True)
class Order:
    """What is drawn, from what, and what is put on the model."""

    wish: Wish
    edit: Edit | None
    seed: int
    lora: Path | None
    preview: Path | None
    trace: Path | None
    graphs: bool = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call.

        Raises:
            ConfigError, OSError: if a value or a file cannot work.
        """
        arguments = self.wish.arguments()
        if self.edit:
            arguments = self.edit.arguments(arguments, to_size=self.wish.size is not None)
        self.wish.check_sampler(arguments)
        return arguments

    def output(self, path: Path | None, fps: int | None) -> Output:
        """Where what is drawn goes.

        Raises:
            ConfigError: if it cannot be written there, or another option is for pictures and a video is drawn.
        """
        is_video = self.wish.makes_video()
        for option, given in (("--image", self.edit), ("--preview", self.preview)):
            if is_video and given is not None:
                raise ConfigError(f"{option} is for models that draw pictures, and '{self.wish.model}' makes videos")
        if self.preview is not None:
            check_picture(self.preview)
        return Output.of(path, fps, is_video)

    def source(self) -> tuple[Any, dict[str, Any]]:
        """What `load` opens, and its keywords for `from_pretrained`."""
        keywords = dtype_keyword(self.wish.dtype)
        return (self.edit.source(self.wish.model, keywords), {}) if self.edit else (self.wish.model, keywords)


def _draw(order: Order, out: Path | None, fps: int | None, compare: bool, answer: options.Format) -> None:
    # Torch and diffusers take seconds to import; `--help` and a wrong option do not wait for them.
    quiet_libraries()
    from distrifusion.engine.words import WORDS
    from distrifusion.loading import load
    from distrifusion.timeline import check_trace_path

    output = order.output(out, fps)
    arguments = order.arguments()
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
    with load(source, spec, plan, graphs=order.graphs, **keywords) as pipe:
        drawn = _once(pipe, order, arguments, str(pipe.plan), first=True)
        where, threads, chief = pipe.devices, pipe.threads, pipe.rank == 0
    if not chief:
        return
    output.write(drawn.frames)
    if drawn.timeline is not None and order.trace is not None:
        drawn.timeline.write(order.trace)
    as_json = answer is options.Format.JSON
    what = "picture" if output.fps is None else "video"
    if not as_json:
        how_long = "" if output.fps is None else f" of {len(drawn.frames)} frames"
        typer.echo(f"{drawn}, seed {order.seed}, {what}{how_long} in {output.path}")
        if drawn.timeline is not None:
            typer.echo(f"{drawn.timeline.text()}\ntrace in {order.trace}")
    comparison = None
    if compare:
        with load(source, [where[0]], threads=threads, **keywords) as pipe:
            plain = {name: value for name, value in arguments.items() if name not in WORDS}
            alone = _once(pipe, order, plain, "1 device", first=False)
        comparison = Comparison.of(drawn, alone, output)
    if as_json:
        more: dict[str, Any] = {"compared": comparison.as_dict()} if comparison else {}
        more |= {"trace": {"file": str(order.trace), **drawn.timeline.as_dict()}} if drawn.timeline else {}
        more |= {} if output.fps is None else {"frames": len(drawn.frames)}
        typer.echo(json.dumps({**drawn.as_dict(), "seed": order.seed, what: str(output.path), **more}, indent=1))
    elif comparison:
        typer.echo(comparison)


def _once(pipe: LoadedPipeline, order: Order, arguments: dict[str, Any], label: str, first: bool) -> Drawn:
    """Draw; `first` is what was ordered, with its preview and its trace, and not what it is compared with."""
    import torch

    from distrifusion.doctor.machine import devices_in_words

    order.wish.put_scheduler(pipe)
    if order.lora is not None:
        pipe.load_lora_weights(str(order.lora.resolve()))
    pipe.set_progress_bar_config(desc=label, dynamic_ncols=True, **({} if pipe.rank == 0 else {"disable": True}))
    more: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(order.seed)}
    if first and order.preview is not None:
        every = max(1, arguments["num_inference_steps"] // _NUM_PREVIEWS)
        more["callback_on_step_end"] = Preview(order.preview, every, pipe.rank)
    with cancelled_by_ctrl_c(pipe), pipe.trace() if first and order.trace else nullcontext() as timeline:
        result = pipe(**arguments, **more)
    frames = list(result.frames[0]) if order.wish.makes_video() else [result.images[0]]
    times = pipe.last_run
    assert times is not None
    where = devices_in_words(pipe.devices, pipe.threads)
    calls = len(times.steps) if arguments.get("sampler") else None
    return Drawn(frames, str(pipe.plan), where, times.seconds_per_step, times.total, timeline, calls)


def _check_comparable(spec: Any, plan: str | None) -> None:
    from distrifusion.plan import Plan
    from distrifusion.runtime.devices import resolve

    refuse_torchrun("--compare")
    where, _ = resolve(spec, None if plan is None else Plan.parse(plan))
    if len(where) == 1:
        raise ConfigError("--compare compares with one device, and this is one; name two or more by --devices")
