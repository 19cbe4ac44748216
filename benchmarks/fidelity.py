"""How far plans are from one device on an embedded model: PSNR, attributes, Frechet distance.

    python benchmarks/fidelity.py --bands 2,4,8 --pictures 16 --processes 2 --out benchmarks/results/fidelity.json
    python benchmarks/fidelity.py --bands 2,4 --pictures 4 --size 256 --every-mixture --out stale_kinds.json
    python benchmarks/fidelity.py --model demo-dit --steps 28 --variants displaced,displaced.forecast --out dit.json

The ranks are virtual (threads of one process), so any number of bands can be measured on any machine; the values are
those of real ranks, the times are not and are not kept. PSNR is of the decoded picture against one device, same seed.
Prompts name every attribute of a scene; accuracy is the share of attributes that are read as asked. The Frechet
distance is between the features of a plan's pictures and those of one device's; few pictures make it coarse.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.multiprocessing as mp
from diffusers import DiffusionPipeline
from PIL import Image

from distrifusion import Plan, parallelize
from distrifusion.demo import classifier
from distrifusion.demo.dataset import sample_scenes
from distrifusion.demo.scenes import ATTRIBUTES, Scene, compose_caption
from distrifusion.exchange.transport import Transport
from distrifusion.exchange.virtual import VirtualWorld
from distrifusion.in_place import denoiser_of
from distrifusion.plan import ALL_KINDS, SiteKind
from distrifusion.quality.metrics import psnr
from distrifusion.runtime import source

VARIANTS = {
    "all stale, corrected norms (published)": "displaced.all",
    "all stale, stale norms": "displaced.all.stalenorm",
    "all stale, separate norms": "displaced.all.separatenorm",
    "KV and halos stale": "displaced.kv.halo",
    "KV stale": "displaced",
    "KV forecast": "displaced.forecast",
    "KV stale, last attention fresh": "displaced.fresh1",
    "KV forecast, last attention fresh": "displaced.forecast.fresh1",
    "KV stale, resynchronised at 10 %": "displaced.resync10",
    "KV forecast, resynchronised at 10 %": "displaced.forecast.resync10",
    "KV stale in 4 bits": "displaced.delta4",
    "KV forecast in 4 bits": "displaced.forecast.delta4",
    "KV fresh in 8 bits": "delta8",
    "KV fresh in 4 bits": "delta4",
    "KV fresh in 2 bits": "delta2",
    "KV fresh in 1 bit": "delta1",
    "naive patches": "naive",
}
ONE_DEVICE = "one device"
# Texts of the other encoders, which SD3 wants to be told: the prompt itself.
_OTHER_TEXTS = {"demo": {}, "demo-dit": {"prompt_2": None, "prompt_3": None}}
_ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def plans(options: argparse.Namespace) -> dict[str, Plan]:
    """The plans to draw with, by what they are called."""
    if options.plans:
        return {f"plan {text}": Plan.parse(text) for text in options.plans.split(",")}
    variants = {name: words for name, words in VARIANTS.items() if words in options.variants.split(",")}
    if options.every_mixture:
        mixtures = [c for n in range(1, len(ALL_KINDS) + 1) for c in itertools.combinations(SiteKind, n)]
        variants = {f"stale {', '.join(mixture)}": ".".join(("displaced", *mixture)) for mixture in mixtures}
    found = {}
    for bands, (name, words) in itertools.product(options.bands.split(","), variants.items()):
        # The others have a first exact call and no more, or decide themselves.
        warmup = f".w{options.warmup}" if words.startswith("displaced") and "resync" not in words else ""
        found[f"{bands} bands: {name}"] = Plan.parse(f"patch{bands}.{words}{warmup}")
    return found


def prompts(count: int) -> list[tuple[Scene, str]]:
    """Scenes of which the model saw none in training, and a prompt for each."""
    rng = np.random.default_rng(0)
    return [(scene, compose_caption(scene.attributes(), rng)) for scene in sample_scenes(count, seed=3_000_000)]


def on_virtual_rank(pipe: DiffusionPipeline, plan: Plan, transport: Transport) -> DiffusionPipeline:
    """A pipeline of this rank's own that shares its weights with the others."""
    denoiser = "unet" if "unet" in pipe.components else "transformer"
    divided = (getattr(pipe, denoiser), pipe.vae)
    weights = {id(t): t for model in divided for t in (*model.parameters(), *model.buffers())}
    model, vae, scheduler = (copy.deepcopy(part, weights) for part in (*divided, pipe.scheduler))
    own = type(pipe)(**{**pipe.components, denoiser: model, "vae": vae, "scheduler": scheduler})
    own.set_progress_bar_config(disable=True)
    return parallelize(own, plan, transport)


