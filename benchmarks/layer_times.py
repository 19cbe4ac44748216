"""How even components are if they are cut by operations, and if they are cut by the time that layers take.

    python benchmarks/layer_times.py --out benchmarks/results/layer_times.json

A random SDXL-shaped U-Net and a FLUX-shaped transformer (those of speed.py and transformer_speed.py) and the embedded
U-Net run whole in as many processes at once as there are ranks, one thread each. The least time of each layer over some
calls after the first says how long the longest component of either cut takes: predicted from layers, not a step that
was measured.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import speed
import torch
import torch.multiprocessing as mp
import transformer_speed

from distrifusion.anatomy import anatomy_of
from distrifusion.layout.depth import Layer, divide
from distrifusion.runtime import source
from distrifusion.strategies.attach import Attachment
from distrifusion.strategies.watching import Stopwatch, Watch

COMPONENTS = ((2, 1), (2, 2), (3, 1), (4, 1))  # and their strides


def sdxl_shaped() -> tuple[Any, dict[str, Any]]:
    """The U-Net of speed.py, one picture of 128x128 latents."""
    return speed.sdxl_shaped_unet(), {**speed.inputs(1, 128), "timestep": torch.tensor(500)}


def flux_shaped() -> tuple[Any, dict[str, Any]]:
    """The transformer of transformer_speed.py, 2304 tokens and 256 of text."""
    return transformer_speed.flux_shaped_transformer(), transformer_speed.inputs(48, 256)


def embedded() -> tuple[Any, dict[str, Any]]:
    """The embedded U-Net, both guidance branches of a picture of 256x256."""
    pipe = source.find("demo", {}).open(torch.device("cpu"))
    encoded = pipe.encode_prompt("a lake")
    text, pooled = (torch.cat([encoded[i + 1], encoded[i]]) for i in (0, 2))
    added = {"text_embeds": pooled, "time_ids": torch.ones(2, 6)}
    arguments = {"sample": torch.randn(2, 4, 32, 32), "encoder_hidden_states": text, "added_cond_kwargs": added}
    return pipe.unet, {**arguments, "timestep": torch.tensor(500)}


MODELS = {"SDXL-shaped": sdxl_shaped, "FLUX-shaped": flux_shaped, "demo": embedded}


@torch.no_grad()
def layer_times(name: str, calls: int) -> dict[str, Any]:
    """What the layers of a model cost and read, and the least time of each, in nanoseconds."""
    torch.set_num_threads(1)
    model, arguments = MODELS[name]()
    attachment, observers = Attachment(), [Watch(), *(Stopwatch() for _ in range(calls))]
    now: list[Watch | Stopwatch] = []

    def layer(site: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return now[-1].run(site, forward, args, kwargs)

    for site in anatomy_of(model).links(model):
        attachment.replace(site.module, "forward", partial(partial, layer, site.name))
    for observer in observers:
        now.append(observer)
        with observer:
            model(**arguments)
    watch, *watches = observers
    took = [min(times) for times in zip(*(stopwatch.nanoseconds for stopwatch in watches), strict=True)]
    layers = [(use.name, use.layer.cost, sorted(use.layer.reads)) for use in watch.seen]
    return {"model": name, "layers": layers, "nanoseconds": took}


def measure(process: int, options: argparse.Namespace, path: Path) -> None:
    """The layers of all models, in one of the processes."""
    rows = [layer_times(name, options.calls) for name in options.models.split(",")]
    path.with_suffix(f".{process}").write_text(json.dumps(rows))


def longest(timed: Sequence[Layer], by: Sequence[Layer], num_components: int, stride: int) -> float:
    """Milliseconds of the component that takes most, if the chain is cut by some costs."""
    loads = divide(by, num_components, stride).loads(timed)
    return max(max(loads[:-1]) / stride, loads[-1]) / 1e6


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Print the longest component of either cut as a Markdown table."""
    print("| model | billion operations a second, by layer | components | cut by operations, ms | by time, ms | less |")
    print("|" + "---|" * 6)
    for row in rows:
        counted = [Layer(cost, frozenset(reads)) for _, cost, reads in row["layers"]]
        timed = [replace(layer, cost=took) for layer, took in zip(counted, row["nanoseconds"], strict=True)]
        rates = sorted(layer.cost / took for layer, took in zip(counted, row["nanoseconds"], strict=True))
        spread = f"{rates[0]:.0f} to {rates[-1]:.0f}, median {rates[len(rates) // 2]:.0f}"
        for num_components, stride in COMPONENTS:
            one, other = (longest(timed, by, num_components, stride) for by in (counted, timed))
            plan = f"`async{num_components}{'.stride2' if stride > 1 else ''}`"
            print(f"| {row['model']} | {spread} | {plan} | {one:.1f} | {other:.1f} | {1 - other / one:.0%} |")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    mp.spawn(measure, args=(options, options.out), nprocs=options.processes)
    parts = [options.out.with_suffix(f".{process}") for process in range(options.processes)]
    rows = json.loads(parts[0].read_text())
    for part in parts:
        part.unlink()
    facts = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.processor()}
    options.out.write_text(
        json.dumps({"options": {**vars(options), "out": options.out.name}, "versions": facts, "rows": rows}) + "\n"
    )
    report(rows)


if __name__ == "__main__":
    main()
