"""The demo models' pictures: prompts with known attributes, and whether pictures show them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from distrifusion.demo import classifier
from distrifusion.demo.dataset import sample_scenes
from distrifusion.demo.painting import render
from distrifusion.demo.scenes import ATTRIBUTES

# Every class of every attribute is asked for at least twice; prompt -> time, body, mountains, foreground, trees.
PROMPTS = {
    "a sunset over green mountains with a lake, pine trees and the sun": "sunset sun green lake pine",
    "a starry night over snowy mountains with a full moon, a meadow and no trees": "night moon snowy meadow none",
    "a clear day over blue mountains with round trees, a meadow and a bright sun": "day sun blue meadow round",
    "a pink dawn over purple peaks with a calm lake, fir trees and an empty sky": "dawn none purple lake pine",
    "red mountains at dusk with oak trees, a lake with reflections and no sun": "sunset none red lake round",
    "snow-capped mountains at noon with a lake, no trees and the sun": "day sun snowy lake none",
    "a dark night over blue hills with the moon, a grassy meadow and pines": "night moon blue meadow pine",
    "green mountains at sunrise with a sun, a field and leafy trees": "dawn sun green meadow round",
    "purple mountains in daylight with no sun, a meadow and tall pine trees": "day none purple meadow pine",
    "a night sky over red mountains with no moon, still water and round trees": "night none red lake round",
    "an orange sunset over purple mountains with the sun, a field and no trees": "sunset sun purple meadow none",
    "red cliffs in the early morning with a shining sun, a lake and pine trees": "dawn sun red lake pine",
}


class Gallery:
    """The pictures of a plan and of one device, read by the demo models' classifier."""

    def __init__(self) -> None:
        self._features: dict[str, list[torch.Tensor]] = {"plan": [], "one device": []}
        self._right: dict[str, list[list[bool]]] = {"plan": [], "one device": []}
        self._size = (0, 0)

    def add(self, prompt: str, picture: Image.Image, reference: Image.Image) -> float:
        """Read both pictures of a seed; returns the share of attributes that are read alike, in 0..1."""
        self._size = picture.size
        read = {}
        for whose, image in (("plan", picture), ("one device", reference)):
            images = classifier.to_images(np.array(image.convert("RGB"))[None])
            self._features[whose].append(classifier.features(images))
            read[whose] = classifier.read_attributes(images)[0]
            if prompt in PROMPTS:
                asked = zip(ATTRIBUTES, PROMPTS[prompt].split(), strict=True)
                self._right[whose].append([read[whose][name] == value for name, value in asked])
        alike = [read["plan"][name] == read["one device"][name] for name in ATTRIBUTES]
        return sum(alike) / len(alike)

    def accuracy(self) -> Mapping[str, Mapping[str, float]]:
        """Share of pictures that show what a prompt of `PROMPTS` asks for, by whose they are and attribute."""
        shares = {}
        for whose, rows in self._right.items():
            if rows:
                means = np.mean(rows, axis=0)
                shares[whose] = {name: float(mean) for name, mean in zip(ATTRIBUTES, means, strict=True)}
        return shares

    def frechet(self) -> Mapping[str, float]:
        """Frechet distances between the sets of pictures, and of each to as many renders of other scenes.

        Empty for fewer than two pictures, which have no covariance.
        """
        ours, theirs = (torch.cat(rows) for rows in self._features.values())
        if len(ours) < 2:
            return {}
        scenes = sample_scenes(len(ours), seed=4_000_000)
        renders = np.stack([render(scene, *self._size) for scene in scenes])
        scene_features = classifier.features(classifier.to_images(renders))
        return {
            "plan to one device": max(0.0, classifier.frechet_distance(ours, theirs)),
            "plan to renders": classifier.frechet_distance(ours, scene_features),
            "one device to renders": classifier.frechet_distance(theirs, scene_features),
        }
