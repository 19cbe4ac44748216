"""Captioned scenes: what a landscape shows, and how a sentence says it.

A scene is five named attributes and a seed. The attributes are what captions name and what the classifier reads;
the seed decides everything else (ridges, clouds, where trees stand). :mod:`distrifusion.demo.painting` draws it.
"""

from dataclasses import dataclass

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "time": ("day", "sunset", "night", "dawn"),
    "body": ("sun", "moon", "none"),
    "mountains": ("green", "blue", "purple", "red", "snowy"),
    "foreground": ("lake", "meadow"),
    "trees": ("pine", "round", "none"),
}
"""Attribute name -> its classes. The order of names and classes is the order of the classifier's outputs."""

_PICTURES = ("a painting of", "a landscape with", "a view of", "a picture of", "an image of", "a landscape of")
_SKIES = {
    "day": ("a bright day", "a clear day", "a blue sky", "daylight", "a summer day", "midday"),
    "sunset": ("a sunset", "sunset", "an orange sunset", "an evening sky", "a red evening sky", "dusk"),
    "night": ("a night sky", "a dark night", "a starry night", "night", "a starry sky", "midnight"),
    "dawn": ("a pink dawn", "dawn", "a sunrise", "daybreak", "an early morning", "a pink morning sky"),
}
_MOMENTS = {
    "day": ("during the day", "by day", "at noon", "at midday", "in daylight", "in the daytime"),
    "sunset": ("at sunset", "at dusk", "in the evening", "during a sunset", "at sundown", "under an orange sky"),
    "night": ("at night", "at midnight", "under the stars", "by night", "in the dark", "under a starry sky"),
    "dawn": ("at dawn", "at daybreak", "at sunrise", "in the early morning", "in the morning", "under a pink sky"),
}
_RANGES = ("mountains", "mountains", "mountains", "hills", "peaks", "mountain peaks", "cliffs")
_SNOWY = ("snowy", "snow-capped", "snow-covered", "white", "snowy white")
_ITEMS: dict[str, dict[str, tuple[str, ...]]] = {
    "body": {
        "sun": ("the sun", "a sun", "a bright sun", "the sun in the sky", "a shining sun"),
        "moon": ("the moon", "a moon", "a full moon", "a bright moon", "the moon in the sky", "moonlight"),
        "none": ("an empty sky", "nothing in the sky"),
    },
    "foreground": {
        "lake": ("a lake", "a lake", "a calm lake", "a lake with reflections", "water", "still water", "a mirror lake"),
        "meadow": ("a meadow", "a meadow", "no lake", "no water", "a grassy meadow", "grass", "a field", "fields"),
    },
    "trees": {
        "pine": ("pine trees", "pine trees", "pines", "fir trees", "a pine forest", "conifers", "tall pine trees"),
        "round": ("round trees", "round trees", "leafy trees", "oak trees", "oaks", "broadleaf trees", "bushy trees"),
        "none": ("no trees", "no trees", "not a single tree", "no tree"),
    },
}


@dataclass(frozen=True)
class Scene:
    """One landscape: a class per attribute of :data:`ATTRIBUTES`, and the seed of everything that has no name."""

    time: str
    body: str
    mountains: str
    foreground: str
    trees: str
    seed: int

    def __post_init__(self) -> None:
        for name, classes in ATTRIBUTES.items():
            if getattr(self, name) not in classes:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(classes)}")
        if self.body != "none" and (self.body == "moon") != (self.time == "night"):
            raise ValueError(f"body={self.body!r} does not go with time={self.time!r}; the moon shines only at night")

    def attributes(self) -> dict[str, str]:
        """The named part of the scene, in the order of :data:`ATTRIBUTES`."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    def labels(self) -> list[int]:
        """Class indices, in the order of :data:`ATTRIBUTES`."""
        return [classes.index(getattr(self, name)) for name, classes in ATTRIBUTES.items()]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene; every attribute is uniform, except that the sky shows its sun or moon two times in three."""

    def choose(name: str) -> str:
        return str(rng.choice(ATTRIBUTES[name]))

    time = choose("time")
    shining = "moon" if time == "night" else "sun"
    body = shining if rng.random() < 2 / 3 else "none"
    return Scene(time, body, choose("mountains"), choose("foreground"), choose("trees"), int(rng.integers(2**31)))


def sample_caption(scene: Scene, rng: np.random.Generator, omit: float = 0.25) -> tuple[str, dict[str, str]]:
    """Describe ``scene`` in one of several styles.

    Half of the captions name everything, in the others each attribute is left out with probability ``omit``.
    Returns the caption and the attributes that it names.
    """
    keep_all = rng.random() < 0.5
    named = {name: value for name, value in scene.attributes().items() if keep_all or rng.random() >= omit}
    return compose_caption(named, rng), named


def compose_caption(named: dict[str, str], rng: np.random.Generator) -> str:
    """Word the given attributes (any subset) as one caption; attributes that are missing are not mentioned."""
    items = [_choose(_item_phrases(name, named), rng) for name in ("foreground", "trees", "body") if name in named]
    items = [items[i] for i in rng.permutation(len(items))]
    mountains = _mountain_phrase(named.get("mountains"), rng)
    time = named.get("time")
    style = rng.integers(3)
    if style == 0 and time is not None:
        return f"{_choose(_SKIES[time], rng)} over {mountains}{_with(items)}"
    if style == 1:
        return ", ".join(([_choose(_SKIES[time], rng)] if time else []) + [mountains] + items)
    opening = f"{_choose(_PICTURES, rng)} {mountains}" if rng.random() < 0.5 else mountains
    moment = f" {_choose(_MOMENTS[time], rng)}" if time else ""
    return f"{opening}{moment}{_with(items)}"


def _item_phrases(name: str, named: dict[str, str]) -> tuple[str, ...]:
    phrases = _ITEMS[name][named[name]]
    if name == "body" and named[name] == "none" and "time" in named:
        missing = "moon" if named["time"] == "night" else "sun"
        return phrases[:1] + (f"no {missing}", f"no {missing} in the sky")
    return phrases


def _mountain_phrase(colour: str | None, rng: np.random.Generator) -> str:
    words = _choose(_RANGES, rng)
    if colour is None:
        return words
    return f"{_choose(_SNOWY, rng) if colour == 'snowy' else colour} {words}"


def _with(items: list[str]) -> str:
    if not items:
        return ""
    return " with " + " and ".join([", ".join(items[:-1])] * (len(items) > 1) + items[-1:])


def _choose(phrases: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrases[int(rng.integers(len(phrases)))]
