"""`distrifusion verify`: how far a plan's pictures are from those of one device."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrifusion import demo
from distrifusion.cli import options
from distrifusion.cli.drawing import Wish, dtype_keyword, quiet_libraries, refuse_torchrun
from distrifusion.cli.early import early_server
from distrifusion.cli.spoken import FAILED, cancelled_by_ctrl_c, spoken_errors
from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from distrifusion.quality.verify import Task

LIMITS = "Limits that decide the exit status"
_MAX_SEEDS = 10_000


def _limit(option: str, text: str) -> Any:
    return typer.Option(option, metavar="X", help=text, show_default=False, rich_help_panel=LIMITS)


def verify(
    context: typer.Context,
    model: options.Model,
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds",
            metavar="SEEDS",
            help="One picture each, such as 0-7 or 1,5,9-12.",
            rich_help_panel=options.PICTURE,
        ),
    ] = "0-3",
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help=r"What to draw. [dim]\[default: twelve landscapes for demo and demo-dit][/dim]",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts, one a line; seed 5 draws the sixth, and so on from the start again.",
            show_default=False,
            rich_help_panel=options.PICTURE,
        ),
    ] = None,
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    steps: options.Steps = 30,
    guidance: options.Guidance = None,
    scheduler: options.Scheduler = None,
    dtype: options.Dtype = "float32",
    devices: options.Devices = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan",
            metavar="PLAN",
            help=r"What to verify, such as patch2.displaced.w4. [dim]\[default: the exact plan for the devices][/dim]",
            show_default=False,
            rich_help_panel=options.DIVISION,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FOLDER",
            help="Where to write index.html, a page with pictures and plots that needs nothing else, and report.json, "
            "the raw rows. The first seed is traced for it.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    trace: options.Trace = None,
    bfloat16_floor: Annotated[
        bool,
        typer.Option(
            "--bfloat16-floor",
            help="Also draw the first pictures on one device in bfloat16, to see what half precision changes.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    answer: options.AnswerFormat = options.Format.TEXT,
    psnr: Annotated[float | None, _limit("--min-psnr", "Of every picture, in dB.")] = None,
    ssim: Annotated[float | None, _limit("--min-ssim", "Of every picture, up to 1.")] = None,
    ms_ssim: Annotated[float | None, _limit("--min-ms-ssim", "Of every picture, up to 1.")] = None,
    latent_error: Annotated[
        float | None, _limit("--max-latent-error", "Relative error of every seed's last latents.")
    ] = None,
    seam: Annotated[float | None, _limit("--max-seam", "Seam score at any border; 1 means no seam.")] = None,
    agreement: Annotated[
        float | None, _limit("--min-agreement", "demo: share of attributes that are read alike, up to 1.")
    ] = None,
    frechet: Annotated[
        float | None, _limit("--max-frechet", "demo: Frechet distance of all pictures to those of one device.")
    ] = None,
) -> None:
    """Draw the same seeds by a plan and on one device, and measure every difference.

    Exit status: 0 if every limit was kept (or there was none), 1 if one was missed, 2 if the command cannot work.

    [bold]Examples[/bold]

    distrifusion verify demo --plan patch2.displaced.w4 --size 512x512 --seeds 0-7 --report out/

    distrifusion verify demo --plan cfg2 --seeds 0 --min-psnr 60
    """
    given = {
        "psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "latent_error": latent_error,
        "seam": seam, "agreement": agreement, "frechet": frechet,
    }  # fmt: skip
    limits = {key: limit for key, limit in given.items() if limit is not None}
    call = {"negative_prompt": negative_prompt, "num_inference_steps": steps, "guidance_scale": guidance}
    wish = Wish(model, devices, plan, size, scheduler, dtype, call)
    with spoken_errors(), early_server(wish):
        quiet_libraries()
        task = _task(wish, _seeds(seeds), _prompts(model, prompt, prompts), bfloat16_floor, bool(report or trace))
        _check_limits(limits, task)
        _check_outputs(report, trace)
        passed = _verify(task, limits, report, trace, answer, _command(context))
    if not passed:
        raise typer.Exit(FAILED)


def _verify(
    task: Task,
    limits: dict[str, float],
    report: Path | None,
    trace: Path | None,
    answer: options.Format,
    command: str,
) -> bool:
    """Draw, measure and tell; False if a limit was missed."""
    from distrifusion.quality import measures, summary
    from distrifusion.quality import report as reports
    from distrifusion.quality.recording import Shelf
    from distrifusion.quality.verify import verify as draw_and_measure

    with tempfile.TemporaryDirectory(prefix="distrifusion-") as folder:
        shelf = Shelf(Path(folder))
        outcome = draw_and_measure(task, shelf, cancelled_by_ctrl_c)
        pictures = {result.seed: result.values for result in outcome.results}
        verdict = summary.Verdict(limits, measures.misses(limits, pictures, outcome.together))
        circumstances = reports.Circumstances.of(outcome, command)
        page = reports.write(report, outcome, verdict, circumstances, shelf) if report else None
    if trace is not None and outcome.timeline is not None:
        outcome.timeline.write(trace)
    if answer is options.Format.JSON:
        typer.echo(json.dumps(reports.data(outcome, verdict, circumstances), indent=1))
    else:
        count = len(task.seeds)
        typer.echo(f"{task.plan} against one device, {task.source}, {count} picture{'s' * (count > 1)}")
        typer.echo(summary.text(outcome, verdict))
        if page:
            typer.echo(f"report: {page}")
        if trace and outcome.timeline:
            typer.echo(f"{outcome.timeline.text()}\ntrace: {trace}")
        if verdict.passed is not None:
            typer.echo("passed" if verdict.passed else "missed")
    return verdict.passed is not False


def _task(wish: Wish, seeds: tuple[int, ...], prompts: tuple[str, ...], bfloat16_floor: bool, traced: bool) -> Task:
    """What to draw, checked before any weight is read.

    Raises:
        ConfigError, PlanError: if a part of the wish cannot work.
    """
    from distrifusion.plan import Plan
    from distrifusion.quality.verify import Task
    from distrifusion.runtime.devices import resolve

    refuse_torchrun("verify")
    if wish.plan is None and wish.devices is None:
        raise ConfigError("verify compares a plan with one device; say --plan, --devices, or both")
    if wish.makes_video():
        raise ConfigError(
            f"verify measures pictures, and '{wish.model}' makes videos; distrifusion run --compare measures one"
        )
    arguments = wish.arguments()
    where, plan = resolve(wish.device_spec(), None if wish.plan is None else Plan.parse(wish.plan))
    half = dtype_keyword("bfloat16") if bfloat16_floor else None
    keywords = dtype_keyword(wish.dtype)
    return Task(wish.model, where, plan, seeds, prompts, arguments, wish.scheduler_class(), keywords, half, traced)


def _seeds(text: str) -> tuple[int, ...]:
    """Seeds from `0-7` or `1,5,9-12`."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ConfigError(f"seeds '{text}': '{part.strip()}' is neither a number nor a range such as 0-7")
        first, last = options.check_seed(int(match[1])), options.check_seed(int(match[2] or match[1]))
        if last < first or last - first >= _MAX_SEEDS:
            raise ConfigError(f"seeds '{text}': the range {first}-{last} is empty or above {_MAX_SEEDS} pictures")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds '{text}' names a seed twice")
    return tuple(seeds)


