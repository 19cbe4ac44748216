"""How many denoiser calls parallel-in-time samplers need, and how many evaluations that is; and what the clock says.

    python benchmarks/parallel_in_time.py digits   # a network trained here, exact tables: a few minutes
    python benchmarks/parallel_in_time.py demo --steps 100 --seed 0    # the embedded model at 256 px; adds to its rows
    python benchmarks/parallel_in_time.py displaced --bands 4 --seed 0    # bands with old values in a window; adds, too
    python benchmarks/parallel_in_time.py clock    # the embedded model on two ranks beside one
    python benchmarks/parallel_in_time.py plot     # distance against calls, from the rows of the first two

A kind writes its rows to benchmarks/results/parallel_NAME.json and prints its tables. Distances are relative (L2)
to the sequential sampler of the same scheduler, seed and noise. Counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import digits
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import distrifusion
import distrifusion.demo
from distrifusion.engine.run import sampled
from distrifusion.quality.metrics import psnr
from distrifusion.samplers.diffusers_loop import diffusers_loop
from distrifusion.samplers.evaluations import Evaluations, Sampler, drive
from distrifusion.samplers.knobs import Knobs, Method, knobs_of
from distrifusion.samplers.noise import SeededNoise
from distrifusion.samplers.schedules import tableau_of
from distrifusion.samplers.tableau import Split
from distrifusion.samplers.window import solve

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
_PLOT = _ROOT / "docs" / "images" / "parallel-in-time.webp"
_NEAR = 1e-3
_PROMPTS = ("a sunset over green mountains with a lake and pine trees", "a night with a moon over snowy mountains")
Row = dict[str, Any]


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float(f"{(x - reference).norm() / reference.norm():.3g}")


def calls_within(distances: list[float], bound: float) -> int | None:
    """The first call from which on all estimates are within a bound; None if there is none."""
    far = [i for i, distance in enumerate(distances) if not distance <= bound]
    first = far[-1] + 1 if far else 0
    return first + 1 if first < len(distances) else None


def watched(sampler: Sampler, reference: torch.Tensor, distances: list[float]) -> Sampler:
    """The sampler, with the distance of its estimate after every call noted."""
    wanted: Evaluations = next(sampler)
    while True:
        answer = yield wanted
        try:
            wanted = sampler.send(answer)
        except StopIteration as stop:
            distances.append(relative(stop.value.x, reference))
            return stop.value
        distances.append(relative(wanted.estimate, reference))


def digit_rows() -> list[Row]:
    """Every split and method on the digits network with guidance 2, three digits each."""
    began = time.perf_counter()
    model = digits.train()
    print(f"trained in {time.perf_counter() - began:.0f} s")
    cases = [(name, n, split, None) for name in ("ddim", "ddpm") for n in (25, 50, 100) for split in Split]
    cases += [("ddim", 100, Split.DATA, window) for window in (10, 20, 50)]
    return [row for case in cases for method in Method for row in _digit_case(model, method, *case)]


def _digit_case(
    model: digits.DigitDenoiser, method: Method, name: str, num_steps: int, split: Split, window: int | None
) -> list[Row]:
    common = {"steps_offset": 1, **digits.BETAS}
    scheduler = (
        DDIMScheduler(**common, set_alpha_to_one=False)
        if name == "ddim"
        else DDPMScheduler(**common, timestep_spacing="leading")
    )
    scheduler.set_timesteps(num_steps)
    rows = []
    for seed, digit in enumerate((0, 3, 6)):
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        denoise, noise = digits.guided(model, torch.tensor([digit])), SeededNoise([100 + seed])
        reference = drive(diffusers_loop(x, scheduler, noise), denoise).x
        distances: list[float] = []
        knobs: Knobs = knobs_of(method, split=split, window=window)
        sample = drive(watched(solve(x, tableau_of(scheduler), noise, knobs), reference, distances), denoise)
        row = {"scheduler": name, "steps": num_steps, "split": str(split), "window": window, "method": str(method)}
        rows.append({**row, "seed": seed, "calls": sample.calls, "rows": sample.rows, "distances": distances})
    return rows


def demo_rows(num_steps: int, seed: int, windows: tuple[int, ...]) -> list[Row]:
    """The embedded model at 256x256 with guidance 5, DDIM; every call's estimate against the sequential sampler."""
    pipe, prompt = _demo_pipeline(), _PROMPTS[seed]
    reference = _draw(pipe, prompt, seed, num_steps)
    picture = _decode(pipe, reference)
    rows = []
    for window in windows:
        for method in Method if window <= num_steps else ():
            row = _demo_case(pipe, prompt, seed, num_steps, window, method, reference, picture)
            print(row["method"], num_steps, window, row["calls"], row["rows"], flush=True)
            rows.append(row)
    return rows


