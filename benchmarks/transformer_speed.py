"""How much faster plans run a random FLUX-shaped transformer than one process, against the ceiling of this machine.

    python benchmarks/transformer_speed.py --repeat 5 --out benchmarks/results/transformer_speed.json

Every repetition times, one after the other in the same processes: one rank alone, all ranks at once on whole calls (how
much they slow each other gives the ceiling of any speed-up here), and steps of every plan: a call, and what Euler's
method makes of it. Every rank has one thread; fp32. Speed-ups are of the median step after the first, medians over
repetitions with their range. Steps of pieces (`pipe<N>.m<M>`) overlap: theirs are all after the warm-up until the last
latents are there, by their number; `--apart` waits for each. `own work` is CPU time of rank 0 in a step against half of
one device's: what other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import FluxTransformer2DModel
from speed import free_port, join, span

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.transport import Transport
from distrifusion.layout.partition import split_evenly

PLANS = ("patch{n}", "patch{n}.displaced.w0", "patch{n}.delta8", "ulysses{n}", "ring{n}")
STEP = 0.01
HEADS, HEAD, OUT, SITES = 4, 128, 64, 4


def flux_shaped_transformer() -> FluxTransformer2DModel:
    """FLUX's layout at 512 channels in heads 128 wide, one block of two streams and three of one, random weights."""
    torch.manual_seed(0)
    config = {
        "num_layers": 1, "num_single_layers": SITES - 1, "attention_head_dim": HEAD, "num_attention_heads": HEADS,
        "joint_attention_dim": 256, "pooled_projection_dim": 64, "in_channels": OUT,
    }  # fmt: skip
    return FluxTransformer2DModel(**config).eval()


def inputs(rows: int, words: int) -> dict[str, Any]:
    """Arguments of a call for a picture of rows times rows tokens."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(rows), indexing="ij"), -1).reshape(-1, 2)
    return {
        "hidden_states": torch.randn(1, rows * rows, OUT, generator=generator),
        "encoder_hidden_states": torch.randn(1, words, 256, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], 1),
        "txt_ids": torch.zeros(words, 3),
    }


class Sampler:
    """Euler's method from the latents of some arguments on.

    Args:
        call: the model.
        arguments: of the first step.
        apart: a step waits for all of its latents.
    """

    def __init__(self, call: Callable[..., Any], arguments: dict[str, Any], apart: bool) -> None:
        self._call = call
        self._arguments = arguments
        self._apart = apart
        self.latents = arguments["hidden_states"]

    def step(self) -> None:
        """One call, and the latents after it."""
        prediction = self._call(**{**self._arguments, "hidden_states": self.latents}).sample
        self.latents = self.latents + STEP * prediction
        if self._apart:
            self.finish()

    def finish(self) -> None:
        """Wait for the latents."""
        self.latents.sum()


def timed(step: Callable[[], Any], count: int, begin: Callable[[], Any]) -> dict[str, list[float]]:
    """Wall and CPU seconds of so many steps."""
    row: dict[str, list[float]] = {"seconds": [], "own_work": []}
    for _ in range(count):
        begin()
        wall, own = time.perf_counter(), time.process_time()
        step()
        row["seconds"].append(time.perf_counter() - wall)
        row["own_work"].append(time.process_time() - own)
    return row


def run_plan(
    model: Any, plan: Plan, transport: Transport, arguments: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Steps of a plan within one request, the bytes of the last one, and those of the weights that the rank reads."""
    denoiser = ParallelDenoiser(model, plan, transport)
    denoiser.attach()
    denoiser.open("benchmark")
    sampler = Sampler(model, arguments, options.apart)

    def begin() -> None:
        denoiser.slot = 0
        denoiser.exchange.bytes_sent.clear()

    if plan.late:
        row = timed(sampler.step, plan.num_synchronous, begin)
        sampler.finish()
        dist.barrier()
        all_steps = timed(lambda: (repeated(sampler.step, begin, options.steps), sampler.finish()), 1, lambda: None)
        for name, (value,) in all_steps.items():
            row[name].append(value / options.steps)
    else:
        row = timed(sampler.step, options.calls + 1, begin)
    sent, weights = dict(denoiser.exchange.bytes_sent), denoiser.weight_bytes
    denoiser.close()
    denoiser.detach()
    return {**row, "bytes_sent": sent, "weight_bytes": weights}


def repeated(step: Callable[[], Any], begin: Callable[[], Any], count: int) -> None:
    """So many steps of a request."""
    for _ in range(count):
        begin()
        step()


