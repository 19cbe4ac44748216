"""Runs of all cases by turns, so that what the machine does meanwhile falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from distrifusion.bench.cases import PLAIN, Case, Row, Run
from distrifusion.loading import load
from distrifusion.memory.use import MemoryUse, weighing
from distrifusion.plan import Plan
from distrifusion.quality.metrics import psnr, ssim
from distrifusion.runtime.pipeline import LoadedPipeline
from distrifusion.runtime.source import find
from distrifusion.runtime.timing import StepClock

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is drawn in every run.

    Attributes:
        model: "demo", a folder or a hub id.
        call: arguments of the pipeline's call, without size and noise.
        seed: of the noise.
        keywords: of `from_pretrained`.
        where: the devices, as many as the largest case takes.
        threads: of every rank on CPU, and of the plain pipeline.
        repeat: runs of every case after one that warms up and is weighed.
        traces: folder for timelines; None draws none.
    """

    model: str
    call: Mapping[str, Any]
    seed: int
    keywords: Mapping[str, Any]
    where: tuple[torch.device, ...]
    threads: int
    repeat: int
    traces: Path | None


def measure(order: Order, cases: list[Case], say: Say) -> list[Row]:
    """Run every case once to warm up and `repeat` times by turns; failures stay in their rows."""
    rows = [Row(case) for case in cases]
    pictures: dict[tuple[int, int], Any] = {}
    with _Pipelines(order) as pipelines:
        for turn in range(order.repeat + 1):
            for row in rows:
                if row.runs and row.runs[-1].error:
                    continue
                weighed: list[MemoryUse] | None = None if turn else row.memory
                run, picture = _one(order, row.case, pipelines, weighed)
                say(f"{'warm-up' if not turn else f'run {turn}'}: {row.case}: {run.error or f'{run.seconds:.3g} s'}")
                if turn == 0 and picture is not None:
                    _compare(row, picture, pictures)
                if turn or run.error:
                    row.runs.append(run)
        for row in rows if order.traces else ():
            if not row.runs[-1].error and row.case.plan is not None and row.case.plan.num_ranks > 1:
                try:
                    _trace(order, row, pipelines)
                except Exception as error:  # what was measured is not lost with it
                    say(f"no timeline of {row.case}: {_in_words(error)}")
    return rows


class _Pipelines:
    """One pipeline for each plan. CPU ranks share their weights, so all stay open; GPUs hold one at a time."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._open: dict[Plan | None, Any] = {}

    def __enter__(self) -> _Pipelines:
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def get(self, plan: Plan | None) -> Any:
        """The pipeline of a plan; None is a plain one."""
        if plan not in self._open:
            if self._order.where[0].type != "cpu":
                self._close()
            self._open[plan] = self._load(plan)
        return self._open[plan]

    def drop(self, plan: Plan | None) -> None:
        """Close one that failed."""
        pipe = self._open.pop(plan, None)
        if isinstance(pipe, LoadedPipeline):
            pipe.close()

    def _load(self, plan: Plan | None) -> Any:
        order = self._order
        if plan is None:
            pipe: Any = find(order.model, order.keywords).open(order.where[0])
        else:
            devices = list(order.where[: plan.num_ranks])
            pipe = load(order.model, devices, plan, threads=order.threads, **order.keywords)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _close(self) -> None:
        for plan in list(self._open):
            self.drop(plan)


def _one(order: Order, case: Case, pipelines: _Pipelines, memory: list[MemoryUse] | None) -> tuple[Run, Any]:
    """One call, and its first picture; whatever ends it is the run's error, so that other rows are not lost.

    Args:
        memory: takes what every rank held; None: the call is not weighed.
    """
    try:
        pipe = pipelines.get(case.plan)
        with _weighed(order, pipe, memory), _foreign() as foreign:
            seconds, per_step, picture = _draw(order, case, pipe)
        return Run(seconds, per_step, foreign()), picture
    except Exception as error:
        pipelines.drop(case.plan)
        return Run(error=_in_words(error)), None


def _in_words(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


@contextmanager
def _weighed(order: Order, pipe: Any, memory: list[MemoryUse] | None) -> Iterator[None]:
    """What the pipeline takes within the block; a plain one is in this process."""
    if memory is None:
        yield
    elif isinstance(pipe, LoadedPipeline):
        with pipe.weigh() as found:
            yield
        memory[:] = found
    else:
        use = weighing(order.where[0])
        yield
        memory[:] = [use()]


def _draw(order: Order, case: Case, pipe: Any) -> tuple[float, float, Any]:
    noise = [torch.Generator("cpu").manual_seed(order.seed + i) for i in range(case.pictures)]
    call = {
        **order.call,
        "width": case.size[0],
        "height": case.size[1],
        "generator": noise if case.pictures > 1 else noise[0],
    }
    if case.pictures > 1:
        call["num_images_per_prompt"] = case.pictures
    if case.label != PLAIN:
        picture = pipe(**call).images[0]
        times = pipe.last_run
        return times.total, times.seconds_per_step, picture
    clock, last = StepClock(order.where[0]), order.call["num_inference_steps"] - 1

    def stepped(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        clock.step_ended(step == last, given)
        return given

    before = torch.get_num_threads()
    torch.set_num_threads(order.threads)
    try:
        picture = pipe(**call, callback_on_step_end=stepped).images[0]
    finally:
        torch.set_num_threads(before)
    times = clock.times()
    return times.total, times.seconds_per_step, picture


def _compare(row: Row, picture: Any, pictures: dict[tuple[int, int], Any]) -> None:
    """Measure against the plain pipeline's picture of the same size, which comes first."""
    if row.case.label == PLAIN:
        pictures[row.case.size] = picture
    elif row.case.size in pictures:
        row.psnr, row.ssim = psnr(picture, pictures[row.case.size]), ssim(picture, pictures[row.case.size])


def _trace(order: Order, row: Row, pipelines: _Pipelines) -> None:
    assert order.traces is not None
    pipe = pipelines.get(row.case.plan)
    with pipe.trace() as timeline:
        _draw(order, row.case, pipe)
    order.traces.mkdir(parents=True, exist_ok=True)
    file = order.traces / f"{row.case.label}-{row.case.devices}-{row.case.size[0]}x{row.case.size[1]}.json.gz"
    timeline.write(file)
    row.trace = file.name


@contextmanager
def _foreign() -> Iterator[Callable[[], float]]:
    """Cores' worth of time that processes other than this one and its own take within."""
    start, busy, own = time.perf_counter(), _busy(), _own()
    found = [0.0]
    yield lambda: found[0]
    seconds = time.perf_counter() - start
    found[0] = max(0.0, (_busy() - busy - (_own() - own)) / max(seconds, 1e-9))


def _busy() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _own() -> float:
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue  # ended meanwhile
    return total
