"""A plan against one device: the same seeds drawn by both, and everything that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from distrifusion import demo
from distrifusion.anatomy import anatomy_of
from distrifusion.loading import load
from distrifusion.plan import Plan
from distrifusion.quality import metrics
from distrifusion.quality.comparison import Bands, Result, compare
from distrifusion.quality.landscapes import Gallery
from distrifusion.quality.networks import Networks
from distrifusion.quality.recording import Guard, Recording, Shelf, record
from distrifusion.quality.seams import band_borders
from distrifusion.runtime import devices as device_specs
from distrifusion.runtime import source as sources
from distrifusion.runtime.pipeline import LoadedPipeline

PLAN, REFERENCE = "plan", "one-device"
# Seeds that are drawn again on one device, to see what is noise: enough for a magnitude.
FLOOR_SEEDS = 2


@dataclass(frozen=True)
class Task:
    """What is drawn by both.

    Attributes:
        source: 'demo', a folder or a hub id.
        devices: of the plan, one per rank.
        seeds: of the noise, one picture each.
        prompts: seed `s` draws prompt `s % len(prompts)`, so that a seed alone repeats its picture.
        arguments: of the pipeline's call, without prompt and generator.
        scheduler: a diffusers class, None for the model's own.
        keywords: for `from_pretrained`.
        half_keywords: the same with bfloat16, to draw on one device once more; None to leave that out.
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

    def prompt(self, seed: int) -> str:
        """The prompt that this seed draws."""
        return self.prompts[seed % len(self.prompts)]

    @property
    def threads(self) -> int | None:
        """CPU threads of every rank and of the one device; None on GPUs, where they do not matter."""
        return device_specs.threads_per_rank(self.devices) if self.devices[0].type == "cpu" else None

    @property
    def is_demo(self) -> bool:
        """True if the demo model's classifier can read the pictures."""
        return self.source in ("demo", str(demo.path()))


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
        results: one for every seed, in the task's order.
        together: figures of all pictures together, by key of `measures.SET_MEASURES`.
        accuracy: what pictures of the demo model show right, by whose they are and attribute.
        frechet: Frechet distances between sets of pictures of the demo model.
        skipped: what was not measured, and why.
        size: width and height of the pictures.
    """

    task: Task
    bands: Bands
    results: tuple[Result, ...]
    floors: tuple[Floor, ...]
    together: Mapping[str, float]
    accuracy: Mapping[str, Mapping[str, float]]
    frechet: Mapping[str, float]
    skipped: Mapping[str, str]
    size: tuple[int, int]


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
    with studio.loaded(task.devices, task.plan, task.threads, task.keywords) as pipe:
        for seed in task.seeds:
            shelf.put(PLAN, seed, studio.draw(pipe, seed, str(task.plan)))
    gallery = Gallery() if task.is_demo else None
    networks = Networks.found()
    with studio.loaded(task.devices[:1], Plan(), task.threads, task.keywords) as pipe:
        bands, results = _against_one_device(studio, pipe, gallery, networks)
    frechet = gallery.frechet() if gallery else {}
    together = {**networks.together(), **({"frechet": frechet["plan to one device"]} if frechet else {})}
    return Outcome(
        task,
        bands,
        results,
        tuple(_floors(studio)),
        together,
        gallery.accuracy() if gallery else {},
        frechet,
        {**networks.skipped, **_skipped(task, results[0], bands)},
        shelf.picture(PLAN, task.seeds[0]).size,
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

    def draw(self, pipe: LoadedPipeline, seed: int, label: str) -> Recording:
        """One seed's picture."""
        facts = sources.find(self.task.source, {}).facts
        calls_back = facts is None or sources.takes_step_callback(facts.cls)
        arguments = {**self.task.arguments, "prompt": self.task.prompt(seed)}
        place = f"{self.task.seeds.index(seed) + 1}/{len(self.task.seeds)}"
        return record(pipe, arguments, seed, f"{label}, seed {seed} ({place})", calls_back, self.guard)


def _against_one_device(
    studio: _Studio, pipe: LoadedPipeline, gallery: Gallery | None, networks: Networks
) -> tuple[Bands, tuple[Result, ...]]:
    """Draw every seed on one device and compare."""
    bands, results = None, []
    for seed in studio.task.seeds:
        theirs = studio.draw(pipe, seed, "one device")
        studio.shelf.put(REFERENCE, seed, theirs)
        ours = studio.shelf.get(PLAN, seed)
        bands = bands or _bands(studio.task.plan, pipe, theirs.picture.size)
        prompt = studio.task.prompt(seed)
        more = networks.add(prompt, ours.picture, theirs.picture)
        if gallery is not None:
            more["agreement"] = gallery.add(prompt, ours.picture, theirs.picture)
        results.append(compare(seed, prompt, ours, theirs, bands, more))
    assert bands is not None
    return bands, tuple(results)


def _bands(plan: Plan, pipe: LoadedPipeline, size: tuple[int, int]) -> Bands:
    """Where the plan cuts pictures of this size, which `pipe` has just drawn whole."""
    num_rows = 2 if pipe.do_classifier_free_guidance else 1
    num_levels = anatomy_of(pipe.unet).num_levels(pipe.unet)
    factor = pipe.vae_scale_factor
    return Bands(plan.split, band_borders(plan, num_rows, size, factor, num_levels), factor)


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
    task, whole = studio.task, Bands(studio.task.plan.split, (), 1)
    results = []
    with studio.loaded(task.devices[:1], Plan(), threads, keywords) as pipe:
        for seed in task.seeds[:FLOOR_SEEDS]:
            again = studio.draw(pipe, seed, f"one device, {title}")
            theirs = studio.shelf.get(REFERENCE, seed)
            results.append(compare(seed, task.prompt(seed), again, theirs, whole, {}))
    return Floor(title, tuple(results))


def _skipped(task: Task, result: Result, bands: Bands) -> dict[str, str]:
    """Why a measure is missing that a reader may look for."""
    reasons = {
        "ms_ssim": f"a side of the picture is below {metrics.MS_SSIM_PIXELS} pixels",
        "latent_error": "the pipeline does not call back after a step",
        "seam": "the plan does not cut the picture" if not bands.borders else "",
        "agreement": "the classifier reads pictures of the demo model only",
    }
    skipped = {key: reason for key, reason in reasons.items() if key not in result.values}
    if not task.is_demo:
        skipped["frechet"] = reasons["agreement"]
    elif len(task.seeds) < 2:
        skipped["frechet"] = "it takes two seeds or more"
    return skipped
