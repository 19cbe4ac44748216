"""The renderer is a function of scene and size, and captions say what the picture shows."""

import numpy as np
import pytest
from PIL import Image

from distrifusion.demo.dataset import sample_scenes
from distrifusion.demo.painting import render
from distrifusion.demo.scenes import ATTRIBUTES, Scene, compose_caption, sample_caption

SCENES = sample_scenes(12, seed=5)


def _luminance(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32).mean(axis=-1)


def test_a_scene_renders_to_the_same_bytes_every_time() -> None:
    for scene in SCENES:
        assert np.array_equal(render(scene, 96, 64), render(scene, 96, 64))


def test_scenes_that_differ_in_the_seed_alone_look_different() -> None:
    pictures = [render(Scene("day", "sun", "green", "lake", "pine", seed), 64, 64) for seed in range(4)]
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize("size", [(64, 64), (100, 52), (52, 100), (17, 300)])
def test_any_size_can_be_drawn(size: tuple[int, int]) -> None:
    for scene in SCENES:
        picture = render(scene, *size)
        assert picture.shape == (size[1], size[0], 3)
        assert picture.dtype == np.uint8


def test_a_larger_picture_shows_the_same_world() -> None:
    for scene in SCENES:
        small = _luminance(render(scene, 128, 128))
        shrunk = _luminance(render(scene, 512, 512)).reshape(128, 4, 128, 4).mean(axis=(1, 3))
        assert np.abs(small - shrunk).mean() < 6, scene


def test_a_larger_picture_has_more_detail_than_an_enlarged_one() -> None:
    for scene in SCENES:
        large = render(scene, 512, 512)
        enlarged = np.asarray(Image.fromarray(render(scene, 128, 128)).resize((512, 512), Image.Resampling.BICUBIC))
        detail, blur = (np.abs(np.diff(_luminance(p), axis=0)).mean() for p in (large, enlarged))
        assert detail > blur, scene


def test_a_wider_picture_extends_the_same_world_at_both_sides() -> None:
    scene = Scene("dawn", "none", "blue", "lake", "pine", 4)
    wide = render(scene, 192, 128).astype(int)[:, 32:-32]
    assert np.abs(wide - render(scene, 128, 128)).mean() < 1


def test_every_class_is_drawn_and_named() -> None:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(300, seed=1)
    for name, classes in ATTRIBUTES.items():
        assert {getattr(scene, name) for scene in scenes} == set(classes)
    for scene in scenes:
        assert scene.mountains in compose_caption(scene.attributes(), rng) or scene.mountains == "snowy"


def test_captions_name_some_attributes_or_all() -> None:
    rng = np.random.default_rng(0)
    named = [sample_caption(scene, rng)[1] for scene in sample_scenes(200, seed=2)]
    assert any(len(some) == len(ATTRIBUTES) for some in named)
    assert any(len(some) < len(ATTRIBUTES) for some in named)


def test_captions_cover_the_wording_of_the_readme() -> None:
    rng = np.random.default_rng(0)
    named = {"time": "sunset", "mountains": "green", "foreground": "lake", "trees": "pine"}
    captions = {compose_caption(named, rng) for _ in range(20_000)}
    assert "a sunset over green mountains with a lake and pine trees" in captions


def test_a_caption_of_nothing_is_still_a_landscape() -> None:
    assert compose_caption({}, np.random.default_rng(3))


def test_impossible_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="moon shines only at night"):
        Scene("day", "moon", "green", "lake", "pine", 0)
    with pytest.raises(ValueError, match="mountains='yellow'"):
        Scene("day", "sun", "yellow", "lake", "pine", 0)
    with pytest.raises(ValueError, match="too small"):
        render(SCENES[0], 8, 8)
