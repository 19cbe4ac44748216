"""What a request for pictures may say: the OpenAI form, and diffusers' own words beside it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distrifusion.cli import options
from distrifusion.errors import ConfigError

AUTO_SIZE = "auto"
MAX_PICTURES = 10
_MAX_SEED = 2**63 - 1
_MAX_STEPS = 1000
_MAX_LETTERS = 32_000
# Of these names the pipeline's call has arguments.
_WORDS = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "sampler", "window", "tolerance")
# Pixels where the size is the model's own and not known here; only estimates of waiting come from it.
_OWN_PIXELS = 1024 * 1024


@dataclass(frozen=True)
class Order:
    """What the engine is asked for.

    Attributes:
        arguments: of the pipeline's call, without the generators.
        seeds: one for each picture.
        pixels: of all pictures together; None if the size is the model's own.
        work: what the scheduler estimates waiting from.
    """

    arguments: Mapping[str, Any]
    seeds: tuple[int, ...]

    @property
    def pixels(self) -> int | None:
        width, height = self.arguments.get("width"), self.arguments.get("height")
        return None if width is None or height is None else width * height * len(self.seeds)

    @property
    def work(self) -> int:
        pixels = _OWN_PIXELS * len(self.seeds) if self.pixels is None else self.pixels
        return pixels * int(self.arguments.get("num_inference_steps", 1))


class ImageRequest(BaseModel):
    """A request for pictures."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=_MAX_LETTERS, description="What to draw.")
    model: str | None = Field(None, description="The served model's id, from /v1/models; may be left out.")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="How many pictures; each has its own seed.")
    size: str | None = Field(
        None,
        max_length=32,
        description="'WIDTHxHEIGHT' in pixels, such as '1024x1024'; 'auto' or left out: the server's own.",
        examples=["1024x1024"],
    )
    response_format: Literal["b64_json"] = Field("b64_json", description="Pictures come in the answer, as base64.")
    output_format: Literal["png", "webp", "jpeg"] = Field(
        "png", description="png and webp keep every pixel; jpeg is written at quality 95."
    )
    stream: bool = Field(False, description="Answer with server-sent events: queue and steps, then the pictures.")
    user: str | None = Field(None, description="Taken and not used.")
    negative_prompt: str | None = Field(None, max_length=_MAX_LETTERS, description="What to keep out of the picture.")
    num_inference_steps: int | None = Field(
        None, ge=1, le=_MAX_STEPS, description="Denoising steps; left out: the server's own."
    )
    guidance_scale: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Weight of the prompt; up to 1 it is drawn without guidance, in half the time.",
    )
    seed: int | None = Field(
        None, ge=0, le=_MAX_SEED, description="Of the first picture's noise; the next have seed + 1, ... Left out: new."
    )
    sampler: str | None = Field(None, description="Solve many steps at once, for idle devices: 'picard' or 'taa'.")
    window: int | None = Field(None, ge=1, description="Of sampler: steps that are solved at once.")
    tolerance: float | None = Field(None, allow_inf_nan=False, description="Of sampler: how exactly a step is solved.")

    @field_validator("response_format", mode="before")
    @classmethod
    def _no_url(cls, value: Any) -> Any:
        if value == "url":
            raise ValueError("'url' is not served, because no picture is kept here; leave it out, or say 'b64_json'")
        return value

    @field_validator("size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value not in (None, AUTO_SIZE):
            options.size(value)
        return value

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        if self.seed is not None and self.seed + self.n - 1 > _MAX_SEED:
            raise ValueError(f"seed={self.seed} with n={self.n} passes {_MAX_SEED}; use a smaller seed")
        return self

    def order(self, defaults: Mapping[str, Any], max_pixels: int) -> Order:
        """What the engine is asked for.

        Args:
            defaults: arguments of the pipeline's call where the request says nothing.
            max_pixels: that a request may have, all its pictures together.

        Raises:
            ConfigError: if it has more.
        """
        given = {name: getattr(self, name) for name in _WORDS if getattr(self, name) is not None}
        if self.size not in (None, AUTO_SIZE):
            given["width"], given["height"] = options.size(self.size)
        if self.n > 1:
            given["num_images_per_prompt"] = self.n
        first = secrets.randbelow(2**32) if self.seed is None else self.seed
        order = Order({**defaults, **given}, tuple(range(first, first + self.n)))
        if order.pixels is not None and order.pixels > max_pixels:
            width, height = order.arguments["width"], order.arguments["height"]
            raise ConfigError(
                f"size='{width}x{height}' with n={self.n} has {order.pixels} pixels, and a request may have "
                f"{max_pixels}; draw smaller or fewer pictures, or start the server with a larger --max-pixels"
            )
        return order
