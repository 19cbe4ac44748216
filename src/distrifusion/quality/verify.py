"""A plan against one device: the same seeds drawn by both, and everything that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from distrifusion import demo
from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.loading import load
from distrifusion.plan import Plan
from distrifusion.quality import metrics, seams
from distrifusion.quality.comparison import Result, compare
from distrifusion.quality.landscapes import Gallery
from distrifusion.quality.networks import Networks
from distrifusion.quality.recording import Guard, Recording, Shelf, record
from distrifusion.quality.seams import Cut
from distrifusion.runtime import devices as device_specs
from distrifusion.runtime import source as sources
from distrifusion.runtime.pipeline import LoadedPipeline
from distrifusion.timeline import Timeline

PLAN, REFERENCE = "plan", "one-device"
# Seeds that are drawn again on one device, to see what is noise: enough for a magnitude.
FLOOR_SEEDS = 2


@dataclass(frozen=True)
class Task:
    """What is drawn by both.

    Attributes:
        source: an embedded model, a folder or a hub id.
        devices: of the plan, one per rank.
        seeds: of the noise, one picture each.
        prompts: seed `s` draws prompt `s % len(prompts)`, so that a seed alone repeats its picture.
        arguments: of the pipeline's call, without prompt and generator.
        scheduler: a diffusers class, None for the model's own.
        keywords: for `from_pretrained`.
        half_keywords: the same with bfloat16, to draw on one device once more; None to leave that out.
        traced: also note what the ranks do while the plan draws the first seed.
    """

    source: str
    devices: tuple[torch.device, ...]
    plan: Plan
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    scheduler: str | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    half_keywords: Mapping[str, Any] | None = None
    traced: bool = False

    def prompt(self, seed: int) -> str:
        """The prompt that this seed draws."""
        return self.prompts[seed % len(self.prompts)]

    @property
    def threads(self) -> int | None:
        """CPU threads of every rank and of the one device; None on GPUs, where they do not matter."""
        return device_specs.threads_per_rank(self.devices) if self.devices[0].type == "cpu" else None

    @property
    def is_demo(self) -> bool:
        """True if the demo models' classifier can read the pictures."""
        return demo.find(self.source) is not None


@dataclass(frozen=True)
class Floor:
    """What differs although nothing is divided.

    Attributes:
        title: what was done otherwise on the one device, such as '2 threads instead of 1'.
    """

    title: str
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Outcome:
    """All that was measured.

    Attributes:
        cuts: where the plan cut the pictures; empty if it did not.
        results: one for every seed, in the task's order.
        together: figures of all pictures together, by key of `measures.SET_MEASURES`.
        accuracy: what pictures of a demo model show right, by whose they are and attribute.
        frechet: Frechet distances between sets of pictures of a demo model.
        skipped: what was not measured, and why.
        size: width and height of the pictures.
        timeline: what the ranks did while the plan drew the first seed, if it was traced.
    """

    task: Task
    cuts: tuple[Cut, ...]
    results: tuple[Result, ...]
    floors: tuple[Floor, ...]
    together: Mapping[str, float]
    accuracy: Mapping[str, Mapping[str, float]]
    frechet: Mapping[str, float]
    skipped: Mapping[str, str]
    size: tuple[int, int]
    timeline: Timeline | None = None


def verify(task: Task, shelf: Shelf, guard: Guard = nullcontext) -> Outcome:
    """Draw every seed by the plan, then on one device, and measure the differences.

    On CPU the one device is one process with the threads of one rank, because a rank stands for a device. The plan
    goes first: what it cannot divide is said before an hour of pictures.

    Args:
        shelf: takes the recordings; pictures can be read from it afterwards by `PLAN` and `REFERENCE`.
        guard: entered around every call of a pipeline.

    Raises:
        Whatever loading and calling the pipeline raises.
    """
    studio = _Studio(task, shelf, guard)
    timeline: Timeline | None = None
    with studio.loaded(task.devices, task.plan, task.threads, task.keywords) as pipe:
        for seed, recording in studio.draw_all(pipe, task.seeds, str(task.plan), task.traced):
            timeline = timeline or recording.timeline
            shelf.put(PLAN, seed, recording)
    gallery = Gallery() if task.is_demo else None
    networks = Networks.found()
    with studio.loaded(task.devices[:1], Plan(), task.threads, task.keywords) as pipe:
        cuts, results = _against_one_device(studio, pipe, gallery, networks)
    frechet = gallery.frechet() if gallery else {}
    together = {**networks.together(), **({"frechet": frechet["plan to one device"]} if frechet else {})}
    return Outcome(
        task,
        cuts,
        results,
        tuple(_floors(studio)),
        together,
        gallery.accuracy() if gallery else {},
        frechet,
        {**networks.skipped, **_skipped(task, results[0])},
        shelf.picture(PLAN, task.seeds[0]).size,
        timeline,
    )


