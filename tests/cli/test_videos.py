"""`distrifusion run` of a pipeline that makes videos, as a person types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shell import run
from tiny_video import write_wan

import distrifusion.loading
from distrifusion.cli import output
from distrifusion.cli.output import Output
from distrifusion.errors import ConfigError
from distrifusion.quality import metrics, videos

WORDS = ["--prompt=a lake", "--size=48x32", "--frames=5", "--seed=7", "--guidance=3"]


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan(tmp_path_factory.mktemp("video"))


@pytest.mark.supports("feature", "videos from the command line")
def test_two_devices_compared_with_one(video_folder: Path, tmp_path: Path) -> None:
    words = ["run", video_folder, *WORDS, "--steps=2", "--devices=2", "--plan=patch2", "--fps=8", "--compare"]
    done = run(*words, "-o", tmp_path / "a.webp")
    assert done.exit_code == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first.endswith(f"seed 7, video of 5 frames in {tmp_path / 'a.webp'}")
    psnr = re.search(r"PSNR (\S+) dB, SSIM (\S+), ", second)
    assert psnr is not None and float(psnr[1]) > 60 and float(psnr[2]) > 0.999
    with Image.open(tmp_path / "a.webp") as film, Image.open(tmp_path / "a-compare.webp") as beside:
        film.load()  # only then a WebP says how long a frame lasts
        assert (film.n_frames, film.size, film.info["duration"]) == (5, (48, 32), 125)
        assert beside.n_frames == 5 and beside.size[0] > 3 * 48


def test_numbered_frames_and_the_answer_as_json(video_folder: Path, tmp_path: Path) -> None:
    done = run("run", video_folder, *WORDS, "--steps=1", "-o", tmp_path / "f%02d.png", "--format=json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["frames"] == 5 and answer["video"] == str(tmp_path / "f%02d.png") and "picture" not in answer
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"f{i:02}.png" for i in range(1, 6)]
    first, *rest = (Image.open(tmp_path / f"f{i:02}.png") for i in range(1, 6))
    assert first.size == (48, 32) and all(np.any(np.array(frame) != np.array(first)) for frame in rest)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "a.jpg"], "'a.jpg' does not end in a kind of video; use .webp, .gif or .mp4"),
        (["--out", "a.mp4"], ".mp4 takes imageio and imageio-ffmpeg, not installed here"),
        (["--out", "a%s.png"], "such as out-%03d.png"),
        (["--out", "a%d-%d.png"], "such as out-%03d.png"),
        (["--out", "a%03d.gix"], "such as out-%03d.png"),
        (["--out", "/nowhere/at/all/a.gif"], "there is no folder '/nowhere/at/all' for the video"),
        (["--fps", "0"], "--fps 0 must be at least 1"),
        (["--frames", "0"], "num_frames=0 must be a whole number of at least 1"),
        (["--preview", "a.png"], "--preview is for models that draw pictures"),
        (["--image", "a.png"], "--image is for models that draw pictures"),
    ],
)
def test_bad_values_are_one_clear_line_before_anything_is_loaded(
    video_folder: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distrifusion.loading, "load", None)
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    done = run("run", video_folder, *WORDS, *words)
    assert done.exit_code == 2 and done.stdout == ""
    assert says in done.stderr and done.stderr.startswith("distrifusion: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--fps", "8"], "--fps 8 has no effect on a picture"), (["--frames", "5"], "no argument num_frames=")],
)
def test_words_of_videos_are_no_words_of_pictures(folder: Path, words: list[str], says: str) -> None:
    done = run("run", folder, "-p", "a", *words)
    assert done.exit_code == 2 and says in done.stderr


def test_verify_measures_pictures(video_folder: Path) -> None:
    done = run("verify", video_folder, "--prompt=a", "--plan=patch2")
    assert done.exit_code == 2 and "makes videos; distrifusion run --compare measures one" in done.stderr


def frames(seed: int, num_frames: int = 3) -> list[Image.Image]:
    numbers = np.random.default_rng(seed).integers(0, 256, (num_frames, 24, 40, 3), dtype=np.uint8)
    return [Image.fromarray(number) for number in numbers]


def test_a_film_is_written_where_its_packages_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(output, "find_spec", lambda name: object())
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda film, path, fps: written.update({path: (film, fps)}))
    film = frames(0)
    Output.of(tmp_path / "a.mp4", 24, is_video=True).write(film)
    assert written == {str(tmp_path / "a.mp4"): (film, 24)}


def test_an_animation_holds_every_frame_for_its_time(tmp_path: Path) -> None:
    there = Output.of(tmp_path / "a.gif", None, is_video=True)
    there.write(frames(0))
    with Image.open(there.write_beside(frames(1))) as beside:
        assert beside.n_frames == 3 and beside.filename.endswith("a-compare.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == 60  # a GIF counts in hundredths of a second


def test_all_frames_count() -> None:
    one, other = frames(0), frames(1)
    assert videos.psnr(one, one) == float("inf") and videos.ssim(one, one) == 1
    mixed = [one[0], other[1], one[2]]
    error = np.mean([(metrics.pixels(a) - metrics.pixels(b)) ** 2 for a, b in zip(one, mixed, strict=True)])
    assert videos.psnr(mixed, one) == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert videos.ssim(mixed, one) == pytest.approx((2 + metrics.ssim(other[1], one[1])) / 3, abs=1e-6)
    with pytest.raises(ConfigError, match="videos of 2 and 3 frames"):
        videos.psnr(one[:2], one)
