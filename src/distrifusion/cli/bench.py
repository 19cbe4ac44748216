"""`distrifusion bench`: plans against a plain diffusers pipeline, by turns in one run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrifusion.cli import options
from distrifusion.cli.drawing import Wish, dtype_keyword, quiet_libraries, refuse_torchrun
from distrifusion.cli.spoken import FAILED, spoken_errors
from distrifusion.errors import ConfigError, DistrifusionError

if TYPE_CHECKING:
    from distrifusion.bench.cases import Case, Row
    from distrifusion.bench.measuring import Order


def bench(
    model: options.Model,
    devices: Annotated[
        str, typer.Option("--devices", "-d", metavar="NUMBERS", help="How many, such as 1,2 or 1,2,4.")
    ] = "1,2",
    sizes: Annotated[
        str,
        typer.Option("--sizes", metavar="SIZES", help="In pixels, such as 512,1024 (squares) or 768x512."),
    ] = "512",
    plans: Annotated[
        str,
        typer.Option(
            "--plans", metavar="PLANS", help="Such as auto,cfg2,patch2.displaced; auto is weighed for each number."
        ),
    ] = "auto",
    steps: options.Steps = 20,
    repeat: Annotated[int, typer.Option("--repeat", metavar="N", help="Runs of every row after one to warm up.")] = 5,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where the rows, tables and plots go.")
    ] = Path("bench"),
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", show_default=False,
            help=r"What to draw. [dim]\[default: a landscape, for embedded models][/dim]",
        ),
    ] = None,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the noise.")] = 0,
    dtype: options.Dtype = "float32",
    fidelity: options.WishedFidelity = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", show_default=False,
            help=r"Of every CPU rank, and of the plain pipeline. [dim]\[default: cores by the most devices][/dim]",
        ),
    ] = None,
    ceiling: Annotated[
        bool,
        typer.Option("--ceiling/--no-ceiling", help="Also measure what devices reach that draw a picture each."),
    ] = True,
    traces: Annotated[
        bool, typer.Option("--traces", help="At last trace a run of every plan, into the folder traces.")
    ] = False,
) -> None:  # fmt: skip
    """Measure plans, the machine's ceiling and a plain diffusers pipeline in turn, and write rows, tables and plots.

    A row that fails stays in the table with its reason; the exit status is then 1.

    [bold]Example[/bold]

    distrifusion bench demo --devices 1,2 --sizes 256,512 --plans auto,cfg2,patch2.displaced --out results/
    """
    with spoken_errors():
        refuse_torchrun("bench")
        quiet_libraries()
        call = _call(model, prompt, steps, guidance)
        order = _order(model, call, _numbers(devices), seed, dtype, repeat, threads, out / "traces" if traces else None)
        cases = _cases(order, plans, _numbers(devices), sizes, ceiling, dtype)
        failed = _measure(order, cases, fidelity or "exact", out)
    if failed:
        raise typer.Exit(FAILED)


def _measure(order: Order, cases: list[Case], fidelity: str, out: Path) -> bool:
    """Measure and write; True if a row failed."""
    from distrifusion.bench import plots, report
    from distrifusion.bench.measuring import measure
    from distrifusion.doctor.machine import devices_in_words

    out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of pictures
    cases, counted = _expected(order, cases, fidelity)
    rows: list[Row] = measure(order, cases, lambda text: typer.echo(text, err=True))
    for row, known in zip(rows, counted, strict=True):
        row.counted = known
    command = shlex.join(["distrifusion", *sys.argv[1:]])
    circumstances = report.Circumstances.here(command, devices_in_words(order.where, order.threads), order.threads)
    lines = report.write(out, rows, circumstances)
    drawn = plots.draw(lines, out)
    typer.echo((out / "bench.md").read_text(encoding="utf-8"))
    typer.echo(
        f"rows: {out / 'bench.json'}, {out / 'bench.csv'}; {len(drawn)} plots" + ("" if drawn else " (no matplotlib)")
    )
    return any(line["status"] != "ok" for line in lines)


def _expected(order: Order, cases: list[Case], fidelity: str) -> tuple[list[Case], list[dict[str, Any]]]:
    """The cases with the plans that `auto` takes, and what is expected of each."""
    from distrifusion.bench.cases import AUTO
    from distrifusion.bench.expecting import Expectations
    from distrifusion.planner.auto import fidelity as wish_of

    wish = wish_of(fidelity)
    try:
        known = Expectations(order, wish)
    except DistrifusionError as error:
        if any(case.label == AUTO for case in cases):
            raise
        typer.echo(f"nothing is predicted: {error}", err=True)
        return cases, [{} for _ in cases]
    chosen = [known.chosen(case) for case in cases]
    return chosen, [known.of(case) for case in chosen]


def _cases(order: Order, plans: str, counts: list[int], sizes: str, ceiling: bool, dtype: str) -> list[Case]:
    from distrifusion.bench.cases import CEILING, PLAIN, Case, plans_for
    from distrifusion.plan import Plan
    from distrifusion.runtime.source import find

    named = plans_for([word.strip() for word in plans.split(",") if word.strip()], counts)
    found = find(order.model, order.keywords)
    for _, plan, _ in named:
        if plan is not None:
            found.check_plan(plan)
    cases = []
    for text in sizes.split(","):
        size = options.size(text if "x" in text.lower() else f"{text.strip()}x{text.strip()}")
        # Checked against the pipeline's class, before any weight is read.
        Wish(order.model, None, None, f"{size[0]}x{size[1]}", None, dtype, dict(order.call)).arguments()
        cases.append(Case(PLAIN, None, 1, size))
        cases += [Case(CEILING, Plan(dp=n), n, size) for n in counts if n > 1 and ceiling]
        cases += [Case(label, plan, n, size) for label, plan, n in named]
    return cases


def _order(
    model: str, call: dict[str, Any], counts: list[int], seed: int, dtype: str, repeat: int, threads: int | None,
    traces: Path | None,
) -> Order:  # fmt: skip
    from distrifusion.bench.measuring import Order
    from distrifusion.runtime.devices import resolve, threads_per_rank

    if repeat < 1:
        raise ConfigError(f"--repeat {repeat}: at least one run is measured")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: at least one")
    where, _ = resolve(max(counts), None)
    keywords = dtype_keyword(dtype)
    each = threads or threads_per_rank(where)
    return Order(model, call, options.check_seed(seed), keywords, where, each, repeat, traces)


def _call(model: str, prompt: str | None, steps: int, guidance: float | None) -> dict[str, Any]:
    from distrifusion.demo import MODELS
    from distrifusion.quality.landscapes import PROMPTS

    if prompt is None and model not in MODELS:
        raise ConfigError(f"'{model}' has no prompts of its own; say --prompt")
    call = {"prompt": prompt or next(iter(PROMPTS)), "num_inference_steps": steps, "guidance_scale": guidance}
    return {name: value for name, value in call.items() if value is not None}


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"devices '{text}' are no numbers such as 1,2") from None
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"devices '{text}': numbers of at least 1, each once")
    return numbers
