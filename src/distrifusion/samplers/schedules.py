"""The steps of diffusers' schedulers as coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from distrifusion.errors import ConfigError
from distrifusion.samplers.tableau import Tableau


def tableau_of(scheduler: Any, eta: float = 0.0) -> Tableau:
    """The steps of a diffusers scheduler whose timesteps are set.

    Args:
        scheduler: one of `KNOWN`, by the name of its class.
        eta: noise of DDIM, 0 (none) to 1 (as much as DDPM).

    Raises:
        ConfigError: if its steps are no such maps; what can be used instead is named.
    """
    check_scheduler(scheduler)
    return KNOWN[type(scheduler).__name__](scheduler, eta)


def check_scheduler(scheduler: Any) -> None:
    """Check whether the steps of a diffusers scheduler can be solved in parallel; its timesteps need not be set.

    Raises:
        ConfigError: if they cannot; schedulers or values that can are named.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name not in KNOWN:
        raise ConfigError(
            f"{name} is not known as a map from one state to the next, which solving steps in parallel needs; "
            f"set pipe.scheduler to one of {', '.join(KNOWN)}, or use sampler='sequential'"
        )
    # Under other values a step is something else than its table says.
    allowed_values: dict[str, tuple[Any, ...]] = {
        "thresholding": (False,),
        "clip_sample": (False,),
        "stochastic_sampling": (False,),
        "solver_order": (1, 2),
        "solver_type": ("midpoint",),
        "algorithm_type": ("dpmsolver++",),
        "variance_type": ("fixed_small", "fixed_large"),
        "prediction_type": tuple(_PREDICTIONS),
        "use_flow_sigmas": (False,),
    }
    for option, allowed in allowed_values.items():
        value = config.get(option, allowed[0])
        # EulerDiscrete of old configs has no such key; None is diffusers' "not set".
        if value is not None and value not in allowed:
            raise ConfigError(
                f"{name} with {option}={value!r} cannot be solved in parallel; use "
                f"from_config(pipe.scheduler.config, {option}={allowed[-1]!r}), or sampler='sequential'"
            )


# alpha, sigma -> u, v of the data prediction u x + v m.
_PREDICTIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "sample": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "flow_prediction": lambda alpha, sigma: (torch.ones_like(alpha), -sigma),
}


def _ddim(scheduler: Any, eta: float) -> Tableau:
    """DDIM (arXiv 2010.02502), equation 12, with the noise eliminated by the data prediction."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    now, after = _signal(scheduler, scheduler.timesteps - stride, scheduler.final_alpha_cumprod)
    c = eta * ((1 - after) / (1 - now) * (1 - now / after)).clamp(min=0).sqrt()
    a = ((1 - after - c**2) / (1 - now)).sqrt()
    return _variance_preserving(scheduler, now, after, a, after.sqrt() - a * now.sqrt(), c, (eta > 0,) * len(now))


def _ddpm(scheduler: Any, eta: float) -> Tableau:
    """DDPM (arXiv 2006.11239), equation 7."""
    before = torch.cat([scheduler.timesteps[1:], scheduler.timesteps.new_tensor([-1])])
    now, after = _signal(scheduler, before, scheduler.one)
    kept = now / after
    small = ((1 - after) / (1 - now) * (1 - kept)).clamp(min=1e-20)
    variance = small if scheduler.variance_type == "fixed_small" else 1 - kept
    draws = tuple(bool(t > 0) for t in scheduler.timesteps)
    c = variance.sqrt() * torch.tensor(draws)
    a, b = kept.sqrt() * (1 - after) / (1 - now), after.sqrt() * (1 - kept) / (1 - now)
    return _variance_preserving(scheduler, now, after, a, b, c, draws)


def _signal(scheduler: Any, later: torch.Tensor, final: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """abar at the timesteps and at those that follow; `final` below zero."""
    abar = scheduler.alphas_cumprod.double().cpu()
    now, later = abar[scheduler.timesteps.cpu().long()], later.cpu().long()
    return now, torch.where(later >= 0, abar[later.clamp(min=0)], torch.as_tensor(final).double().cpu())


def _variance_preserving(
    scheduler: Any,
    now: torch.Tensor,
    after: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    draws: tuple[bool, ...],
) -> Tableau:
    abar = torch.cat([now, after[-1:]])
    skip, out = _PREDICTIONS[scheduler.config.prediction_type](now.sqrt(), (1 - now).sqrt())
    ones = torch.ones_like(a)
    states = (abar.sqrt(), (1 - abar).sqrt())
    return Tableau(a, b, 0 * a, c, skip, out, ones, *states, draws, scheduler.timesteps)


def _euler(scheduler: Any, eta: float) -> Tableau:
    """Euler's method (arXiv 2206.00364, algorithm 1 without churn); states are the picture plus sigma times noise."""
    sigma = scheduler.sigmas.double().cpu()
    return _exploding(scheduler, sigma[1:], 0 * sigma[1:], drawn=False)


