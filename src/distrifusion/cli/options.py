"""Options that several commands have, and what their words mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from distrifusion.errors import ConfigError

# By the names that diffusers users give them.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++sde": "DPMSolverSDEScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
DTYPES = ("float32", "bfloat16", "float16")

PICTURE = "What to draw"
DIVISION = "Where and how to divide it"
OUTPUT = "What comes out"

_MAX_SEED = 2**63 - 1


class Format(StrEnum):
    """How a command answers."""

    TEXT = "text"
    JSON = "json"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="'demo' or 'demo-dit' (the embedded models), a folder of a diffusers pipeline, or a hub id such as "
        "stabilityai/stable-diffusion-xl-base-1.0.",
        show_default=False,
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt",
        metavar="TEXT",
        help="What to keep out of the picture.",
        show_default=False,
        rich_help_panel=PICTURE,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="In pixels, multiples of 8. "
        r"[dim]\[default: the model's own; 512x512 for demo, 256x256 for demo-dit][/dim]",
        show_default=False,
        rich_help_panel=PICTURE,
    ),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Denoising steps.", rich_help_panel=PICTURE)]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        metavar="WEIGHT",
        help="Of the prompt; 1 or below draws without guidance, in half the time. "
        r"[dim]\[default: the model's own][/dim]",
        show_default=False,
        rich_help_panel=PICTURE,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="NAME",
        help=rf"One of {', '.join(SCHEDULERS)}. [dim]\[default: the model's own][/dim]",
        show_default=False,
        rich_help_panel=PICTURE,
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        metavar="NAME",
        help="Solve many steps at once, for idle devices: picard (few devices) or taa (many). The picture is that of "
        r"the scheduler, to a tolerance. [dim]\[default: one step after the other][/dim]",
        show_default=False,
        rich_help_panel=PICTURE,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        metavar="N",
        help=r"Of --sampler: steps that are solved at once. [dim]\[default: all][/dim]",
        show_default=False,
        rich_help_panel=PICTURE,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="X",
        help=r"Of --sampler: how exactly a step is solved. [dim]\[default: 3e-5, which leaves about 1e-3][/dim]",
        show_default=False,
        rich_help_panel=PICTURE,
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", metavar="NAME", help=f"Of the weights: {', '.join(DTYPES)}.", rich_help_panel=PICTURE),
]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        "-d",
        metavar="DEVICES",
        help="How many (2: GPUs where CUDA is, else CPU processes) or which (0,1  cuda:1  cpu  cpu,cpu). "
        r"[dim]\[default: as the plan needs, else all GPUs, else one CPU][/dim]",
        show_default=False,
        rich_help_panel=DIVISION,
    ),
]
WishedPlan = Annotated[
    str | None,
    typer.Option(
        "--plan",
        metavar="PLAN",
        help="What to divide: words joined by dots. cfg2: the two branches of guidance; dp2: several pictures; "
        "patch4: four bands of rows; displaced: old keys and values, not exact; fresh1: nearer; delta4: few "
        "bytes, for slow links; w4: warm-up calls that stay exact; tp2: the weights of every layer; async2: parts "
        "of the network at once; for transformers also ulysses2, ring2 and pipe2; see docs/methods.md. "
        "auto: the fastest on this machine that keeps --fidelity. "
        r"[dim]\[default: the exact plan for the devices][/dim]",
        show_default=False,
        rich_help_panel=DIVISION,
    ),
]
WishedFidelity = Annotated[
    str | None,
    typer.Option(
        "--fidelity",
        metavar="WISH",
        help="With --plan auto, how near to one device's pictures: exact (to rounding), close (about 45 dB and more on "
        r"the embedded model), any. [dim]\[default: exact][/dim]",
        show_default=False,
        rich_help_panel=DIVISION,
    ),
]
Graphs = Annotated[
    bool,
    typer.Option(
        "--graphs",
        help="Capture denoiser calls that repeat, and replay them without the model's Python.",
        rich_help_panel=DIVISION,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Also write when every device computes, posts and waits, layer by layer: a Chrome trace (.json or "
        ".json.gz), to be opened in ui.perfetto.dev or chrome://tracing.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
AnswerFormat = Annotated[
    Format,
    typer.Option("--format", help="json: one JSON document on standard output.", rich_help_panel=OUTPUT),
]


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels from `512x384`.

    Raises:
        ConfigError: if it has another form.
    """
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if match is None:
        raise ConfigError(f"size '{text}' is not of the form WIDTHxHEIGHT, such as 512x384")
    return int(match[1]), int(match[2])


def one_of(word: str, known: Iterable[str], what: str) -> str:
    """The word in lower case.

    Raises:
        ConfigError: if it is not known; `what` says what it should be.
    """
    if word.lower() not in known:
        raise ConfigError(f"{what} '{word}' is unknown; it is one of {', '.join(known)}")
    return word.lower()


def scheduler_class(word: str | None) -> str | None:
    """The diffusers class of a scheduler's short name; None for the model's own.

    Raises:
        ConfigError: if the name is not known.
    """
    return None if word is None else SCHEDULERS[one_of(word, SCHEDULERS, "scheduler")]


def check_seed(seed: int) -> int:
    """The seed.

    Raises:
        ConfigError: if torch cannot take it.
    """
    if not 0 <= seed <= _MAX_SEED:
        raise ConfigError(f"seed {seed} is not in 0 to 2**63 - 1")
    return seed
