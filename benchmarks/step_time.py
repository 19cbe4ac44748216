"""Seconds per denoiser call of a random SDXL-shaped U-Net: one process, N processes without exchange, and plans.

    python benchmarks/step_time.py --plans cfg2,patch2,patch2.displaced.w0 --out benchmarks/results/step_time.json

Every repetition times, one after the other in the same processes: one rank alone, all ranks at once on a whole call
each (their slowdown gives the ceiling of any speed-up here), and every plan. One CPU thread per rank, fp32; the rows
and the versions go to --out.
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
from diffusers import UNet2DConditionModel

from distrifusion import Plan
from distrifusion.denoiser import ParallelDenoiser
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.transport import ProcessGroupTransport, Transport


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
    """Arguments of one call."""
    generator = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(batch, 64, generator=generator), "time_ids": torch.ones(batch, 6)}
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, 64, generator=generator),
        "added_cond_kwargs": added,
    }


def median_seconds(call: Callable[[], Any], num_calls: int) -> float:
    """Median over calls that all ranks start together."""
    times = []
    for _ in range(num_calls):
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plan_row(
    unet: UNet2DConditionModel, plan: Plan, transport: Transport, arguments: dict[str, Any], num_calls: int
) -> dict[str, Any]:
    """Time one plan after two calls that warm it up."""
    denoiser = ParallelDenoiser(unet, plan, transport)
    denoiser.attach()
    denoiser.open("benchmark")

    def call() -> None:
        denoiser.slot = 0
        unet(**arguments)

    call()
    call()
    denoiser.exchange.bytes_sent.clear()
    denoiser.exchange.num_posts = 0
    seconds = median_seconds(call, num_calls)
    sent = {kind: count // num_calls for kind, count in denoiser.exchange.bytes_sent.items()}
    posts = denoiser.exchange.num_posts // num_calls
    denoiser.close()
    denoiser.detach()
    return {"seconds": seconds, "bytes_sent": sent, "posts": posts}


@torch.no_grad()
def rank_main(rank: int, options: argparse.Namespace, port: int) -> None:
    """What one rank does; rank 0 writes the rows."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, options.ranks, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    unet, arguments = sdxl_shaped_unet(), inputs(options.batch, options.size)
    group = dist.group.WORLD
    assert group is not None
    sockets = options.transport == "sockets"
    transport = ProcessGroupTransport(group) if sockets else transport_of(group, torch.device("cpu"))
    rows = []
    for repetition in range(options.repeat):
        dist.barrier()
        alone = 0.0
        if rank == 0:
            times = []
            for _ in range(options.calls):
                start = time.perf_counter()
                unet(**arguments)
                times.append(time.perf_counter() - start)
            alone = statistics.median(times)
        together = median_seconds(lambda: unet(**arguments), options.calls)
        ceiling = options.ranks * alone / together
        rows.append({"repetition": repetition, "plan": "one process", "seconds": alone, "ceiling": ceiling})
        for text in options.plans.split(","):
            row = plan_row(unet, Plan.parse(text), transport, arguments, options.calls)
            rows.append({"repetition": repetition, "plan": text, **row, "speedup": alone / row["seconds"]})
    if rank == 0:
        report(rows, options)
    dist.destroy_process_group()


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print medians over repetitions and write the raw rows."""
    ceilings = [row["ceiling"] for row in rows if "ceiling" in row]
    print(f"ceiling: {statistics.median(ceilings):.2f}x (from {min(ceilings):.2f} to {max(ceilings):.2f})")
    for text in options.plans.split(","):
        speedups = [row["speedup"] for row in rows if row["plan"] == text]
        last = next(row for row in reversed(rows) if row["plan"] == text)
        print(
            f"{text}: {statistics.median(speedups):.2f}x (from {min(speedups):.2f} to {max(speedups):.2f}), "
            f"{sum(last['bytes_sent'].values()) / 1e6:.1f} MB in {last['posts']} posts per rank and call"
        )
    if options.out:
        facts = {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        document = {"options": {k: v for k, v in vars(options).items() if k != "out"}, "versions": facts, "rows": rows}
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", default="cfg2,patch2,patch2.displaced.kv.w0,patch2.displaced.w0")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the latents")
    parser.add_argument("--calls", type=int, default=5, help="calls per plan and repetition; their median counts")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--transport", choices=("best", "sockets"), default="best", help="sockets: messages of gloo")
    parser.add_argument("--out")
    options = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, options.ranks, is_master=True, wait_for_workers=False)
    mp.spawn(rank_main, args=(options, store.port), nprocs=options.ranks)


if __name__ == "__main__":
    main()
