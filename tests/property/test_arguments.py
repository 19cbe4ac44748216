"""Any set of arguments is either accepted or refused by an error that names a wrong one, before a weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrifusion import ConfigError, Plan, PlanError, load
from distrifusion.loading import SpawnedPipeline
from distrifusion.runtime import call_checks
from distrifusion.runtime.source import PipelineFacts

NUM_SETS = 1000
NO_CUDA = not torch.cuda.is_available()

Values = Mapping[str, tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]]

not_numbers = st.sampled_from(["two", "", [], {}, b"1", object])
not_counts = st.integers(max_value=0) | st.floats() | st.booleans() | not_numbers
not_seconds = st.sampled_from([0, 0.0, -1, -0.5, math.inf, -math.inf, math.nan, True, False]) | not_numbers | st.none()

# By name: values that load accepts and values that it refuses, each whatever the other arguments are.
OF_LOAD: Values = {
    "threads": (st.none() | st.integers(1, 64), not_counts),
    "step_timeout": (st.integers(1, 10**6) | st.floats(1e-3, 1e9), not_seconds),
    "start_timeout": (st.integers(1, 10**6) | st.floats(1e-3, 1e9), not_seconds),
    "backend": (st.none() | st.just("gloo"), st.sampled_from(["nccl", "mpi", "GLOO", "", 3])),
    "variant": (st.none() | st.just("fp16"), st.nothing()),
    "tourch_dtype": (st.nothing(), st.just(torch.float16)),
    "device_map": (st.nothing(), st.sampled_from(["auto", "balanced", {}])),
    "devise": (st.nothing(), st.just(2)),
}
DEVICES = st.integers(1, 12) | st.lists(st.just("cpu"), min_size=1, max_size=12) | st.just("cpu") | st.none()
BAD_DEVICES = (
    st.integers(max_value=0)
    | st.booleans()
    | st.floats()
    | st.sampled_from([[], "gpu", "cpu:0x", "cuda:1", [0], {"cpu": 1}])
    | st.sampled_from([["cpu", "cuda:0"], ["cpu", "disc"], ["cpu", None]])
)
PLANS = st.builds(Plan, cfg=st.sampled_from((1, 2)), patch=st.integers(1, 6)) | st.builds(
    Plan,
    patch=st.integers(2, 6),
    stale=st.frozensets(st.sampled_from(["kv", "halo", "norm"]), min_size=1),
    warmup=st.integers(0, 9),
)
BAD_PLANS = st.sampled_from(
    [
        "patch0",
        "cfg3",
        "patch",
        "patch2.fast",
        "w4",
        "displaced",
        "patch2.patch3",
        ".",
        "patch2..rows",
        2,
        2.5,
        ["cfg2"],
    ]
)


@st.composite
def argument_sets(draw: st.DrawFn, values: Values) -> tuple[dict[str, Any], set[str]]:
    """Some arguments, and the names of those that are wrong."""
    arguments, wrong = {}, set()
    for name in draw(st.lists(st.sampled_from(sorted(values)), unique=True)):
        good, bad = values[name]
        is_wrong = good.is_empty or (not bad.is_empty and draw(st.integers(0, 3)) == 0)
        arguments[name] = draw(bad if is_wrong else good)
        wrong |= {name} if is_wrong else set()
    return arguments, wrong


class Opened(Exception):
    """Raised where the weights would be read."""


def factory() -> diffusers.DiffusionPipeline:
    raise Opened


@pytest.mark.skipif(not NO_CUDA, reason="what is right depends on the GPUs")
@settings(max_examples=NUM_SETS)
@given(
    rest=argument_sets(OF_LOAD),
    devices=st.tuples(DEVICES, st.just(False)) | st.tuples(BAD_DEVICES, st.just(True)),
    plan=st.tuples(PLANS.map(str) | PLANS | st.none(), st.just(False)) | st.tuples(BAD_PLANS, st.just(True)),
)
def test_load_opens_the_pipeline_or_names_a_wrong_argument(
    rest: tuple[dict[str, Any], set[str]], devices: tuple[Any, bool], plan: tuple[Any, bool]
) -> None:
    arguments, wrong = rest
    # A function takes no keywords of from_pretrained, whatever they say.
    wrong = wrong | ({"variant"} & arguments.keys())
    fits = True
    if not devices[1] and not plan[1]:
        fits = _fits(devices[0], plan[0])
    right = not (wrong or devices[1] or plan[1]) and fits
    with (
        mock.patch.object(SpawnedPipeline, "start", side_effect=Opened),
        pytest.raises((Opened, PlanError, ConfigError)) as caught,
    ):
        load(factory, devices[0], plan[0], **arguments)
    assert (caught.type is Opened) is right, f"{caught.value!r}"
    if not right:
        assert _names_one(str(caught.value), {**arguments, "devices": devices[0], "plan": plan[0]})


def _fits(devices: Any, plan: Any) -> bool:
    """Whether a right plan occupies exactly the right devices given."""
    if plan is None or devices is None or devices == "cpu":
        return True
    count = devices if isinstance(devices, int) else len(devices)
    return Plan.parse(plan).num_ranks == count


def _names_one(message: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a message names an argument, its value, or a part of it."""
    parts = [part for value in arguments.values() if isinstance(value, list) for part in value]
    return any(str(word) in message for word in (*arguments, *arguments.values(), *parts))


