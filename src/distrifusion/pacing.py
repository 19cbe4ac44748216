"""Which of a request's denoiser calls are synchronous, stale or coded: decided before the call, alike on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from distrifusion.exchange.forecast import Weight
from distrifusion.exchange.gathering import Sending
from distrifusion.exchange.handles import Swap
from distrifusion.exchange.policy import CallPolicy
from distrifusion.exchange.pool import CallState
from distrifusion.exchange.verbs import Exchange
from distrifusion.plan import Plan

_MOST_STEPS = 2.0  # a forecast goes no further than this many times the last step


class Pacing:
    """The plan's policy, call for call."""

    def __init__(self, plan: Plan, exchange: Exchange) -> None:
        self._plan = plan
        self._exchange = exchange
        self._sending = Sending.of(plan)
        self._keep = plan.kept
        self._stale = plan.stale & plan.kept

    def past_warmup(self, state: CallState | None) -> bool:
        """Whether the exact calls of a request are over."""
        return state is not None and state.calls >= self._plan.num_synchronous

    def policy(
        self, team: tuple[int, ...], index: int, state: CallState | None, timestep: Any, device: torch.device
    ) -> CallPolicy:
        """How values are exchanged in the call that comes.

        Args:
            team: ranks that share the picture, in band order.
            index: this rank's place in it.
            state: what the request keeps; None if it keeps nothing.
            timestep: the call's timestep, a number or a tensor [], [B] or [B, L] (of L tokens).
            device: where values are.
        """
        policy = CallPolicy(team, index)
        if state is None:
            return policy
        past_warmup = self.past_warmup(state)
        late = past_warmup and self._plan.late
        before = self._times_before(state, timestep)
        return replace(
            policy,
            keep=self._keep,
            stale=self._stale if past_warmup and not state.drifted else frozenset(),
            state=state,
            frozen=self._plan.frozen,
            sending=self._sending,
            codes=past_warmup,
            forecast=self._forecast(before, timestep, device) if self._plan.forecast else 0.0,
            num_fresh=self._plan.fresh,
            watches=self._plan.resync is not None,
            late=late,
            renews=self._plan.renews(state.calls),
            num_relayed=1 + (self._plan.forecast > 0) + (self._plan.stride > 1),
            given_at=before[-1] if late and before else None,
        )

    def _times_before(self, state: CallState, timestep: Any) -> tuple[Any, ...]:
        """Timesteps of the last two calls whose values are there; this call's is noted."""
        if not self._plan.renews(state.calls):  # the last values are still on their way
            return state.times[-3:-1]
        before = state.times[-2:]
        state.times = (*before, timestep)
        return before

    def _forecast(self, before: tuple[Any, ...], timestep: Any, device: torch.device) -> Weight:
        """How much of their last change values are carried on by: in proportion to the steps of the solver's time."""
        *past, time = (_solver_time(value, device) for value in (*before, timestep))
        if len(past) < 2 or past[0].shape != time.shape:
            return 0.0
        last, now = past[1] - past[0], time - past[1]
        ratio = torch.where(last == 0, 0.0, now / last).clamp(0, _MOST_STEPS)
        return self._plan.forecast / 100 * ratio

    def announce(self, state: CallState | None, prefix: str, like: torch.Tensor) -> Callable[[], None]:
        """Tell every rank how far the own keys and values have moved in this call; what is returned waits and decides.

        All ranks take the largest drift of any, so the next call is synchronous on all or on none.
        """
        if state is None or self._plan.resync is None:
            return lambda: None
        own = self._exchange.drift(like)
        others = [r for r in range(self._exchange.transport.world_size) if r != self._exchange.transport.rank]
        swap = self._exchange.collect(f"{prefix}drift", own, dict.fromkeys(others, own.shape))
        return partial(self._decide, state, own, swap, self._plan.resync / 100)

    @staticmethod
    def _decide(state: CallState, own: torch.Tensor, swap: Swap, bound: float) -> None:
        largest = torch.cat([own, *swap.wait().values()]).max()
        state.drifted = not bool(largest < bound)  # NaN counts as drifted; a bound of 0 makes every call synchronous


def _solver_time(timestep: Any, device: torch.device) -> torch.Tensor:
    """A timestep [] or [B] in fp32; of timesteps of every token [B, L], the largest: those of given frames are at 0."""
    time = torch.as_tensor(timestep, device=device).float()
    return time.flatten(1).amax(1) if time.dim() > 1 else time
