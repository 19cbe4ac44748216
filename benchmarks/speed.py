"""How much faster plans run a random SDXL-shaped U-Net than one process, against the ceiling of this machine.

    python benchmarks/speed.py --repeat 5 --out benchmarks/results/speed.json

Every repetition times, one after the other in the same processes: one rank alone, all ranks at once on a whole run each
(how much they slow each other gives the ceiling of any speed-up here), and a whole run of every plan. A run is a DDIM
loop; every rank has one thread; fp32. Speed-ups are per step after the warm-up and over the whole run, medians over
repetitions with their range. Then every plan runs alone in new processes for the peak of its memory. The raw rows, the
bytes by kind beside those that the shapes give, and the versions go to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import link
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import DDIMScheduler, UNet2DConditionModel

from distrifusion import Plan
from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.base import AttentionSite, ConvSite, EntrySite, NormSite, UpsampleSite
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.codec import Codec
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.transport import ProcessGroupTransport, Transport
from distrifusion.in_place import SingleTransport
from distrifusion.layout.partition import partition_levels
from distrifusion.tape import TapeBackend

# Batch 1 is a picture without guidance, batch 2 one with both branches in the batch.
PLANS = {
    1: (
        "patch1",
        "patch{n}",
        "patch{n}.displaced.w4",
        "patch{n}.displaced.all.w4",
        "patch{n}.displaced.forecast.w4",
        "patch{n}.delta8",
        "patch{n}.delta4",
        "patch{n}.displaced.delta4.w4",
    ),
    2: ("cfg2", "patch{n}", "patch{n}.displaced.w4"),
}
REPLAYED = " +graphs"  # of a row: calls are captured, and replayed from the third one of a kind on


def sdxl_shaped_unet() -> UNet2DConditionModel:
    """SDXL's layout at channels 64/128/256 and transformer depth 1/1/2, random weights, heads 64 wide."""
    torch.manual_seed(0)
    config = {
        "sample_size": 128,
        "block_out_channels": (64, 128, 256),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    }
    return UNet2DConditionModel(**config).eval()


def inputs(batch: int, size: int) -> dict[str, Any]:
    """Arguments of a call, without the timestep."""
    generator = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(batch, 64, generator=generator), "time_ids": torch.ones(batch, 6)}
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 77, 64, generator=generator),
        "added_cond_kwargs": added,
    }


def run(unet: UNet2DConditionModel, arguments: dict[str, Any], steps: int, begin: Callable[[], None]) -> list[float]:
    """Seconds of every step of a DDIM run of so many steps."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    sample, seconds = arguments["sample"], []
    for timestep in scheduler.timesteps:
        begin()
        start = time.perf_counter()
        noise = unet(**{**arguments, "sample": sample}, timestep=timestep).sample
        sample = scheduler.step(noise, timestep, sample).prev_sample
        seconds.append(time.perf_counter() - start)
    return seconds


def plan_of(text: str) -> Plan:
    """The plan of a row, which may be replayed."""
    return Plan.parse(text.removesuffix(REPLAYED))


def run_plan(
    unet: UNet2DConditionModel, text: str, transport: Transport, arguments: dict[str, Any], steps: int
) -> dict[str, Any]:
    """A whole run of a plan: its steps, and bytes and messages of its last call."""
    plan = plan_of(text)
    denoiser = ParallelDenoiser(unet, plan, transport)
    if text.endswith(REPLAYED):
        denoiser.capture_by(TapeBackend())
    denoiser.attach()
    denoiser.open("benchmark")

    def begin() -> None:
        denoiser.slot = 0
        denoiser.exchange.bytes_sent.clear()
        denoiser.exchange.num_posts = 0

    seconds = run(unet, arguments, steps, begin)
    sent, posts, kept = dict(denoiser.exchange.bytes_sent), denoiser.exchange.num_posts, denoiser.pool.num_bytes
    denoiser.close()
    denoiser.detach()
    batch, _, size, _ = arguments["sample"].shape
    expected = expected_bytes(unet, plan, transport.rank, batch, size) if plan.patch > 1 else {}
    return {
        "seconds": seconds,
        "bytes_sent": sent,
        "bytes_expected": expected,
        "posts": posts,
        "kept_bytes": kept,
    }


def expected_bytes(unet: UNet2DConditionModel, plan: Plan, rank: int, batch: int, size: int) -> dict[str, int]:
    """What one rank of a plan of rows alone must send in an fp32 call, by the shapes of the layers."""
    levels = partition_levels(size, size, anatomy_of(unet).num_levels(unet), plan.patch, plan.split)
    others, total = plan.patch - 1, Counter[str]()
    codec = Codec.of(plan.delta) if plan.delta else None
    neighbours = (rank > 0) + (rank < plan.patch - 1)
    sites = anatomy_of(unet).sites(unet)
    after_upsampling = {site.conv for site in sites if isinstance(site, UpsampleSite)}
    for site in sites:
        level, module = levels[site.level], site.module
        rows = len(level.bands[rank]) if level.bands else 0
        match site:
            case NormSite():
                total["norm"] += others * 2 * batch * module.num_groups * 4
            case AttentionSite():
                shape = (rows * level.width, batch, 2, module.inner_dim)
                total["kv"] += others * (codec.num_bytes(shape) if codec else 4 * math.prod(shape))
            case ConvSite() if not isinstance(site, EntrySite):
                takers = neighbours if module.stride == (1, 1) else int(rank < plan.patch - 1)
                # What is upsampled travels before: one row of half the width.
                width = levels[site.level + 1].width if site.name in after_upsampling else level.width
                total["halo"] += takers * batch * module.in_channels * width * 4
    total["exit"] = others * batch * 4 * len(levels[0].bands[rank]) * size * 4 if levels[0].bands else 0
    return dict(total)


def plans_of(options: argparse.Namespace) -> dict[int, list[str]]:
    """The plans to run, by batch size."""
    plans = {batch: [text.format(n=options.ranks) for text in texts] for batch, texts in PLANS.items()}
    if options.plans:
        plans = {options.batch: options.plans.split(",")}
    if getattr(options, "graphs", False):  # rows of before have no such option
        plans = {batch: [row for text in texts for row in (text, text + REPLAYED)] for batch, texts in plans.items()}
    return plans


def join(rank: int, port: int, world_size: int, options: argparse.Namespace) -> Transport:
    """Meet the other ranks."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address = link.enter(options.ends[rank], rank) if options.link else "127.0.0.1"
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    group = dist.group.WORLD
    assert group is not None
    sockets = options.link or options.transport == "sockets"
    return ProcessGroupTransport(group) if sockets else transport_of(group, torch.device("cpu"))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@torch.no_grad()
