"""How far displaced plans are from one device, by which kinds of values are stale, on the embedded model.

    python benchmarks/stale_kinds.py --bands 2,4 --pictures 8 --out benchmarks/results/stale_kinds.json

The ranks are virtual (threads of one process), so any number of bands can be measured on any machine; the values are
those of real ranks, the times are not and are not kept. PSNR is of the decoded picture against one device, same seed.
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
import torch
from diffusers import StableDiffusionXLPipeline

import distrifusion.demo
from distrifusion import Plan, parallelize
from distrifusion.exchange.transport import Transport
from distrifusion.exchange.virtual import VirtualWorld
from distrifusion.plan import SiteKind
from distrifusion.quality.metrics import psnr

PROMPTS = (
    "a sunset over green mountains with a lake and pine trees",
    "a clear day with snowy mountains and round trees",
    "a moon at night over purple mountains",
    "dawn, red mountains, a lake",
    "a sunny day, blue mountains, pine trees",
    "a starry night with a moon, snowy mountains and a lake",
    "red mountains at sunset without trees",
    "green mountains at dawn with round trees",
)

ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def plans(num_bands: int, warmup: int) -> list[Plan]:
    """The synchronous plan and one displaced plan for every set of stale kinds."""
    sets = [set(c) for n in range(1, 4) for c in itertools.combinations(SiteKind, n)]
    return [Plan(patch=num_bands)] + [Plan(patch=num_bands, stale=frozenset(s), warmup=warmup) for s in sets]


def on_virtual_rank(pipe: StableDiffusionXLPipeline, plan: Plan, transport: Transport) -> StableDiffusionXLPipeline:
    """A pipeline of this rank's own that shares its weights with the others."""
    weights = {id(t): t for t in (*pipe.unet.parameters(), *pipe.unet.buffers())}
    own = StableDiffusionXLPipeline(
        **{**pipe.components, "unet": copy.deepcopy(pipe.unet, weights), "scheduler": copy.deepcopy(pipe.scheduler)}
    )
    own.set_progress_bar_config(disable=True)
    return parallelize(own, plan, transport)


def draw(pipe: StableDiffusionXLPipeline, plan: Plan, arguments: dict[str, Any]) -> torch.Tensor:
    """Latents of one picture drawn by virtual ranks."""
    world = VirtualWorld(plan.num_ranks)
    return world.run(lambda transport: on_virtual_rank(pipe, plan, transport)(**arguments).images)[0]


def decode(pipe: StableDiffusionXLPipeline, latents: torch.Tensor) -> Any:
    """The picture of some latents."""
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(pixels, output_type="pil")[0]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per picture and plan."""
    pipe = StableDiffusionXLPipeline.from_pretrained(distrifusion.demo.path())
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seed, prompt in itertools.islice(enumerate(itertools.cycle(PROMPTS)), options.pictures):
        size = options.size // pipe.vae_scale_factor
        latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed))
        # Encoded once: the tokenizers are shared by the threads, which must not use them at the same time.
        encoded = pipe.encode_prompt(prompt, do_classifier_free_guidance=True)
        arguments = {
            **dict(zip(ENCODED, encoded, strict=True)),
            "latents": latents,
            "guidance_scale": options.guidance,
            "num_inference_steps": options.steps,
            "output_type": "latent",
        }
        reference = pipe(**arguments).images
        picture = decode(pipe, reference)
        for plan in itertools.chain.from_iterable(plans(int(n), options.warmup) for n in options.bands.split(",")):
            drawn = draw(pipe, plan, arguments)
            error = ((drawn - reference).norm() / reference.norm()).item()
            value = psnr(decode(pipe, drawn), picture)
            rows.append({"seed": seed, "plan": str(plan), "psnr": value, "relative_error": error})
            print(f"{prompt!r} {plan}: {value:.1f} dB, relative latent error {error:.1e}", flush=True)
    return rows


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the median and the worst picture of every plan as a Markdown table, and write the raw rows."""
    print("\n| plan | PSNR median | worst | relative latent error, median |\n|---|---|---|---|")
    for plan in dict.fromkeys(row["plan"] for row in rows):
        own = [row for row in rows if row["plan"] == plan]
        decibels = [row["psnr"] for row in own]
        error = statistics.median(row["relative_error"] for row in own)
        print(f"| `{plan}` | {statistics.median(decibels):.1f} | {min(decibels):.1f} | {error:.1e} |")
    if options.out:
        versions = {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        }
        document = {
            "options": {k: v for k, v in vars(options).items() if k != "out"},
            "versions": versions,
            "rows": rows,
        }
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bands", default="2,4")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=256, help="pixels, rows and columns")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--out")
    options = parser.parse_args()
    report(measure(options), options)


if __name__ == "__main__":
    main()