FACTS = PipelineFacts(diffusers.StableDiffusionXLPipeline, 8)
multiples = st.integers(1, 600).map(lambda n: 8 * n)
others = st.integers(-100, 5000).filter(lambda n: n < 1 or n % 8)

# Arguments of a call; what the check refuses is refused whatever the others are.
OF_CALL: Values = {
    "prompt": (st.text() | st.lists(st.text(), max_size=3), st.nothing()),
    "height": (multiples | st.none(), others | st.sampled_from([512.0, "512", True, [512]])),
    "width": (multiples | st.none(), others | st.sampled_from([512.0, "512", False, (512, 512)])),
    "num_inference_steps": (st.integers(1, 2000), not_counts),
    "num_images_per_prompt": (st.integers(1, 64) | st.none(), not_counts),
    "guidance_scale": (st.floats(-100, 100), st.sampled_from([math.nan, math.inf, -math.inf])),
    "output_type": (st.sampled_from(["pil", "np", "pt", "latent"]), st.nothing()),
    "callback": (st.nothing(), st.just(print)),
    "callback_steps": (st.nothing(), st.integers(1, 5)),
    "hieght": (st.nothing(), multiples),
    "steps": (st.nothing(), st.integers(1, 50)),
    "seed": (st.nothing(), st.integers()),
}


@settings(max_examples=NUM_SETS)
@given(given_set=argument_sets(OF_CALL), by_position=st.lists(st.text(max_size=5), max_size=3))
def test_a_call_is_accepted_or_names_a_wrong_argument(
    given_set: tuple[dict[str, Any], set[str]], by_position: list[str]
) -> None:
    arguments, wrong = given_set
    positions = ["prompt", "prompt_2", "height"][: len(by_position)]
    twice = set(positions) & arguments.keys()
    if len(by_position) == 3:
        wrong = wrong | {"height"}  # a text
    try:
        bound = call_checks.bind(FACTS, tuple(by_position), arguments)
        call_checks.check(FACTS, bound)
    except ConfigError as error:
        assert wrong | twice, f"refused without a reason: {error}"
        assert any(re.search(rf"\b{re.escape(name)}\b", str(error)) for name in wrong | twice), error
    else:
        assert not wrong | twice
        assert bound == {**dict(zip(positions, by_position, strict=True)), **arguments}


def test_a_size_that_is_refused_comes_with_the_nearest_that_is_taken() -> None:
    for size in (1, 7, 9, 515, 1021):
        with pytest.raises(ConfigError) as caught:
            call_checks.check(FACTS, {"height": size})
        nearest = [int(number) for number in re.findall(r"\d+", str(caught.value).partition("nearest is")[2])]
        assert nearest and all(abs(number - size) < 8 for number in nearest)
        for number in nearest:
            call_checks.check(FACTS, {"height": number})
