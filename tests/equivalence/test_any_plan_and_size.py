"""Random plans, sizes and batches: nothing depends on the cases that somebody thought of."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from division import EXACT, errors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distrifusion import Plan
from distrifusion.plan import SiteKind, Split
from models import UNETS, moved, unet_inputs

sides = st.integers(1, 30)


@settings(max_examples=15)
@given(
    family=st.sampled_from(sorted(UNETS)),
    batch_axes=st.sampled_from(({"cfg": 1}, {"cfg": 2}, {"dp": 2})),
    patch=st.integers(2, 5),
    split=st.sampled_from((Split.ROWS, Split.COLUMNS)),
    stale=st.frozensets(st.sampled_from(SiteKind), min_size=1),
    batch=st.integers(1, 3),
    height=sides,
    width=sides,
)
@example(
    family="sd_unet",
    batch_axes={"cfg": 2},
    patch=5,
    split=Split.COLUMNS,
    stale=frozenset(SiteKind),
    batch=1,
    height=1,
    width=1,
)
def test_fresh_and_repeated_inputs_are_exact(
    unets: dict[str, UNet2DConditionModel],
    family: str,
    batch_axes: dict[str, int],
    patch: int,
    split: Split,
    stale: frozenset[SiteKind],
    batch: int,
    height: int,
    width: int,
) -> None:
    plan = Plan(**batch_axes, patch=patch, split=split, stale=stale, warmup=1)
    x = unet_inputs(unets[family], batch, height, width)
    y = moved(x)
    assert max(errors(unets[family], str(plan), [x, y, y])) <= EXACT