def displaced_rows(num_steps: int, seed: int, bands: int) -> list[Row]:
    """Displaced bands inside a window of all steps, beside displaced stepping, on virtual ranks; as for the demo."""
    from fidelity import on_virtual_rank

    from distrifusion import Plan
    from distrifusion.exchange.transport import Transport
    from distrifusion.exchange.virtual import VirtualWorld
    from distrifusion.in_place import denoiser_of

    pipe, prompt = _demo_pipeline(), _PROMPTS[seed]
    reference = _draw(pipe, prompt, seed, num_steps)
    picture = _decode(pipe, reference)
    rows = []
    ways = (
        ("displaced.w4", {}),
        ("displaced.w0", {"sampler": "picard", "tolerance": 1e-4}),
        ("sync", {"sampler": "picard"}),
    )
    for policy, words in ways:
        plan = Plan.parse(f"patch{bands}.{policy}")

        def work(transport: Transport, plan: Plan = plan, words: Row = words) -> tuple[torch.Tensor, int, int]:
            own = on_virtual_rank(pipe, plan, transport)
            calls: list[int] = []
            most = [0]

            def count(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                calls.append(step)
                most[0] = max(most[0], denoiser_of(own).pool.num_bytes)
                return tensors

            return _draw(own, prompt, seed, num_steps, callback_on_step_end=count, **words), len(calls), most[0]

        latents, calls, kept = VirtualWorld(plan.num_ranks).run(work)[0]
        row = {"plan": str(plan), **words, "steps": num_steps, "seed": seed, "calls": calls, "bytes_kept": kept}
        row |= {"distance": relative(latents, reference), "psnr": min(psnr(_decode(pipe, latents), picture), 99.0)}
        print(row, flush=True)
        rows.append(row)
    return rows


def _demo_pipeline() -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(distrifusion.demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: Any, prompt: str, seed: int, num_steps: int, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    arguments = {"prompt": prompt, "height": 256, "width": 256, "guidance_scale": 5.0, "output_type": "latent"}
    arguments |= {"num_inference_steps": num_steps, "generator": generator, **more}
    # A parallelized pipeline knows samplers itself.
    plain = nullcontext(arguments) if hasattr(pipe, "_distrifusion") else sampled(pipe, (), arguments)
    with plain as own:
        latents: torch.Tensor = pipe(**own).images
    return latents


@torch.no_grad()
def _decode(pipe: Any, latents: torch.Tensor) -> Any:
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]


def _demo_case(
    pipe: Any,
    prompt: str,
    seed: int,
    num_steps: int,
    window: int,
    method: Method,
    reference: torch.Tensor,
    picture: Any,
) -> Row:
    distances: list[float] = []
    decibels: list[float] = []
    counted = {"rows": 0}

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        distances.append(relative(tensors["latents"], reference))
        # Decoding takes time: what is this far is no picture of 30 dB, what is this near is one of 40.
        decibels.append(
            0.0
            if distances[-1] > 0.3
            else min(psnr(_decode(pipe, tensors["latents"]), picture), 99.0)
            if distances[-1] > 1e-3
            else 99.0
        )
        counted["rows"] += len(tensors["noise_pred"])
        return tensors

    _draw(
        pipe, prompt, seed, num_steps, sampler=str(method), window=window, callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
    )  # fmt: skip
    row = {"steps": num_steps, "window": window, "method": str(method), "seed": seed, "calls": len(distances)}
    return {**row, **counted, "distances": distances, "psnr": decibels}


def clock_rows(repetitions: int) -> list[Row]:
    """Seconds of the loop on two ranks of one thread, of each way beside the sequential one on one rank."""
    ways = [("patch1", 1, {}), ("cfg2", 2, {})]
    ways += [("cfg2", 2, {"sampler": "picard", "window": window}) for window in (10, 50)]
    ways += [("dp2", 2, {"sampler": "picard", "window": 10}), ("patch1", 1, {"sampler": "picard", "window": 50})]
    rows = []
    for plan, devices, words in ways:
        with distrifusion.load("demo", ["cpu"] * devices, plan, threads=1) as pipe:
            pipe.set_progress_bar_config(disable=True)
            for repetition in range(repetitions + 1):
                pipe(
                    _PROMPTS[0], height=256, width=256, guidance_scale=5.0, output_type="latent",
                    num_inference_steps=2 if repetition == 0 else 50, generator=torch.Generator().manual_seed(0),
                    **(words if repetition else {}),
                )  # fmt: skip
                assert pipe.last_run is not None
                if repetition:
                    row = {"plan": plan, "devices": devices, **words, "calls": len(pipe.last_run.steps)}
                    rows.append({**row, "seconds": pipe.last_run.total})
    return rows


def report_digits(rows: list[Row]) -> None:
    """Calls, rows evaluated and the worst distance of every split and method; then windows."""
    print("| steps | split | calls, Picard | TAA | rows, Picard | TAA | calls to 1e-3, Picard | TAA | worst distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    whole = [row for row in rows if row["window"] is None]
    for key in dict.fromkeys((row["scheduler"], row["steps"], row["split"]) for row in whole):
        own = [row for row in whole if (row["scheduler"], row["steps"], row["split"]) == key]
        print(f"| {key[0].upper()}-{key[1]} | {key[2]} | {_cells(own)} | {max(r['distances'][-1] for r in own):.0e} |")
    print()
    print("| DDIM-100, window | calls, Picard | TAA | rows, Picard | TAA | calls to 1e-3, Picard | TAA |")
    print("|---|---|---|---|---|---|---|")
    wide = [row for row in rows if (row["scheduler"], row["steps"], row["split"]) == ("ddim", 100, "data")]
    for window in (10, 20, 50, None):
        print(f"| {window or 'all'} | {_cells([row for row in wide if row['window'] == window])} |")


def _cells(rows: list[Row]) -> str:
    """Medians over seeds of Picard and TAA side by side: calls, rows, calls until near."""
    measures = (
        lambda row: row["calls"],
        lambda row: row["rows"],
        lambda row: calls_within(row["distances"], _NEAR) or row["calls"],
    )
    cells = [
        f"{statistics.median(measure(row) for row in rows if row['method'] == method):g}"
        for measure in measures
        for method in Method
    ]
    return " | ".join(cells)


def report_demo(rows: list[Row]) -> None:
    """Calls until the picture is near, for every window."""
    print("| steps | window | method | calls | rows | calls to 30 dB | 40 dB | distance 1e-3 | worst distance |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["steps"], row["window"], row["method"]) for row in rows):
        own = [row for row in rows if (row["steps"], row["window"], row["method"]) == key]
        counts = [statistics.median(row[name] for row in own) for name in ("calls", "rows")]
        for bound in (30, 40):
            counts.append(statistics.median(calls_within([-d for d in row["psnr"]], -bound) or 999 for row in own))
        counts.append(statistics.median(calls_within(row["distances"], _NEAR) or 999 for row in own))
        window = "all" if key[0] == key[1] else key[1]
        cells = " | ".join("-" if count >= 999 else f"{count:g}" for count in counts)
        print(f"| {key[0]} | {window} | {key[2]} | {cells} | {max(row['distances'][-1] for row in own):.0e} |")


def report_clock(rows: list[Row]) -> None:
    """Seconds beside the sequential sampler's on one rank."""
    alone = statistics.median(row["seconds"] for row in rows if row["devices"] == 1 and "sampler" not in row)
    print("| plan | sampler | calls | seconds, median (range) | of one rank, step by step |")
    print("|---|---|---|---|---|")
    for key in dict.fromkeys((row["plan"], row.get("sampler"), row.get("window")) for row in rows):
        own = [row for row in rows if (row["plan"], row.get("sampler"), row.get("window")) == key]
        seconds = [row["seconds"] for row in own]
        middle = statistics.median(seconds)
        sampler = "step by step" if key[1] is None else f"{key[1]}, window {key[2]}"
        span = f"{min(seconds):.1f} to {max(seconds):.1f}"
        print(f"| `{key[0]}` | {sampler} | {own[0]['calls']} | {middle:.1f} ({span}) | {alone / middle:.2f}x |")


def report_displaced(rows: list[Row]) -> None:
    """Nearness, calls and memory of displaced bands, stepping and in a window."""
    print("| plan | sampler | calls | PSNR | distance | MB kept per rank |")
    print("|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["plan"], row.get("sampler", "step by step")) for row in rows):
        own = [row for row in rows if (row["plan"], row.get("sampler", "step by step")) == key]
        calls, decibels, kept = (
            statistics.median(row[name] for row in own) for name in ("calls", "psnr", "bytes_kept")
        )
        away = max(row["distance"] for row in own)
        print(f"| `{key[0]}` | {key[1]} | {calls:g} | {decibels:.1f} | {away:.0e} | {kept / 1e6:.0f} |")


def plot() -> None:
    """Distance to the sequential sample after every call: digits by split and method, demo by window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colours = dict(zip(Split, ("tab:green", "tab:blue", "tab:orange"), strict=True))
    for row in load("digits")["rows"]:
        if (row["scheduler"], row["steps"], row["window"], row["seed"]) == ("ddim", 100, None, 0):
            line = "-" if row["method"] == Method.TAA else ":"
            name = f"{row['split']}, {row['method']}"
            panels[0].semilogy(
                range(1, row["calls"] + 1), row["distances"], line, color=colours[row["split"]], label=name
            )
    panels[0].set_title("digits network, DDIM-100, whole trajectory")
    for row in load("demo")["rows"]:
        if (row["steps"], row["seed"]) == (100, 0):
            line = "-" if row["method"] == Method.TAA else ":"
            colour = {10: "tab:red", 20: "tab:purple", 50: "tab:brown", 100: "tab:orange"}[row["window"]]
            name = f"window {row['window']}, {row['method']}"
            panels[1].semilogy(range(1, row["calls"] + 1), row["distances"], line, color=colour, label=name)
    panels[1].set_title("embedded model, 256 px, DDIM-100, data split")
    for panel in panels:
        panel.axhline(_NEAR, color="0.7", linewidth=0.8)
        panel.set_xlabel("denoiser calls")
        panel.legend(fontsize=7)
    panels[0].set_ylabel("distance to the sequential sample")
    figure.savefig(_PLOT, pil_kwargs={"quality": 80})


def load(name: str) -> Row:
    """The document of one kind."""
    document: Row = json.loads((_RESULTS / f"parallel_{name}.json").read_text())
    return document


REPORTS = {"digits": report_digits, "demo": report_demo, "displaced": report_displaced, "clock": report_clock}
# What tells the rows of one invocation from those of another, which are kept.
_PARTS = {"demo": ("steps", "window", "seed"), "displaced": ("plan", "sampler", "steps", "seed")}


def report(document: Row) -> None:
    """Print the tables of a document."""
    REPORTS[document["options"]["parallel_in_time"]](document["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*REPORTS, "plot"])
    parser.add_argument("--steps", type=int, default=50, help="of demo and displaced")
    parser.add_argument("--seed", type=int, default=0, choices=range(len(_PROMPTS)), help="and prompt, of both")
    parser.add_argument("--windows", default="10,20,50,100", help="of the demo")
    parser.add_argument("--bands", type=int, default=2, help="of displaced")
    parser.add_argument("--repetitions", type=int, default=3, help="of the clock")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kind == "plot":
        plot()
        return
    windows = tuple(int(window) for window in options.windows.split(","))
    rows = {
        "digits": digit_rows,
        "demo": lambda: demo_rows(options.steps, options.seed, windows),
        "displaced": lambda: displaced_rows(options.steps, options.seed, options.bands),
        "clock": lambda: clock_rows(options.repetitions),
    }[options.kind]()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    document = {"options": {"parallel_in_time": options.kind}, "versions": versions, "rows": merged(options.kind, rows)}
    (_RESULTS / f"parallel_{options.kind}.json").write_text(json.dumps(document, indent=1) + "\n")
    report(document)


def merged(kind: str, rows: list[Row]) -> list[Row]:
    """The rows with those of other invocations, for kinds that take several."""
    if kind not in _PARTS or not (_RESULTS / f"parallel_{kind}.json").exists():
        return rows

    def part(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in _PARTS[kind])

    new = {part(row) for row in rows}
    kept = [row for row in load(kind)["rows"] if part(row) not in new]
    return sorted([*kept, *rows], key=lambda row: json.dumps([str(value).rjust(30) for value in part(row)]))


if __name__ == "__main__":
    main()