def draw(pipe: DiffusionPipeline, plan: Plan, arguments: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents of one picture drawn by virtual ranks, the most bytes that a rank sent per call, synchronous calls."""

    def work(transport: Transport) -> tuple[torch.Tensor, int, int]:
        own = on_virtual_rank(pipe, plan, transport)
        latents, exchange = own(**arguments).images, denoiser_of(own).exchange
        return latents, exchange.bytes_sent.total(), exchange.num_synchronous

    by_rank = VirtualWorld(plan.num_ranks).run(work)
    latents, _, num_synchronous = by_rank[0]
    most = max(num_bytes for _, num_bytes, _ in by_rank)
    return latents, {"bytes_per_call": most / arguments["num_inference_steps"], "synchronous": num_synchronous}


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> Image.Image:
    """The picture of some latents."""
    scaling = pipe.vae.config
    pixels = pipe.vae.decode(latents / scaling.scaling_factor + (scaling.shift_factor or 0.0)).sample
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]


def row(seed: int, name: str, plan: str, picture: Image.Image, scene: Scene) -> dict[str, Any]:
    """What is kept of one picture."""
    images = classifier.to_images(np.array(picture.convert("RGB"))[None])
    read = classifier.read_attributes(images)[0]
    right = {attribute: read[attribute] == getattr(scene, attribute) for attribute in ATTRIBUTES}
    return {
        "seed": seed,
        "name": name,
        "plan": plan,
        "right": right,
        "features": classifier.features(images)[0].tolist(),
    }


def measure(process: int, options: argparse.Namespace, path: Path) -> None:
    """One row per picture and plan, for every `processes`-th picture."""
    torch.set_num_threads(1)
    pipe = source.find(options.model, {}).open(torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    size = options.size // pipe.vae_scale_factor
    with path.with_suffix(f".{process}").open("w") as file:
        for seed, (scene, prompt) in list(enumerate(prompts(options.pictures)))[process :: options.processes]:
            # Encoded once: the tokenizers are shared by the threads, which must not use them at the same time.
            encoded = pipe.encode_prompt(prompt, **_OTHER_TEXTS[options.model])
            arguments = {
                **dict(zip(_ENCODED, encoded, strict=True)),
                # The model is told the size, which the pipeline does not take from the latents.
                "height": options.size,
                "width": options.size,
                "latents": torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)),
                "guidance_scale": options.guidance,
                "num_inference_steps": options.steps,
                "output_type": "latent",
            }
            reference = pipe(**arguments).images
            picture = decode(pipe, reference)
            print(json.dumps(row(seed, ONE_DEVICE, "patch1", picture, scene)), file=file, flush=True)
            for name, plan in plans(options).items():
                drawn, traffic = draw(pipe, plan, arguments)
                image = decode(pipe, drawn)
                own = row(seed, name, str(plan), image, scene) | traffic
                own["psnr"] = psnr(image, picture)
                own["relative_error"] = ((drawn - reference).norm() / reference.norm()).item()
                print(json.dumps(own), file=file, flush=True)


def report(rows: list[dict[str, Any]]) -> None:
    """Print the median and the worst picture of every plan as a Markdown table."""
    columns = ["", "plan", "PSNR median", "worst", "latent error, median", "MB per call"]
    columns += ["synchronous calls", "attributes", "Frechet distance"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    reference = torch.tensor([row["features"] for row in rows if row["name"] == ONE_DEVICE])
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        right = statistics.mean(statistics.mean(row["right"].values()) for row in own)
        cells = [name, f"`{own[0]['plan']}`"]
        if name == ONE_DEVICE:
            cells += ["", "", "", "", "", f"{right:.1%}", ""]
        else:
            decibels = [row["psnr"] for row in own]
            distance = classifier.frechet_distance(torch.tensor([row["features"] for row in own]), reference)
            error = statistics.median(row["relative_error"] for row in own)
            sent = [row["bytes_per_call"] for row in own if "bytes_per_call" in row]
            calls = [row["synchronous"] for row in own if "synchronous" in row]
            cells += [f"{statistics.median(decibels):.1f}", f"{min(decibels):.1f}", f"{error:.1e}"]
            cells += [f"{statistics.median(sent) / 1e6:.2f}" if sent else ""]
            cells += [f"{statistics.median(calls):g}" if calls else "", f"{right:.1%}"]
            cells.append(f"{max(0.0, distance):.3f}" if len(own) > 1 else "")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(_OTHER_TEXTS), default="demo")
    parser.add_argument("--bands", default="2,4,8")
    parser.add_argument("--plans", help="plans joined by commas, in place of variants of bands")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=512, help="pixels, rows and columns")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--variants", default=",".join(VARIANTS.values()), help="words after the number of bands")
    parser.add_argument("--every-mixture", action="store_true", help="one plan for every set of stale kinds instead")
    parser.add_argument("--processes", type=int, default=1, help="that share the pictures, one thread each")
    parser.add_argument("--out", type=Path, default=Path("fidelity.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    mp.spawn(measure, args=(options, options.out), nprocs=options.processes)
    parts = [options.out.with_suffix(f".{process}") for process in range(options.processes)]
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    rows.sort(key=lambda row: row["seed"])
    report(rows)
    facts = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    settings = {**vars(options), "out": options.out.name}
    options.out.write_text(json.dumps({"options": settings, "versions": facts, "rows": rows}) + "\n")
    for part in parts:
        part.unlink()


if __name__ == "__main__":
    main()
