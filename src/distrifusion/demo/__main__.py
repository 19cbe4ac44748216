"""Command line of the demo models: ``python -m distrifusion.demo {train,evaluate,render}``."""

import argparse
import json
from pathlib import Path
from typing import Any

from distrifusion import demo


def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python -m distrifusion.demo", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_train(commands.add_parser("train", help="make all weights from nothing; may be stopped and run again"))
    _add_evaluate(commands.add_parser("evaluate", help="measure how well pictures follow their prompts"))
    _add_render(commands.add_parser("render", help="draw one training scene with its caption"))
    arguments = vars(parser.parse_args())
    arguments.pop("run")(**arguments)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, as in 384x256")
    return int(width), int(height)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and the cache of pictures")
    parser.add_argument("--minutes", type=float, help="train the U-Net by the clock instead of by --steps")
    parser.add_argument("--steps", type=int, default=4620, help="steps of the U-Net (default %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=2450, help="steps of the autoencoder (default %(default)s)")
    parser.add_argument("--decoder-steps", type=int, default=1850, help="steps that refine its decoder (%(default)s)")
    parser.add_argument(
        "--transformer-steps", type=int, default=3250, help="steps of demo-dit's denoiser (default %(default)s)"
    )
    parser.add_argument(
        "--shared", type=Path, metavar="PIPELINE", help="make only demo-dit, with the parts of this first pipeline"
    )
    parser.add_argument("--processes", type=int, default=2, help="use 1 on a GPU (default %(default)s)")
    parser.set_defaults(run=_train)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(demo.MODELS), default="demo", help="(default %(default)s)")
    parser.add_argument("--pipeline", type=Path, help="another pipeline folder than the model's")
    parser.add_argument("--count", type=int, default=256, help="pictures (default %(default)s)")
    parser.add_argument("--size", type=_size, default=(256, 256), help="WIDTHxHEIGHT (default 256x256)")
    parser.add_argument("--sampler", help="demo: dpm++ (default) or ddim; demo-dit: euler")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=Path, help="picture file for the first 48 pictures")
    parser.set_defaults(run=_evaluate)


def _add_render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=_size, default=(512, 512), help="WIDTHxHEIGHT (default 512x512)")
    parser.add_argument("--seed", type=int, default=0, help="decides the scene")
    parser.add_argument("-o", "--out", type=Path, default=Path("scene.png"))
    parser.set_defaults(run=_render)


def _train(
    minutes: float | None,
    steps: int,
    vae_steps: int,
    decoder_steps: int,
    transformer_steps: int,
    **options: Any,
) -> None:
    from distrifusion.demo.stages import Lengths, train

    train(lengths=Lengths(vae_steps, steps, minutes, decoder_steps, transformer_steps), **options)


def _evaluate(grid: Path | None, model: str, pipeline: Path | None, **options: Any) -> None:
    from distrifusion.demo.evaluate import evaluate, save_grid

    report, images, prompts = evaluate(pipeline or demo.path(model), **options)
    if grid is not None:
        save_grid(images[:48], grid)
        for prompt in prompts[:48]:
            print(prompt)
    print(json.dumps(report.as_dict(), indent=1))


def _render(size: tuple[int, int], seed: int, out: Path) -> None:
    import numpy as np
    from PIL import Image

    from distrifusion.demo.painting import render
    from distrifusion.demo.scenes import sample_caption, sample_scene

    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    Image.fromarray(render(scene, *size)).save(out)
    print(f"{out}: {sample_caption(scene, rng)[0]}")


if __name__ == "__main__":
    main()
