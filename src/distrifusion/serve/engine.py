"""One thread that draws what the queue holds, on one pipeline; the only place here that waits for a device."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distrifusion.errors import Cancelled, ConfigError, DistrifusionError
from distrifusion.serve.request import Order
from distrifusion.serve.scheduler import Scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

    from distrifusion.runtime.pipeline import LoadedPipeline
    from distrifusion.runtime.timing import RunTimes

_LOGGER = logging.getLogger(__name__)
# A call that is about to begin does not hear `cancel()`, so it is said again after so many seconds.
_AGAIN = 0.1
# Seconds in which a cancelled call reaches the end of its step.
FAREWELL = 60.0


class Closing(Exception):
    """The server is being stopped."""

    def __init__(self) -> None:
        super().__init__("the server is being stopped; ask again when it is back")


@dataclass(frozen=True)
class Drawn:
    """What a request gave.

    Attributes:
        seconds: from the beginning of its own drawing.
        times: of its steps.
    """

    pictures: list[Image]
    seeds: tuple[int, ...]
    seconds: float
    times: RunTimes


@dataclass(frozen=True)
class Failure:
    """What went wrong in a request that was in order.

    Attributes:
        at: seconds since the epoch.
    """

    at: int
    message: str


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        id: by which the outside knows it.
        number: by which the scheduler knows it.
        outcome: what it gave or how it failed.
    """

    id: str
    number: int
    order: Order
    outcome: Future[Drawn] = field(default_factory=Future)
    cancelled: bool = False


class Engine:
    """Draws requests one after the other. All methods may be called from any thread, and none waits but `close`.

    Args:
        pipe: which nobody else calls meanwhile; whoever loaded it closes it, after the engine.
        max_queue: how many requests may wait for the one that is being drawn.

    Attributes:
        last_failure: None until one was seen; what a request itself did wrong is none.
    """

    def __init__(self, pipe: LoadedPipeline, max_queue: int = 16) -> None:
        if max_queue < 0:
            raise ConfigError(f"max_queue={max_queue} must be at least 0")
        self.pipe = pipe
        self.last_failure: Failure | None = None
        self._scheduler = Scheduler(max_queue)
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._drawing: Job | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return self._scheduler.num_waiting

    @property
    def num_drawn(self) -> int:
        """How many are being drawn."""
        return self._scheduler.num_drawn

    @property
    def is_closing(self) -> bool:
        """True if no more requests are taken."""
        return self._closing

    def submit(self, id: str, order: Order) -> Job:
        """Let a request wait for its turn.

        Raises:
            ConfigError: if a request of this id is on its way.
            QueueFull: if too many wait.
            Closing: if no more are taken.
        """
        with self._changed:
            if self._closing:
                raise Closing
            if self._find(id) is not None:
                raise ConfigError(f"X-Request-Id='{id}' is the id of a request on its way; choose another")
            job = Job(id, next(self._numbers), order)
            self._scheduler.add(job.number, order.work)
            job.outcome.set_running_or_notify_cancel()  # whoever waits for it cannot cancel the future itself
            self._jobs[job.number] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="distrifusion-engine", daemon=True)
                self._thread.start()
            self._changed.notify()
            return job

    def cancel(self, id: str) -> bool:
        """End a request: at once if it waits, after its step if it is being drawn; False if it is not known."""
        with self._changed:
            job = self._find(id)
            if job is None:
                return False
            if self._scheduler.withdraw(job.number):
                self._settle(job, Cancelled("the request was cancelled before it was begun"))
            elif not job.cancelled:
                job.cancelled = True
                threading.Thread(target=self._insist, args=(job,), daemon=True).start()
            return True

    def ahead(self, job: Job) -> int:
        """How many requests are drawn before this one."""
        with self._changed:
            return self._scheduler.ahead(job.number)

    def step(self, job: Job) -> int | None:
        """Finished steps of a request, None while it has no steps to show."""
        with self._changed:
            return self.pipe.current_step if self._drawing is job else None

    def close(self, limit: float) -> bool:
        """Take no more requests, give up those that wait, and end the one that is being drawn.

        Args:
            limit: seconds that it gets to come to its own end before it is cancelled.

        Returns:
            False if the pipeline still draws; then it cannot be closed.
        """
        with self._changed:
            self._closing = True
            for number in self._scheduler.withdraw_all():
                self._settle(self._jobs[number], Closing())
            self._changed.notify()
        if self._thread is None:
            return True
        self._thread.join(limit)
        drawing = self._drawing
        if drawing is not None:
            self.cancel(drawing.id)
        self._thread.join(FAREWELL)
        return not self._thread.is_alive()

    def _find(self, id: str) -> Job | None:
        return next((job for job in self._jobs.values() if job.id == id), None)

    def _insist(self, job: Job) -> None:
        while not job.outcome.done():
            with self._changed:
                if self._drawing is job:
                    self.pipe.cancel()
            wait([job.outcome], _AGAIN)

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            began = time.monotonic()
            try:
                outcome: Drawn | BaseException = self._draw(job)
            except BaseException as error:
                outcome = error
            with self._changed:
                self._drawing = None
                took = round((time.monotonic() - began) * 1000) if isinstance(outcome, Drawn) else None
                self._scheduler.ended(job.number, took)
                if isinstance(outcome, Cancelled) and self._closing:
                    outcome = Closing()
                self._settle(job, outcome)

    def _next(self) -> Job | None:
        """The next request, waited for; None when the engine is closed."""
        with self._changed:
            while (number := self._scheduler.next()) is None:
                if self._closing:
                    return None
                self._changed.wait()
            self._drawing = self._jobs[number]
            return self._drawing

    def _draw(self, job: Job) -> Drawn:
        import torch

        began = time.monotonic()
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in job.order.seeds]
        # A list for several pictures: each one comes from its own seed, and can be drawn again alone.
        generator: Any = generators if len(generators) > 1 else generators[0]
        output = self.pipe(**job.order.arguments, generator=generator)
        times = self.pipe.last_run
        assert times is not None
        return Drawn(list(output.images), job.order.seeds, time.monotonic() - began, times)

    def _settle(self, job: Job, outcome: Drawn | BaseException) -> None:
        del self._jobs[job.number]
        if isinstance(outcome, Drawn):
            job.outcome.set_result(outcome)
            return
        if not isinstance(outcome, Cancelled | Closing | ValueError):
            self.last_failure = Failure(round(time.time()), f"{type(outcome).__name__}: {outcome}")
            # Errors of this library say all in one line; of others the way to them is wanted.
            known = isinstance(outcome, DistrifusionError)
            _LOGGER.error("request %s failed: %s", job.id, outcome, exc_info=None if known else outcome)
        job.outcome.set_exception(outcome)
