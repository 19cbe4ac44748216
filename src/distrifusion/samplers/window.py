"""A window of steps solved at the same time: ParaDiGMS (arXiv 2305.16317) and ParaTAA (arXiv 2402.09970).

All states of the window are evaluated in one denoiser call, then all move. A state depends on those before it alone,
so that after n calls the first n are those of the sequential sampler, whatever the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from distrifusion.errors import ConfigError
from distrifusion.samplers.anderson import Acceleration, Iterate
from distrifusion.samplers.evaluations import Evaluations, Sample, Sampler
from distrifusion.samplers.knobs import Knobs
from distrifusion.samplers.known import Known
from distrifusion.samplers.noise import StepNoise
from distrifusion.samplers.tableau import Tableau
from distrifusion.samplers.unrolled import combined, unrolled

# Numbers of solved steps, one per picture -> the same on every rank.
Agree = Callable[[list[int]], list[int]]


@dataclass(frozen=True)
class Start:
    """States to begin from instead of noise alone.

    Attributes:
        trajectory: of a like run: [N + 1, B, ...].
        num_kept: first steps that are taken over as they are; the others are solved anew.
    """

    trajectory: torch.Tensor
    num_kept: int = 0


def solve(
    x: torch.Tensor,
    steps: Tableau,
    noise: StepNoise,
    knobs: Knobs | None = None,
    start: Start | None = None,
    agree: Agree = lambda solved: solved,
    known: Known | None = None,
) -> Sampler:
    """Sample by solving windows of steps; it ends with what the sequential sampler gives, to the tolerance.

    Never more denoiser calls than steps. The sample's trajectory can start another run.

    Args:
        x: noise [B, ...], scaled as the first state.
        steps: what is solved.
        noise: of the steps that draw some; all of it is drawn, in order, after the first call.
        knobs: how.
        start: states to begin from.
        agree: makes ranks decide alike, whose numbers may differ in the last bit.
        known: what every state after the first has of a known picture.

    Raises:
        ConfigError: if a knob or the start does not fit the steps.
    """
    knobs = (knobs or Knobs()).for_steps(steps.num_steps)
    window = _Window(x, steps, knobs, start, agree, known)
    return window.run(noise, x.dtype)


class _Window:
    """The states of one run, and the window in them."""

    def __init__(
        self, x: torch.Tensor, steps: Tableau, knobs: Knobs, start: Start | None, agree: Agree, known: Known | None
    ) -> None:
        self._steps = steps
        self._knobs = knobs
        self._agree = agree
        self._linear = steps.linear(knobs.split)
        self._acceleration = Acceleration(knobs.memory, knobs.regularisation)
        # Differences of nearly equal states decide: half precision has no room for them.
        self._exact = torch.promote_types(x.dtype, torch.float32)
        self._states = self._first_states(x.to(self._exact), start)
        self._done = start.num_kept if start else 0
        self._known = None if known is None else known.to(self._states)
        self._surroundings = None if self._known is None else self._known.states(steps)
        ahead = slice(self._done + 1, None)
        self._states[ahead] = self._with_known(ahead, self._states[ahead])
        self._data: torch.Tensor | None = None  # D of the step before the window
        self._hits = torch.zeros(steps.num_steps, len(x), dtype=torch.long)

    def _first_states(self, x: torch.Tensor, start: Start | None) -> torch.Tensor:
        num = self._steps.num_steps
        if start is None:
            return self._like(x, slice(None)) * x
        if start.trajectory.shape != (num + 1, *x.shape):
            raise ConfigError(
                f"the trajectory to start from has shape {tuple(start.trajectory.shape)} and this run's is "
                f"{(num + 1, *x.shape)}; use the same steps, size and number of pictures"
            )
        if not 0 <= start.num_kept < num:
            raise ConfigError(f"{start.num_kept} steps are kept of {num}; keep 0 to {num - 1}")
        if start.num_kept and bool(self._steps.b_previous[start.num_kept]):
            raise ConfigError("steps that need the one before (DPM-Solver++ 2M) cannot be kept; solve all steps anew")
        states = start.trajectory.to(x).clone()
        if not start.num_kept:
            states[0] = x
        return states

    def _like(self, x: torch.Tensor, rows: slice, origin: int = 0) -> torch.Tensor:
        """How much larger states are than the one at `origin`, to be multiplied by it."""
        ratio = self._steps.scale[rows] / self._steps.scale[origin]
        return ratio.to(x).view(-1, *(1,) * x.dim())

    def run(self, noise: StepNoise, dtype: torch.dtype) -> Sampler:
        """The sampler."""
        num, calls, rows = self._steps.num_steps, 0, 0
        drawn: torch.Tensor | None = None
        estimate = self._states[-1].to(dtype)
        while self._done < num and calls != self._knobs.max_calls:
            inside = self._inside()
            places = self._places(inside)
            answers = yield Evaluations(self._inputs(places).to(dtype), self._steps.timesteps[places], estimate)
            if drawn is None:
                drawn = _drawn(noise, self._steps, self._states, dtype)
            own = [places.index(step) for step in range(inside.start, inside.stop)]
            estimate = self._move(inside, answers[own].to(self._exact), drawn).to(dtype)
            calls, rows = calls + 1, rows + len(places)
        return Sample(estimate, self._states, calls, rows)

    def _inside(self) -> slice:
        """Steps of the window."""
        assert self._knobs.window is not None, "see for_steps"
        return slice(self._done, min(self._done + self._knobs.window, self._steps.num_steps))

    def _places(self, inside: slice) -> list[int]:
        """The steps that are evaluated, in the order of a call's rows."""
        if not self._knobs.fixed:
            return list(range(inside.start, inside.stop))
        window = self._knobs.window
        assert window is not None, "see for_steps"
        ahead = [inside.start + (place - inside.start) % window for place in range(window)]
        # Behind the last step there is none, so the place keeps the one that it had.
        return [step if step < inside.stop else step - window for step in ahead]

    def _inputs(self, steps: list[int]) -> torch.Tensor:
        return self._states[steps] / self._column(self._steps.input_scale[steps])

    def _column(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers [W] that are to multiply states [W, B, ...]."""
        return numbers.to(self._states).view(-1, *(1,) * (self._states.dim() - 1))

    def _move(self, inside: slice, outputs: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Move the window's states, and the window; returns the estimate of the final sample."""
        states, after = self._states[inside], slice(inside.start + 1, inside.stop + 1)
        data = self._predicted(inside, outputs)
        stepped = self._stepped(inside, data, drawn)
        solved = self._agree(self._num_solved(inside, self._residuals(after, stepped)))
        linear = self._linear[inside]
        assert self._knobs.order is not None, "see for_steps"
        start, drives = unrolled(linear, self._knobs.order)
        aim = combined(start, states) + combined(drives, stepped - self._column(linear) * states)
        residual = aim - self._states[after]
        now = Iterate(after.start, self._states[after].clone(), residual)
        # The first unsolved row comes of solved ones, so that it becomes exact if it is left to Picard.
        plain = [count + 1 if self._knobs.safeguard else 0 for count in solved]
        correction = self._acceleration.correction(
            now, self._steps.scale[after], torch.tensor(plain, device=states.device)
        )
        self._states[after] += residual if correction is None else residual - correction
        exact = 1 if self._knobs.hits == 1 else 0
        self._advance(inside, data, min(min(solved) + exact, len(states)))
        if inside.stop == self._steps.num_steps:
            return self._states[-1]
        return data[-1] if self._known is None else self._known.around(data[-1])

    def _predicted(self, inside: slice, outputs: torch.Tensor) -> torch.Tensor:
        """The data predictions D."""
        steps = self._steps
        return self._column(steps.skip[inside]) * self._states[inside] + self._column(steps.out[inside]) * outputs

    def _stepped(self, inside: slice, data: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Every state of the window, one step on."""
        steps = self._steps
        before = torch.cat([data[:1] if self._data is None else self._data, data[:-1]])
        stepped = self._column(steps.a[inside]) * self._states[inside] + self._column(steps.b[inside]) * data
        if bool(steps.b_previous.any()):
            stepped = stepped + self._column(steps.b_previous[inside]) * before
        if len(drawn):
            stepped = stepped + drawn[inside]
        return self._with_known(slice(inside.start + 1, inside.stop + 1), stepped)

    def _with_known(self, rows: slice, states: torch.Tensor) -> torch.Tensor:
        """States with what is known of the picture in them; their places in the trajectory are `rows`."""
        if self._known is None or self._surroundings is None:
            return states
        return self._known.around(states, self._surroundings[rows])

    def _residuals(self, after: slice, stepped: torch.Tensor) -> torch.Tensor:
        """How far each state is from one step after the state before it, against its size: [W, B]."""
        scale = self._steps.scale[after].to(stepped)
        return (stepped - self._states[after]).flatten(2).square().mean(-1).sqrt() / scale[:, None]

    def _num_solved(self, inside: slice, residuals: torch.Tensor) -> list[int]:
        """For every picture the steps from the window's first on whose residuals are small."""
        noise = self._steps.noise_size[inside].to(residuals)
        bound = (self._knobs.noise_tolerance * noise).clamp(min=self._knobs.bound)
        # A residual that is no number is not small.
        small = (residuals <= bound[:, None]).long().cpu()
        self._hits[inside] = (self._hits[inside] + 1) * small
        return [int(count) for count in (self._hits[inside] >= self._knobs.hits).long().cumprod(0).sum(0)]

    def _advance(self, inside: slice, data: torch.Tensor, num: int) -> None:
        if num == 0:
            return
        self._data = data[num - 1 : num]
        self._done += num
        entering = slice(inside.stop + 1, self._inside().stop + 1)
        if entering.start < entering.stop and inside.stop < self._steps.num_steps:
            last = self._states[inside.stop]
            self._states[entering] = self._with_known(entering, self._like(last, entering, inside.stop) * last)


def _drawn(noise: StepNoise, steps: Tableau, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """c xi of all steps, drawn in order: [N, B, ...]; [0] where no step draws."""
    if not any(steps.draws):
        return states.new_zeros(0)
    drawn = torch.zeros_like(states[1:])
    for i, draws in enumerate(steps.draws):
        if draws:
            xi = randn_tensor(tuple(states.shape[1:]), generator=noise.at(i), device=states.device, dtype=dtype)
            drawn[i] = float(steps.c[i]) * xi.to(drawn)
    return drawn
