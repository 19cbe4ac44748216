"""What a sum of partial sums costs two processes: by gloo, by shared memory, and around DTensor's layers.

    python benchmarks/sums.py --repeat 30

Every rank has one thread; fp32. `gloo` is `torch.distributed.all_reduce`, `ours` is `Exchange.sum`. The pair of layers
is a feed-forward of 4096 tokens at 128 channels, its hidden units divided: by `parallelize_module` (DTensor), and by
plain views of its weights with one `Exchange.sum`. Medians and ranges, in milliseconds. Tiny: the same pair on 4 tokens
of 8 channels, where nothing but overhead is left.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from speed import free_port, join
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.verbs import Exchange

RANKS = 2


def timed(work: Callable[[], object], repeat: int) -> list[float]:
    """Milliseconds of each of some runs that all ranks begin together; the first two are not counted."""
    found = []
    for _ in range(repeat + 2):
        dist.barrier()
        start = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - start))
    return found[2:]


def feed_forward(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


def by_views(layers: nn.Sequential, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """The feed-forward with half of its hidden units on each rank."""
    first, last, rank = layers[0], layers[2], exchange.transport.rank
    own = slice(rank * first.out_features // RANKS, (rank + 1) * first.out_features // RANKS)
    hidden = F.gelu(F.linear(x, first.weight[own], first.bias[own]))
    partial = F.linear(hidden, last.weight[:, own], last.bias if rank == 0 else None)
    exchange.begin(CallPolicy(tuple(range(RANKS)), rank))
    return exchange.sum("pair", partial).wait()


@torch.no_grad()
def measure(rank: int, options: argparse.Namespace, port: int) -> None:
    """What one rank does; rank 0 prints."""
    transport = join(rank, port, RANKS, SimpleNamespace(link=None, transport=options.transport))
    exchange = Exchange(transport)
    mesh = init_device_mesh("cpu", (RANKS,))
    print_row("what", "milliseconds", "range", rank)
    for shape in ((1, 64, 128, 128), (1, 256, 64, 64), (1, 256, 32, 32), (1, 77, 128)):
        x = torch.randn(shape)

        def ours(x: torch.Tensor = x) -> None:
            exchange.begin(CallPolicy(tuple(range(RANKS)), rank))
            exchange.sum("sum", x).wait()

        print_row(f"gloo, {list(shape)}", *span(timed(lambda x=x: dist.all_reduce(x), options.repeat)), rank)
        print_row(f"ours, {list(shape)}", *span(timed(ours, options.repeat)), rank)
    for name, tokens, channels in (("", 4096, 128), ("tiny ", 4, 8)):
        x, plain = torch.randn(1, tokens, channels), feed_forward(channels)
        styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        divided = parallelize_module(feed_forward(channels), mesh, styles)
        print_row(f"{name}pair, one device", *span(timed(lambda p=plain, x=x: p(x), options.repeat)), rank)
        print_row(f"{name}pair, DTensor", *span(timed(lambda d=divided, x=x: d(x), options.repeat)), rank)
        views = timed(lambda p=plain, x=x: by_views(p, x, exchange), options.repeat)
        print_row(f"{name}pair, views and ours", *span(views), rank)
    dist.destroy_process_group()


def span(values: list[float]) -> tuple[str, str]:
    return f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"


def print_row(what: str, middle: str, reach: str, rank: int) -> None:
    if rank == 0:
        print(f"| {what} | {middle} | {reach} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--transport", choices=("best", "sockets"), default="best", help="of ours")
    options = parser.parse_args()
    mp.spawn(measure, args=(options, free_port()), nprocs=RANKS)


if __name__ == "__main__":
    main()
