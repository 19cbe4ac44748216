"""What a run writes: a picture, or the frames of a video as an animation, a film, or numbered pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from distrifusion.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

_ANIMATIONS = (".webp", ".gif")
_FILMS = (".mp4", ".mov", ".mkv")
_FILM_PACKAGES = ("imageio", "imageio_ffmpeg")
_NUMBERED = re.compile(r"%0?\d*d")
_FPS = 16


@dataclass(frozen=True)
class Output:
    """Where a run writes what it has drawn.

    Attributes:
        path: the file; one with a number such as `%03d` in its name is a file for every frame.
        fps: frames per second of a video; None for a picture.
    """

    path: Path
    fps: int | None

    @classmethod
    def of(cls, path: Path | None, fps: int | None, is_video: bool) -> Output:
        """From the options, checked before anything is loaded.

        Raises:
            ConfigError: if the file's ending is none that can be written, its folder is not there, or an option has no
                effect.
        """
        if not is_video:
            if fps is not None:
                raise ConfigError(f"--fps {fps} has no effect on a picture; leave it out")
            path = path or Path("out.png")
            check_picture(path)
            return cls(path, None)
        if fps is not None and fps < 1:
            raise ConfigError(f"--fps {fps} must be at least 1")
        path = path or Path("out.webp")
        _check_video(path)
        return cls(path, fps or _FPS)

    def write(self, frames: Sequence[Image]) -> None:
        """Write a picture, or a video's frames."""
        self._write(frames, self.path)

    def write_beside(self, frames: Sequence[Image]) -> Path:
        """Write what these are compared with, in the same form beside them; returns where."""
        path = self.path.with_name(f"{self.path.stem}-compare{self.path.suffix}")
        self._write(frames, path)
        return path

    def _write(self, frames: Sequence[Image], path: Path) -> None:
        if self.fps is None:
            frames[0].save(path)
        elif _NUMBERED.search(path.name):
            for number, frame in enumerate(frames, 1):
                frame.save(path.with_name(path.name % number))
        elif path.suffix.lower() in _ANIMATIONS:
            first, *rest = frames
            first.save(path, save_all=True, append_images=rest, duration=round(1000 / self.fps), loop=0)
        else:
            from diffusers.utils import export_to_video

            export_to_video(list(frames), str(path), fps=self.fps)


def check_picture(path: Path) -> None:
    """Check that a picture can be written.

    Raises:
        ConfigError: if there is no folder for it, or its ending is no kind of picture.
    """
    _check_place(path, "picture", "out.png")
    if not _is_picture(path):
        raise ConfigError(f"'{path.name}' does not end in a kind of picture; use .png, .jpg or .webp")


def _check_video(path: Path) -> None:
    _check_place(path, "video", "out.webp")
    ending = path.suffix.lower()
    if "%" in path.name:
        if len(_NUMBERED.findall(path.name)) != 1 or path.name.count("%") != 1 or not _is_picture(path):
            raise ConfigError(f"'{path.name}' does not name a picture for every frame; use a name such as out-%03d.png")
    elif ending in _FILMS:
        missing = [package.replace("_", "-") for package in _FILM_PACKAGES if find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"'{path.name}': {ending} takes {' and '.join(missing)}, not installed here; pip install them, or use "
                ".webp or .gif"
            )
    elif ending not in _ANIMATIONS:
        raise ConfigError(
            f"'{path.name}' does not end in a kind of video; use .webp, .gif or .mp4, or a picture for every frame, "
            "such as out-%03d.png"
        )


def _check_place(path: Path, what: str, example: str) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder '{path.parent}' for the {what} '{path.name}'; make it first")
    if path.is_dir():
        raise ConfigError(f"'{path}' is a folder; name a file in it, such as {path / example}")


def _is_picture(path: Path) -> bool:
    from PIL import Image

    Image.init()
    return Image.EXTENSION.get(path.suffix.lower()) in Image.SAVE
