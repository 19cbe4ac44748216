"""Models that every equivalence test reads and none changes."""

from __future__ import annotations

import pytest
from diffusers import UNet2DConditionModel

from distrifusion.rules.stages import StageRule
from distrifusion.rules.tokens import TokenRule
from models import UNETS


@pytest.fixture(scope="session")
def unets() -> dict[str, UNet2DConditionModel]:
    """One tiny U-Net of each family, by name."""
    return {name: make() for name, make in UNETS.items()}


@pytest.fixture(scope="session")
def sdxl(unets: dict[str, UNet2DConditionModel]) -> UNet2DConditionModel:
    """The tiny U-Net with SDXL's block types."""
    return unets["sdxl_unet"]


@pytest.fixture(scope="session", params=UNETS)
def unet(request: pytest.FixtureRequest, unets: dict[str, UNet2DConditionModel]) -> UNet2DConditionModel:
    """Each tiny U-Net in turn."""
    return unets[request.param]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks do not ask whether what they keep of a transformer fits: the passes for it cost more than tiny calls."""
    for rule in (TokenRule, StageRule):
        monkeypatch.setattr(rule, "question", lambda self, call: None)
