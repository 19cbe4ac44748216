"""The plans that are weighed against each other, and how near their pictures are to one device's."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from torch import nn

from distrifusion.anatomy import anatomy_of
from distrifusion.anatomy.tokens import TokenAnatomy
from distrifusion.errors import ConfigError, PlanError
from distrifusion.plan import Plan, SiteKind

# Bits of a coded difference from which on pictures are close (docs/fidelity.md).
_CLOSE_BITS = 4


class Fidelity(StrEnum):
    """How far a plan's pictures may be from one device's."""

    EXACT = "exact"  # to rounding
    CLOSE = "close"  # around 45 dB and more on the embedded model: docs/fidelity.md
    ANY = "any"


def fidelity_of(plan: Plan) -> Fidelity:
    """The class of a plan."""
    if plan.exact:
        return Fidelity.EXACT
    coarse = plan.delta is not None and plan.delta < _CLOSE_BITS
    if plan.naive or plan.frozen or plan.late or coarse or not plan.stale <= {SiteKind.KV}:
        return Fidelity.ANY
    return Fidelity.CLOSE


def allowed(plan: Plan, wish: Fidelity) -> bool:
    """Whether a plan keeps the wish."""
    order = list(Fidelity)
    return order.index(fidelity_of(plan)) <= order.index(wish)


def plans(model: nn.Module, num_devices: int, num_rows: int, wish: Fidelity, pictures: int = 1) -> list[Plan]:
    """All plans for exactly some devices, the exact ones first.

    Args:
        model: the denoiser.
        num_devices: at least 1.
        num_rows: rows of the batch of a call.
        wish: how near the pictures are to be.
        pictures: of one call.

    Raises:
        ConfigError: if there is no device.
    """
    if num_devices < 1:
        raise ConfigError(f"{num_devices} devices: at least one is needed")
    tokens = isinstance(anatomy_of(model), TokenAnatomy)
    guided = num_rows == 2 * pictures
    found: dict[str, Plan] = {}
    for batch, team in _batches(num_devices, guided, pictures):
        for words in _methods(team, tokens):
            text = ".".join([*batch, *words]) or "patch1"
            try:
                plan = Plan.parse(text)
                (plan.check_tokens if tokens else plan.check_bands)(type(model).__name__)
            except PlanError:
                continue
            if allowed(plan, wish):
                found.setdefault(str(plan), plan)
    return sorted(found.values(), key=lambda plan: list(Fidelity).index(fidelity_of(plan)))


def _batches(num_devices: int, guided: bool, pictures: int) -> Iterator[tuple[list[str], int]]:
    """Words for what is cut by rows of the batch, and the devices left for each part."""
    for dp in (n for n in range(1, pictures + 1) if num_devices % n == 0):
        for cfg in (1, 2) if guided else (1,):
            if num_devices % (dp * cfg) == 0:
                words = [f"dp{dp}"] * (dp > 1) + [f"cfg{cfg}"] * (cfg > 1)
                yield words, num_devices // (dp * cfg)


def _methods(team: int, tokens: bool) -> Iterator[list[str]]:
    """Words for what is done within a part of the batch by so many devices."""
    if team == 1:
        yield []
        return
    bands = f"patch{team}"
    yield [bands]
    if tokens:
        for ring in (n for n in range(1, team + 1) if team % n == 0):
            ulysses = team // ring
            yield [f"ulysses{ulysses}"] * (ulysses > 1) + [f"ring{ring}"] * (ring > 1)
        yield [f"pipe{team}", f"m{team}"]
        yield [f"pipe{team}", f"m{2 * team}"]
    yield [f"tp{team}"]
    yield [bands, "delta8"]
    yield [bands, "delta4"]
    yield [bands, "displaced"]
    yield [bands, "displaced", "fresh1"]
    yield [bands, "displaced", "forecast"]
    yield [bands, "displaced", "delta4"]
    if not tokens:
        yield [bands, "displaced", "all"]
    yield [f"async{team}"]
    yield [f"async{team}", "stride2"]
