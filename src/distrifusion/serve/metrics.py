"""What a monitor may ask, in the form of Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from distrifusion.serve.engine import Drawn, Engine
from distrifusion.serve.faults import Fault

_PICTURE = (0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
_STEP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Of one application; two in one process do not mix.

    Attributes:
        registry: holds all of them.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "distrifusion_requests",
            "Requests for pictures that have ended, by outcome: ok, or the code of the error.",
            ["outcome"],
            registry=self.registry,
        )
        self._picture = Histogram(
            "distrifusion_request_seconds",
            "Drawing of a request, waiting left out.",
            buckets=_PICTURE,
            registry=self.registry,
        )
        self._step = Histogram(
            "distrifusion_step_seconds", "One denoising step.", buckets=_STEP, registry=self.registry
        )
        self._pictures = Counter("distrifusion_pictures", "Pictures that were drawn.", registry=self.registry)
        waiting = Gauge("distrifusion_queue_length", "Requests that wait.", registry=self.registry)
        waiting.set_function(lambda: engine.num_waiting)
        drawn = Gauge("distrifusion_drawing", "Requests that are being drawn.", registry=self.registry)
        drawn.set_function(lambda: engine.num_drawn)
        plan = Info("distrifusion_plan", "What is divided, over what.", registry=self.registry)
        plan.info({"model": model, "plan": str(engine.pipe.plan), "devices": ",".join(map(str, engine.pipe.devices))})

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count how the request within ends."""
        try:
            yield
        except Fault as fault:
            self.ended(fault.code)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.ended("cancelled")
            raise
        except Exception:
            self.ended("internal_error")
            raise
        self.ended("ok")

    def ended(self, outcome: str) -> None:
        """A request has ended."""
        self._requests.labels(outcome=outcome).inc()

    def drew(self, drawn: Drawn) -> None:
        """Note the times of a request."""
        self._picture.observe(drawn.seconds)
        self._pictures.inc(len(drawn.pictures))
        for before, after in pairwise(drawn.times.steps):
            self._step.observe(after - before)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
