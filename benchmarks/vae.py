"""How much faster and smaller ranks decode and encode a picture together than one process, on a random SDXL-shaped VAE.

    python benchmarks/vae.py --repeat 3 --out benchmarks/results/vae.json

Every repetition times, one after the other in the same processes: one rank alone on a whole picture, all ranks at once
on a whole picture each (how much they slow each other gives the ceiling of any speed-up here), and all ranks together
on one picture. Every rank has one thread; fp32. Then one device and the ranks run in new processes for the peak of
their memory (resident, libraries and weights included). The raw rows, the relative error and the versions go to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL
from speed import write_rows

from distrifusion.autoencoder import Calls, ParallelCoder
from distrifusion.exchange.meeting import transport_of
from distrifusion.exchange.transport import ProcessGroupTransport, Transport
from distrifusion.plan import Split

WORKS = ("decode", "encode")


def sdxl_vae() -> AutoencoderKL:
    """SDXL's autoencoder, 84M random parameters."""
    torch.manual_seed(0)
    levels = 4
    return AutoencoderKL(
        down_block_types=levels * ("DownEncoderBlock2D",),
        up_block_types=levels * ("UpDecoderBlock2D",),
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
    ).eval()


def work_of(vae: AutoencoderKL, name: str, size: int) -> Callable[[], torch.Tensor]:
    """One call of the decoder or the encoder, for a picture of `size` latents squared."""
    generator = torch.Generator().manual_seed(1)
    if name == "decode":
        latents = torch.randn(1, 4, size, size, generator=generator)
        return lambda: vae.decode(latents).sample
    picture = torch.rand(1, 3, 8 * size, 8 * size, generator=generator) * 2 - 1
    return lambda: vae.encode(picture).latent_dist.parameters


def divided(vae: AutoencoderKL, name: str, split: Split, transport: Transport) -> ParallelCoder:
    """The half of the autoencoder that does a work, divided over the ranks of a transport."""
    half = vae.decoder if name == "decode" else vae.encoder
    coder = ParallelCoder(half, split, transport, f"{name}.")
    coder.attach()
    return coder


def seconds_of(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def join(rank: int, port: int, world_size: int, sockets: bool) -> Transport:
    """Meet the other ranks."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    group = dist.group.WORLD
    assert group is not None
    return ProcessGroupTransport(group) if sockets else transport_of(group, torch.device("cpu"))


@torch.no_grad()
def time_rank(rank: int, options: argparse.Namespace, port: int, path: Path) -> None:
    """What one rank does; rank 0 writes the rows."""
    transport = join(rank, port, options.ranks, options.transport == "sockets")
    vae, rows = sdxl_vae(), []
    for repetition in range(options.repeat):
        for name in options.works.split(","):
            work = work_of(vae, name, options.size)
            row: dict[str, Any] = {"repetition": repetition, "work": name, "load": os.getloadavg()[0]}
            dist.barrier()
            if rank == 0:
                row["alone"], reference = seconds_of(work)
            dist.barrier()
            row["together"], _ = seconds_of(work)
            coder = divided(vae, name, Split(options.split), transport)
            with coder.calls(Calls.ALL):
                dist.barrier()
                row["divided"], result = seconds_of(work)
            coder.detach()
            row |= {"bytes_sent": dict(coder.exchange.bytes_sent), "posts": coder.exchange.num_posts}
            if rank == 0:
                row["relative_error"] = float((result - reference).norm() / reference.norm())
                rows.append(row)
    if rank == 0:
        path.write_text(json.dumps(rows))
    dist.destroy_process_group()


@torch.no_grad()
def weigh_rank(rank: int, options: argparse.Namespace, port: int, path: Path, name: str, ranks: int) -> None:
    """Write the peak of a new process's memory: before the call, and after it, divided if there are several ranks."""
    torch.set_num_threads(1)
    vae = sdxl_vae()
    coder = None
    if ranks > 1:
        coder = divided(vae, name, Split(options.split), join(rank, port, ranks, options.transport == "sockets"))
    work = work_of(vae, name, options.size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if coder is None:
        work()
    else:
        with coder.calls(Calls.ALL):
            work()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.with_suffix(f".{rank}").write_text(json.dumps([before * 1024, after * 1024]))


def weigh(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Peak memory of one device and of every rank, in bytes, each in new processes."""
    rows = []
    for name in options.works.split(","):
        for ranks in (1, options.ranks):
            path = folder / "weight"
            store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
            mp.spawn(weigh_rank, args=(options, store.port, path, name, ranks), nprocs=ranks)
            peaks = [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]
            rest, peak = [max(column) for column in zip(*peaks, strict=True)]
            rows.append({"work": name, "ranks": ranks, "rest_bytes": rest, "peak_bytes": peak})
    return rows


def report(rows: list[dict[str, Any]], weights: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a Markdown table of medians and ranges."""
    print("| work | one device | ranks together | speed-up | ceiling | error | peak MB, one and each | of one |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.works.split(","):
        own = [row for row in rows if row["work"] == name]
        gains = [row["alone"] / row["divided"] for row in own]
        ceilings = [options.ranks * row["alone"] / row["together"] for row in own]
        one, each = ([w["peak_bytes"] for w in weights if w["work"] == name] + [0, 0])[:2]
        cells = [
            name,
            span([row["alone"] for row in own], " s"),
            span([row["divided"] for row in own], " s"),
            span(gains, "x"),
            span(ceilings, "x"),
            f"{max((row['relative_error'] for row in own), default=0):.1e}",
            f"{one / 1e6:.0f}, {each / 1e6:.0f}",
            f"{each / one:.2f}" if one else "",
        ]
        print(f"| {' | '.join(cells)} |")


def span(values: list[float], unit: str = "") -> str:
    """Median and range."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--works", default=",".join(WORKS), help="decode, encode or both, joined by a comma")
    parser.add_argument("--split", choices=(Split.ROWS, Split.COLUMNS), default=Split.ROWS)
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the latents")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--transport", choices=("best", "sockets"), default="best", help="sockets: messages of gloo")
    parser.add_argument("--out", type=Path, default=Path("vae.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = options.out.with_suffix(".rows")
    rows: list[dict[str, Any]] = []
    if options.repeat:
        store = dist.TCPStore("127.0.0.1", 0, options.ranks, is_master=True, wait_for_workers=False)
        mp.spawn(time_rank, args=(options, store.port, scratch), nprocs=options.ranks)
        rows = json.loads(scratch.read_text())
    weights = weigh(options, options.out.parent)
    for left in (scratch, *options.out.parent.glob("weight.*")):
        left.unlink(missing_ok=True)
    report(rows, weights, options)
    write_rows(options, rows, weights)


if __name__ == "__main__":
    main()
