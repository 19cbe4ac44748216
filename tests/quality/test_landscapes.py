"""What the demo model's classifier says of two sets of pictures."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from distrifusion.demo.painting import render
from distrifusion.demo.scenes import ATTRIBUTES, Scene
from distrifusion.quality.landscapes import PROMPTS, Gallery


def painted(prompt: str, **changes: str) -> Image.Image:
    """A render of what the prompt asks for, with some attributes changed."""
    attributes = {**dict(zip(ATTRIBUTES, PROMPTS[prompt].split(), strict=True)), **changes}
    return Image.fromarray(render(Scene(**attributes, seed=5), 128, 128))


def test_prompts_ask_for_scenes_that_can_be_and_for_every_class() -> None:
    scenes = [Scene(*text.split(), seed=0) for text in PROMPTS.values()]
    for name, classes in ATTRIBUTES.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(classes) and min(counts.values()) >= 2


def test_attributes_that_differ_are_counted() -> None:
    gallery = Gallery()
    one, two = list(PROMPTS)[:2]
    assert gallery.add(one, painted(one), painted(one)) == 1
    changed = painted(two, mountains="green", foreground="lake")
    assert gallery.add(two, changed, painted(two)) == pytest.approx(3 / 5)
    accuracy = gallery.accuracy()
    assert accuracy["one device"] == dict.fromkeys(ATTRIBUTES, 1.0)
    assert accuracy["plan"] == {"time": 1.0, "body": 1.0, "mountains": 0.5, "foreground": 0.5, "trees": 1.0}


def test_distances_of_equal_and_other_sets() -> None:
    same, other = Gallery(), Gallery()
    prompts = list(PROMPTS)[:4]
    for prompt, following in zip(prompts, prompts[1:] + prompts[:1], strict=True):
        same.add(prompt, painted(prompt), painted(prompt))
        other.add(prompt, painted(prompt, trees="none", foreground="meadow"), painted(following))
    assert same.frechet()["plan to one device"] == pytest.approx(0, abs=1e-6)
    assert same.frechet()["plan to renders"] == pytest.approx(same.frechet()["one device to renders"])
    assert other.frechet()["plan to one device"] > 1


def test_one_picture_and_unknown_prompts() -> None:
    gallery = Gallery()
    picture = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
    assert gallery.add("a prompt of my own", picture, picture) == 1
    assert gallery.frechet() == {} and gallery.accuracy() == {}