@dataclass(frozen=True)
class _Studio:
    """Loads and calls pipelines for a task."""

    task: Task
    shelf: Shelf
    guard: Guard

    @contextmanager
    def loaded(
        self, where: tuple[torch.device, ...], plan: Plan, threads: int | None, keywords: Mapping[str, Any]
    ) -> Iterator[LoadedPipeline]:
        """The pipeline, with the task's scheduler."""
        with load(self.task.source, where, plan, threads=threads, **keywords) as pipe:
            if self.task.scheduler is not None:
                pipe.scheduler = getattr(diffusers, self.task.scheduler).from_config(pipe.scheduler.config)
            yield pipe

    def draw_all(
        self, pipe: LoadedPipeline, seeds: Sequence[int], label: str, first_traced: bool = False
    ) -> Iterator[tuple[int, Recording]]:
        """The pictures of some seeds, one after the other."""
        facts = sources.find(self.task.source, {}).facts
        calls_back = facts is None or sources.takes_step_callback(facts.cls)
        for place, seed in enumerate(seeds, 1):
            arguments = {**self.task.arguments, "prompt": self.task.prompt(seed)}
            says = f"{label}, seed {seed} ({place}/{len(seeds)})"
            traced = first_traced and place == 1
            yield seed, record(pipe, arguments, seed, says, calls_back, self.guard, traced)


def _against_one_device(
    studio: _Studio, pipe: LoadedPipeline, gallery: Gallery | None, networks: Networks
) -> tuple[tuple[Cut, ...], tuple[Result, ...]]:
    """Draw every seed on one device and compare."""
    cuts: tuple[Cut, ...] = ()
    results: list[Result] = []
    for seed, theirs in studio.draw_all(pipe, studio.task.seeds, "one device"):
        studio.shelf.put(REFERENCE, seed, theirs)
        ours = studio.shelf.get(PLAN, seed)
        cuts = cuts if results else _cuts(studio.task.plan, pipe, theirs.picture.size)
        prompt = studio.task.prompt(seed)
        more = networks.add(prompt, ours.picture, theirs.picture)
        if gallery is not None:
            more["agreement"] = gallery.add(prompt, ours.picture, theirs.picture)
        results.append(compare(seed, prompt, ours, theirs, cuts, pipe.vae_scale_factor, more))
    return cuts, tuple(results)


def _cuts(plan: Plan, pipe: LoadedPipeline, size: tuple[int, int]) -> tuple[Cut, ...]:
    """Where the plan cuts pictures of this size, which `pipe` has just drawn whole."""
    unet = getattr(pipe, "unet", None)
    anatomy = None if unet is None else anatomy_of(unet)
    if anatomy is None or isinstance(anatomy, TokenAnatomy):  # tokens are cut within a row
        return ()
    num_rows = 2 if getattr(pipe, "do_classifier_free_guidance", True) else 1
    num_levels = anatomy.num_levels(unet)
    return seams.cuts(plan, num_rows, size, pipe.vae_scale_factor, num_levels)


def _floors(studio: _Studio) -> Iterator[Floor]:
    """The first seeds once more on one device, with what should not matter changed."""
    task = studio.task
    if task.threads is None:
        yield _floor(studio, "drawn a second time", None, task.keywords)
    else:
        others = 1 if task.threads > 1 else 2
        title = f"{others} thread{'s' * (others > 1)} instead of {task.threads}"
        yield _floor(studio, title, others, task.keywords)
    if task.half_keywords is not None:
        yield _floor(studio, "in bfloat16", task.threads, task.half_keywords)


def _floor(studio: _Studio, title: str, threads: int | None, keywords: Mapping[str, Any]) -> Floor:
    task, results = studio.task, []
    with studio.loaded(task.devices[:1], Plan(), threads, keywords) as pipe:
        for seed, again in studio.draw_all(pipe, task.seeds[:FLOOR_SEEDS], f"one device, {title}"):
            theirs = studio.shelf.get(REFERENCE, seed)
            results.append(compare(seed, task.prompt(seed), again, theirs))
    return Floor(title, tuple(results))


def _skipped(task: Task, result: Result) -> dict[str, str]:
    """Why a measure is missing that a reader may look for."""
    reasons = {
        "ssim": f"a side of the picture is below {metrics.SSIM_PIXELS} pixels",
        "ms_ssim": f"a side of the picture is below {metrics.MS_SSIM_PIXELS} pixels",
        "latent_error": "the pipeline does not call back after a step",
        "seam": "the picture is not cut into bands",
        "agreement": "the classifier reads pictures of the demo models only",
    }
    skipped = {key: reason for key, reason in reasons.items() if key not in result.values}
    if not task.is_demo:
        skipped["frechet"] = reasons["agreement"]
    elif len(task.seeds) < 2:
        skipped["frechet"] = "it takes two seeds or more"
    return skipped
