"""One call of a pipeline whose loop serves a sampler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from distrifusion.engine import words
from distrifusion.engine.pipelines import LoopFacts, facts_of
from distrifusion.engine.prepared import Prepared
from distrifusion.engine.rounds import Rounds
from distrifusion.engine.rows import with_rows
from distrifusion.engine.words import SamplerWish
from distrifusion.errors import ConfigError
from distrifusion.plan import Plan
from distrifusion.samplers.diffusers_loop import diffusers_loop
from distrifusion.samplers.evaluations import Evaluations, Sampler
from distrifusion.samplers.noise import RunningNoise
from distrifusion.samplers.schedules import tableau_of
from distrifusion.samplers.window import Agree, Start, solve
from distrifusion.strategies.attach import Attachment

_KEPT = "_kept_trajectory"


@contextmanager
def sampled(
    pipe: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan | None = None,
    agree: Agree = lambda solved: solved,
) -> Iterator[dict[str, Any]]:
    """Within the block the pipeline's loop serves the sampler that a call's keywords name; without one nothing changes.

    Args:
        pipe: the pipeline, parallelized or not.
        args, kwargs: of the call.
        plan: by which the pipeline is divided.
        agree: makes the ranks decide alike.

    Yields:
        The keywords for the pipeline itself.

    Raises:
        ConfigError, PlanError: if the pipeline, its scheduler, plan or an argument cannot go with the sampler.

    Every rank calls it.
    """
    wish, rest = words.take(kwargs)
    if wish is None:
        yield rest
        return
    named = inspect.signature(type(pipe).__call__).bind_partial(pipe, *args, **rest).arguments
    asked = {name: value for name, value in kwargs.items() if name in words.WORDS}
    words.check(type(pipe), plan, pipe.scheduler, {**named, **asked})
    run = _Run(pipe, words.for_plan(wish, plan), facts_of(type(pipe)), named, agree)
    before = pipe.scheduler
    replaced = Attachment()
    try:
        pipe.scheduler = run.stand_in
        run.prepared.watch(pipe, replaced)
        for name in run.facts.denoisers:
            replaced.replace(getattr(pipe, name), "forward", run.widen)
        yield rest
    finally:
        replaced.detach()
        pipe.scheduler = before


class _Run:
    """What the pipeline's loop meets in place of its scheduler and denoiser.

    Attributes:
        stand_in: a copy of the scheduler, of the same class and configuration, that serves the sampler.
        prepared: what the pipeline prepares before its loop.
    """

    def __init__(
        self, pipe: Any, wish: SamplerWish, facts: LoopFacts, arguments: Mapping[str, Any], agree: Agree
    ) -> None:
        self.facts = facts
        self.prepared = Prepared(arguments)
        self._pipe = pipe
        self._wish = wish
        self._arguments = arguments
        self._agree = agree
        self._scheduler = copy.deepcopy(pipe.scheduler)
        self.stand_in = copy.deepcopy(pipe.scheduler)
        methods = {
            "set_timesteps": self._set_timesteps,
            "set_begin_index": self._set_begin_index,
            "scale_model_input": self._leave,
            "step": self._step,
            "add_noise": self._noised,
            "scale_noise": self._noised,
        }
        replaced = Attachment()
        for name, make in methods.items():
            if hasattr(self.stand_in, name):
                replaced.replace(self.stand_in, name, make)
        self._shown: torch.Tensor | None = None
        self._sampler: Sampler | None = None
        self._wanted: Evaluations | None = None

    def widen(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Call the denoiser with the rows that the sampler wants."""

        def forward_rows(*args: Any, **kwargs: Any) -> Any:
            bound = with_rows(self.facts, forward, args, kwargs, self._wants())
            return forward(*bound.args, **bound.kwargs)

        return forward_rows

    def _set_timesteps(self, set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            self._scheduler.set_timesteps(*args, **kwargs)
            self.stand_in.timesteps = Rounds(self._scheduler.timesteps, self._rounds)

        return both

    def _set_begin_index(self, set_begin_index: Callable[..., Any]) -> Callable[..., Any]:
        """Of the scheduler that steps; a copy made of it begins there."""
        return lambda *args, **kwargs: self._scheduler.set_begin_index(*args, **kwargs)

    def _leave(self, scale: Callable[..., Any]) -> Callable[..., Any]:
        """The sampler scales what it wants evaluated; the pipeline's own latents are looked at by nobody."""
        return lambda sample, *args, **kwargs: sample

    def _noised(self, noised: Callable[..., Any]) -> Callable[..., Any]:
        """A picture with noise, to begin with; what the loop is to put back after a step the sampler has put back."""

        def noised_or_shown(*args: Any, **kwargs: Any) -> Any:
            if self._shown is not None:
                return self._shown
            return getattr(self._scheduler, noised.__name__)(*args, **kwargs)

        return noised_or_shown

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def answer(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._check_unchanged(sample)
            self._send(model_output)
            return (self._shown,)

        return answer

    def _check_unchanged(self, sample: torch.Tensor) -> None:
        """Check that the pipeline has the latents that it was shown, or a copy, as loops make that put back a part."""
        shown = self._shown
        assert shown is not None
        same = sample is shown or torch.allclose(sample, shown, rtol=0, atol=0, equal_nan=True)
        if not same or shown._version != self._version:
            raise ConfigError(
                "a callback changed the latents, and with sampler= they are an estimate of the final sample that "
                "nothing is computed from; leave sampler= out, or do not change them"
            )

    def _show(self, latents: torch.Tensor) -> None:
        self._shown, self._version = latents, latents._version

    def _rounds(self, first: int) -> Iterator[torch.Tensor]:
        """What the loop's rounds are told: each the timestep of the first step that is not solved."""
        latents = self.prepared.latents
        assert latents is not None, "a supported pipeline prepares latents before its loop"
        self._show(latents)
        self._sampler = self._begin(latents, first)
        self._wanted = next(self._sampler)
        while self._wanted is not None:
            yield self._wanted.timesteps[0]

    def _wants(self) -> Evaluations:
        assert self._wanted is not None
        return self._wanted

    def _begin(self, x: torch.Tensor, first: int) -> Sampler:
        noise, eta = RunningNoise(self._arguments.get("generator")), float(self._arguments.get("eta") or 0.0)
        known = self.prepared.known
        if self._wish.method is None:
            options = {"eta": eta} if "eta" in inspect.signature(self._scheduler.step).parameters else {}
            return diffusers_loop(x, self._scheduler, noise, first, known, **options)
        steps = tableau_of(self._scheduler, eta).since(first)
        return solve(x, steps, noise, self._wish.knobs, self._start(steps.num_steps), self._agree, known)

    def _start(self, num_steps: int) -> Start | None:
        anew = self._wish.variation_steps
        if anew is None:
            return None
        kept = getattr(self._pipe, _KEPT, None)
        if kept is None:
            raise ConfigError("variation_steps= starts from a kept run; make a call with keep_trajectory=True first")
        if anew > num_steps:
            raise ConfigError(f"variation_steps={anew} is more than the {num_steps} steps; use at most all")
        return Start(kept, num_steps - anew)

    def _send(self, model_output: torch.Tensor) -> None:
        wanted = self._wants()
        assert self._sampler is not None
        try:
            self._wanted = self._sampler.send(model_output.view(wanted.x.shape))
            self._show(self._wanted.estimate)
        except StopIteration as stop:
            self._wanted = None
            self._show(stop.value.x)
            if self._wish.keep_trajectory:
                setattr(self._pipe, _KEPT, stop.value.trajectory)