def expected_bytes(plan: Plan, tokens: int, words: int) -> int | None:
    """Bytes of keys, values (with Ulysses also queries and results) or sums that rank 0 sends, by the shapes."""
    ranks = plan.num_ranks
    parts = [len(a) + len(b) for a, b in zip(split_evenly(tokens, ranks), split_evenly(words, ranks), strict=True)]
    channels = HEADS * HEAD
    if plan.delta is not None:
        return None
    if plan.tp > 1:  # two sums in the block of two streams, one in each other; two ranks trade the whole
        numel = (tokens + words) * channels
        own = len(split_evenly(numel, ranks)[0])
        return (SITES + 1) * 4 * (numel - own + (ranks - 1) * own)
    if plan.stages > 1:  # rank 0's pieces, all together as large as the whole
        return 4 * (tokens + words) * channels
    if plan.ulysses == 1:  # a ring sends the block that it got on: the last one's is the first's where all are even
        return SITES * 4 * 2 * channels * (sum(parts) - parts[1] if plan.ring > 1 else (ranks - 1) * parts[0])
    heads = [len(part) * HEAD for part in split_evenly(HEADS, ranks)]
    return SITES * 4 * sum(3 * parts[0] * heads[peer] + parts[peer] * heads[0] for peer in range(1, ranks))


@torch.no_grad()
def time_rank(rank: int, options: argparse.Namespace, port: int, path: Path) -> None:
    """What one rank does; rank 0 writes the rows."""
    transport = join(rank, port, options.ranks, options)
    model, arguments, rows = flux_shaped_transformer(), inputs(options.rows, options.words), []

    def whole() -> Any:
        return model(**arguments)

    for repetition in range(options.repeat):
        found: dict[str, Any] = {}
        dist.barrier()
        found["alone"] = timed(whole, options.calls, lambda: None) if rank == 0 else {}
        dist.barrier()
        found["together"] = timed(whole, options.calls, dist.barrier)
        for text in plans_of(options):
            dist.barrier()
            found[text] = run_plan(model, Plan.parse(text), transport, arguments, options)
        rows += [{"repetition": repetition, "plan": plan, **row} for plan, row in found.items()]
    if rank == 0:
        path.write_text(json.dumps(rows))
    dist.destroy_process_group()


def plans_of(options: argparse.Namespace) -> list[str]:
    return options.plans.split(",") if options.plans else [text.format(n=options.ranks) for text in PLANS]


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a Markdown table of medians and ranges."""
    print("| plan | speed-up | of the ceiling | own work | bytes between layers, sent / expected | MB of weights |")
    print("|---|---|---|---|---|---|")
    by_repetition = [
        {row["plan"]: row for row in rows if row["repetition"] == repetition} for repetition in range(options.repeat)
    ]
    for text in ("together", *plans_of(options)):
        gains, shares, works = [], [], []
        for own in by_repetition:
            skip = int(text != "together")
            step = statistics.median(own["alone"]["seconds"])
            ceiling = options.ranks * step / statistics.median(own["together"]["seconds"])
            call = statistics.median(own[text]["seconds"][skip:])
            gains.append(ceiling if text == "together" else step / call)
            shares.append(gains[-1] / ceiling)
            alone = statistics.median(own["alone"]["own_work"]) / options.ranks
            works.append(statistics.median(own[text]["own_work"][skip:]) / alone)
        if text == "together":
            print(f"| ceiling | {span(gains, 'x')} | | | | |")
            continue
        last, plan = by_repetition[-1][text], Plan.parse(text)
        sent = sum(n for kind, n in last["bytes_sent"].items() if kind != "exit")
        expected = expected_bytes(plan, options.rows**2, options.words)
        cells = [f"`{text}`", span(gains, "x"), span(shares), span(works), f"{sent} / {expected or ''}"]
        weights = f"{last['weight_bytes'] / 1e6:.1f}" if "weight_bytes" in last else ""
        print(f"| {' | '.join(cells)} | {weights} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", help="plans joined by commas, in place of the usual ones")
    parser.add_argument("--rows", type=int, default=64, help="rows of tokens, as many columns")
    parser.add_argument("--words", type=int, default=512)
    parser.add_argument("--calls", type=int, default=3, help="timed calls of every plan in a repetition")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of every plan of pieces in a repetition")
    parser.add_argument("--apart", action="store_true", help="wait for all latents after every step")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("transformer_speed.json"))
    options = parser.parse_args()
    options.link, options.transport = None, "best"
    scratch = options.out.with_suffix(".rows")
    mp.spawn(time_rank, args=(options, free_port(), scratch), nprocs=options.ranks)
    rows = json.loads(scratch.read_text())
    scratch.unlink()
    report(rows, options)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    asked = {**vars(options), "out": options.out.name}
    document = {"options": asked, "versions": {**versions, "machine": machine}, "rows": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