def _euler_ancestral(scheduler: Any, eta: float) -> Tableau:
    """Euler's method to a lower sigma, and noise up to the next one."""
    sigma = scheduler.sigmas.double().cpu()
    now, after = sigma[:-1], sigma[1:]
    up = (after**2 * (now**2 - after**2) / now**2).sqrt()
    return _exploding(scheduler, (after**2 - up**2).clamp(min=0).sqrt(), up, drawn=True)


def _exploding(scheduler: Any, down: torch.Tensor, up: torch.Tensor, drawn: bool) -> Tableau:
    sigma = scheduler.sigmas.double().cpu()
    now = sigma[:-1]
    size = (now**2 + 1).sqrt()
    # The prediction is of the scaled input x / size, whose signal is 1 / size.
    skip, out = _PREDICTIONS[scheduler.config.prediction_type](1 / size, now / size)
    a = down / now
    states = (torch.ones_like(sigma), sigma)
    return Tableau(a, 1 - a, 0 * a, up, skip / size, out, size, *states, (drawn,) * len(a), scheduler.timesteps)


def _flow_euler(scheduler: Any, eta: float) -> Tableau:
    """Euler's method for flow matching: a state is (1 - sigma) pictures plus sigma noise, the output its velocity."""
    sigma = scheduler.sigmas.double().cpu()
    now = sigma[:-1]
    skip, out = _PREDICTIONS["flow_prediction"](1 - now, now)
    a = sigma[1:] / now
    ones = torch.ones_like(a)
    return Tableau(a, 1 - a, 0 * a, 0 * a, skip, out, ones, 1 - sigma, sigma, (False,) * len(a), scheduler.timesteps)


def _dpm_solver_2m(scheduler: Any, eta: float) -> Tableau:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2); its first step, and a last to sigma 0, are of order one."""
    ratio = scheduler.sigmas.double().cpu()
    alpha = 1 / (ratio**2 + 1).sqrt()
    sigma = ratio * alpha
    num, config = len(ratio) - 1, scheduler.config
    a = sigma[1:] / sigma[:-1]
    lam = alpha.log() - sigma.log()
    h = lam[1:] - lam[:-1]
    b = -alpha[1:] * torch.expm1(-h)
    few = config.lower_order_final and num < 15
    euler_last = config.euler_at_final or few or config.final_sigmas_type == "zero"
    second = torch.arange(num) > 0
    second[-1] &= not euler_last
    second &= config.solver_order == 2
    r = torch.cat([h.new_ones(1), h[:-1] / h[1:]])
    more = torch.where(second, b / (2 * r), torch.zeros_like(b))
    skip, out = _PREDICTIONS[config.prediction_type](alpha[:-1], sigma[:-1])
    ones = torch.ones_like(a)
    return Tableau(a, b + more, -more, 0 * a, skip, out, ones, alpha, sigma, (False,) * num, scheduler.timesteps)


# By the name of the class: diffusers makes dummies of classes whose packages are missing.
KNOWN: Mapping[str, Callable[[Any, float], Tableau]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "DPMSolverMultistepScheduler": _dpm_solver_2m,
}
