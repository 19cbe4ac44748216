"""How many denoiser calls parallel-in-time samplers need, and how many evaluations that is; and what the clock says.

    python benchmarks/parallel_in_time.py digits   # a network trained here, exact tables: a few minutes
    python benchmarks/parallel_in_time.py demo --steps 100 --seed 0    # the embedded model at 256 px; adds to its rows
    python benchmarks/parallel_in_time.py displaced --bands 4 --seed 0    # bands with old values in a window; adds, too
    python benchmarks/parallel_in_time.py clock    # the embedded model on two ranks beside one
    python benchmarks/parallel_in_time.py clock --bands 2    # on bands with old values; adds, too
    python benchmarks/parallel_in_time.py plot     # distance against calls, from the rows of the first two

A kind writes its rows to benchmarks/results/parallel_NAME.json and prints its tables. Distances are relative (L2)
to the sequential sampler of the same scheduler, seed and noise. Counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import nullcontext
from typing import Any

import digits
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from parallel_tables import REPORTS, RESULTS, Row, load, plot, report

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

_PROMPTS = ("a sunset over green mountains with a lake and pine trees", "a night with a moon over snowy mountains")


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float(f"{(x - reference).norm() / reference.norm():.3g}")


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


def demo_rows(num_steps: int, seed: int, windows: tuple[int, ...], methods: tuple[Method, ...]) -> list[Row]:
    """The embedded model at 256x256 with guidance 5, DDIM; every call's estimate against the sequential sampler."""
    pipe, prompt = _demo_pipeline(), _PROMPTS[seed]
    reference = _draw(pipe, prompt, seed, num_steps)
    picture = _decode(pipe, reference)
    rows = []
    for window in windows:
        for method in methods if window <= num_steps else ():
            row = _demo_case(pipe, prompt, seed, num_steps, window, method, reference, picture)
            rows.append(row)
            write("demo", rows)  # every case takes a while
    return rows


def displaced_rows(num_steps: int, seed: int, bands: int) -> list[Row]:
    """Displaced bands inside windows of ten and of all steps, beside displaced stepping, on virtual ranks."""
    from fidelity import on_virtual_rank

    from distrifusion import Plan
    from distrifusion.exchange.transport import Transport
    from distrifusion.exchange.virtual import VirtualWorld
    from distrifusion.in_place import denoiser_of

    pipe, prompt = _demo_pipeline(), _PROMPTS[seed]
    reference = _draw(pipe, prompt, seed, num_steps)
    picture = _decode(pipe, reference)
    rows = []
    solving = {"sampler": "picard", "tolerance": 1e-4}
    ways = (("displaced.w4", {}), ("displaced.w0", {**solving, "window": 10}), ("displaced.w0", solving))
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
        rows.append(row)
        write("displaced", rows)
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
        return tensors

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        counted["rows"] += len(inputs[0]) // 2  # two branches of guidance

    counting = pipe.unet.conv_in.register_forward_pre_hook(count)
    _draw(pipe, prompt, seed, num_steps, sampler=str(method), window=window, callback_on_step_end=look)
    counting.remove()
    row = {"steps": num_steps, "window": window, "method": str(method), "seed": seed, "calls": len(distances)}
    return {**row, **counted, "distances": distances, "psnr": decibels}


def clock_rows(repetitions: int, bands: int | None) -> list[Row]:
    """Seconds of the loop on ranks of one thread.

    Args:
        bands: ranks that have a band with old values each; None: two ranks, exact, and one step by step.
    """

    def picard(window: int, **more: Any) -> Row:
        return {"sampler": "picard", "window": window, **more}

    ways: list[tuple[str, int, Row]]
    if bands is None:
        ways = [("patch1", 1, {}), *(("cfg2", 2, words) for words in ({}, picard(10), picard(50)))]
        ways += [("dp2", 2, picard(10)), ("patch1", 1, picard(50))]
    else:
        ways = [(f"patch{bands}.displaced.w4", bands, {})]
        ways += [(f"patch{bands}.displaced.w0", bands, picard(window, tolerance=1e-4)) for window in (10, 50)]
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


# What tells the rows of one invocation from those of another, which are kept.
_PARTS = {
    "demo": ("steps", "window", "method", "seed"),
    "displaced": ("plan", "sampler", "window", "steps", "seed"),
    "clock": ("plan", "sampler", "window"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*REPORTS, "plot"])
    parser.add_argument("--steps", type=int, default=50, help="of demo and displaced")
    parser.add_argument("--seed", type=int, default=0, choices=range(len(_PROMPTS)), help="and prompt, of both")
    parser.add_argument("--windows", default="10,20,50,100", help="of the demo")
    parser.add_argument("--methods", default=",".join(Method), help="of the demo")
    parser.add_argument("--bands", type=int, help="of displaced (2 if not said) and clock")
    parser.add_argument("--repetitions", type=int, default=3, help="of the clock")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kind == "plot":
        plot()
        return
    windows = tuple(int(window) for window in options.windows.split(","))
    methods = tuple(Method(method) for method in options.methods.split(","))
    rows = {
        "digits": digit_rows,
        "demo": lambda: demo_rows(options.steps, options.seed, windows, methods),
        "displaced": lambda: displaced_rows(options.steps, options.seed, options.bands or 2),
        "clock": lambda: clock_rows(options.repetitions, options.bands),
    }[options.kind]()
    report(write(options.kind, rows))


def write(kind: str, rows: list[Row]) -> Row:
    """Write the rows, with those of other invocations, and give the document."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    document = {"options": {"parallel_in_time": kind}, "versions": versions, "rows": merged(kind, rows)}
    (RESULTS / f"parallel_{kind}.json").write_text(json.dumps(document, indent=1) + "\n")
    return document


def merged(kind: str, rows: list[Row]) -> list[Row]:
    """The rows with those of other invocations, for kinds that take several."""
    if kind not in _PARTS or not (RESULTS / f"parallel_{kind}.json").exists():
        return rows

    def part(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in _PARTS[kind])

    new = {part(row) for row in rows}
    kept = [row for row in load(kind)["rows"] if part(row) not in new]
    return sorted([*kept, *rows], key=lambda row: [f"{v:09}" if isinstance(v, int) else str(v) for v in part(row)])


if __name__ == "__main__":
    main()