def time_rank(rank: int, options: argparse.Namespace, port: int, path: Path) -> None:
    """What one rank does; rank 0 writes the rows."""
    transport = join(rank, port, options.ranks, options)
    unet, rows = sdxl_shaped_unet(), []
    for repetition in range(options.repeat):
        for batch, plans in plans_of(options).items():
            arguments = inputs(batch, options.size)
            dist.barrier()
            alone = run(unet, arguments, options.reference_steps, lambda: None) if rank == 0 else []
            dist.barrier()
            together = run(unet, arguments, options.reference_steps, dist.barrier)
            rows.append({"repetition": repetition, "batch": batch, "plan": "alone", "seconds": alone})
            rows.append({"repetition": repetition, "batch": batch, "plan": "together", "seconds": together})
            for text in plans:
                single = plan_of(text).num_ranks == 1
                dist.barrier()
                if not single:
                    row = run_plan(unet, text, transport, arguments, options.steps)
                elif rank == 0:
                    row = run_plan(unet, text, SingleTransport(), arguments, options.reference_steps)
                else:
                    continue
                rows.append({"repetition": repetition, "batch": batch, "plan": text, **row})
    if rank == 0:
        path.write_text(json.dumps(rows))
    dist.destroy_process_group()


@torch.no_grad()
def weigh_rank(rank: int, options: argparse.Namespace, port: int, path: Path, text: str | None, batch: int) -> None:
    """Write the peak of a new process's memory: before any call, and after some of a plan (None: of one device)."""
    world_size = plan_of(text).num_ranks if text else 1
    transport = join(rank, port, world_size, options) if world_size > 1 else SingleTransport()
    unet, arguments = sdxl_shaped_unet(), inputs(batch, options.size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if text is None:
        run(unet, arguments, 2, lambda: None)
    else:
        run_plan(unet, text.replace(".w4", ".w0"), transport, arguments, 3)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.with_suffix(f".{rank}").write_text(json.dumps([before * 1024, after * 1024]))


def weigh(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of a rank of every plan and of one device, in bytes, each in new processes."""
    rows = []
    for batch, plans in plans_of(options).items():
        for text in [None, *plans]:
            path, size = folder / "weight", plan_of(text).num_ranks if text else 1
            mp.spawn(weigh_rank, args=(options, free_port(), path, text, batch), nprocs=size)
            peaks = [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(size)]
            rows.append({"batch": batch, "plan": text or "alone", "rest_bytes": peaks[0][0], "peak_bytes": peaks[0][1]})
    return rows


def speedups(rows: list[dict[str, Any]], batch: int, text: str, ranks: int, steps: int) -> list[tuple[float, float]]:
    """For every repetition: a plan's speed-up per step after its warm-up, and over a whole run of so many steps.

    `together` stands for the ceiling: all ranks at once on a whole run each.
    """
    found = []
    for repetition in sorted({row["repetition"] for row in rows}):
        own = {row["plan"]: row["seconds"] for row in rows if (row["repetition"], row["batch"]) == (repetition, batch)}
        step = statistics.median(own["alone"])
        if text == "together":
            found.append((ranks * step / statistics.median(own[text]), ranks * sum(own["alone"]) / sum(own[text])))
            continue
        plan = plan_of(text)
        past = own[text][plan.num_synchronous :] if not plan.exact else own[text]
        # Where components run in every second call, a rank's steps are long and short by turns.
        past = [statistics.mean(turn) for turn in zip(*[iter(past)] * plan.stride, strict=False)]
        whole = statistics.mean(own["alone"]) * len(own[text]) / sum(own[text])
        found.append((step / statistics.median(past), whole))
    return found


def report(rows: list[dict[str, Any]], weights: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a Markdown table of medians and ranges."""
    print("| batch | plan | per step | of the ceiling | whole run | of the ceiling | posts a call | peak MB per rank |")
    print("|---|---|---|---|---|---|---|---|")
    traffic = []
    for batch, plans in plans_of(options).items():
        ceilings = speedups(rows, batch, "together", options.ranks, options.steps)
        for text in ["together", *plans]:
            found = speedups(rows, batch, text, options.ranks, options.steps)
            shares = [[own[i] / top[i] for own, top in zip(found, ceilings, strict=True)] for i in (0, 1)]
            last = next((row for row in reversed(rows) if (row["batch"], row["plan"]) == (batch, text)), {})
            peak = [row["peak_bytes"] for row in weights if (row["batch"], row["plan"]) == (batch, text)]
            cells = [f"{batch}", f"`{text}`" if text != "together" else "ceiling"]
            for i in (0, 1):
                cells += [span([own[i] for own in found], "x"), span(shares[i])]
            cells += [str(last.get("posts", "")), f"{peak[0] / 1e6:.0f}" if peak else ""]
            print(f"| {' | '.join(cells)} |")
            if text != "together" and plan_of(text).patch > 1:
                traffic.append((batch, text, last["bytes_sent"], last["bytes_expected"]))
    for row in weights:
        if row["plan"] == "alone":
            print(f"\none device, batch {row['batch']}: peak {row['peak_bytes'] / 1e6:.0f} MB", end="")
    print(
        "\n\n| batch | plan | "
        + " | ".join(f"{kind}, sent / expected" for kind in ("kv", "halo", "norm", "exit"))
        + " |"
    )
    print("|---|---|---|---|---|---|")
    for batch, text, sent, expected in traffic:
        cells = [f"{sent.get(kind, 0)} / {expected[kind]}" for kind in ("kv", "halo", "norm", "exit")]
        print(f"| {batch} | `{text}` | {' | '.join(cells)} |")


def span(values: list[float], unit: str = "") -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def write_rows(options: argparse.Namespace, rows: list[dict[str, Any]], weights: list[dict[str, Any]]) -> None:
    """Write what was measured, with which options and versions, to the file that was asked for."""
    facts = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    asked = {**{k: v for k, v in vars(options).items() if k != "ends"}, "out": options.out.name}
    document = {"options": asked, "versions": facts, "rows": rows, "memory": weights}
    options.out.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", help="plans joined by commas, in place of the usual ones; they take --batch")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the latents")
    parser.add_argument("--steps", type=int, default=16, help="of a run")
    parser.add_argument("--reference-steps", type=int, default=6, help="of a run on one device")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--transport", choices=("best", "sockets"), default="best", help="sockets: messages of gloo")
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    parser.add_argument("--link", help="rate of the network between two ranks, such as 100mbit; needs root and tc")
    parser.add_argument("--graphs", action="store_true", help="every plan again with its calls captured and replayed")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    options = parser.parse_args()
    if options.link and options.ranks != 2:
        parser.error("a link has two ends, so --link takes --ranks 2")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = options.out.with_suffix(".rows")
    with link.slow_link(options.link) if options.link else nullcontext() as options.ends:
        mp.spawn(time_rank, args=(options, free_port(), scratch), nprocs=options.ranks)
        weights = [] if options.no_memory else weigh(options, options.out.parent)
    rows = json.loads(scratch.read_text())
    for left in (scratch, *options.out.parent.glob("weight.*")):
        left.unlink()
    report(rows, weights, options)
    write_rows(options, rows, weights)


if __name__ == "__main__":
    main()