def _prompts(model: str, prompt: str | None, file: Path | None) -> tuple[str, ...]:
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --prompts are both given; keep one")
    if prompt is not None:
        return (prompt,)
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = tuple(line for line in lines if line)
        if not found:
            raise ConfigError(f"there is no prompt in '{file}'; write one a line")
        return found
    if demo.find(model) is None:
        raise ConfigError(f"'{model}' has no prompts of its own; say --prompt, or --prompts and a file")
    from distrifusion.quality.landscapes import PROMPTS

    return tuple(PROMPTS)


def _check_limits(limits: dict[str, float], task: Task) -> None:
    """Refuse a limit on what cannot be measured here, before anything is drawn."""
    from distrifusion.layout.mesh import RankGrid
    from distrifusion.quality import measures, metrics

    measures.check_limits(limits)
    sides = [task.arguments[side] for side in ("width", "height") if side in task.arguments]
    if "ms_ssim" in limits and sides and min(sides) < metrics.MS_SSIM_PIXELS:
        raise ConfigError(f"--min-ms-ssim needs pictures of at least {metrics.MS_SSIM_PIXELS} pixels a side")
    if not task.is_demo and limits.keys() & {"agreement", "frechet"}:
        raise ConfigError("--min-agreement and --max-frechet are for the demo models, which have a classifier")
    if "frechet" in limits and len(task.seeds) < 2:
        raise ConfigError("--max-frechet needs at least two seeds")
    # Ranks of a call without guidance take bands.
    num_rows = 2 if task.arguments.get("guidance_scale", 2) > 1 else 1
    if "seam" in limits and RankGrid(task.plan, 0).num_bands(num_rows) == 1:
        raise ConfigError(f"--max-seam needs a plan that cuts the picture, and '{task.plan}' does not")


def _check_outputs(folder: Path | None, trace: Path | None) -> None:
    from distrifusion.timeline import check_trace_path

    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--report '{folder}' is a file; name a folder")
    if folder is not None:
        # Now, not after an hour of pictures.
        folder.mkdir(parents=True, exist_ok=True)
    if trace is not None:
        check_trace_path(trace)


def _command(context: typer.Context) -> str:
    """What was typed, to be repeated."""
    words = ["distrifusion", str(context.info_name)]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[parameter.name or ""]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        else:
            words += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    return shlex.join(words)
