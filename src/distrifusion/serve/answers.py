"""What the server answers, and how pictures become text."""

from __future__ import annotations

import base64
import io
import time
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from PIL.Image import Image

    from distrifusion.serve.engine import Drawn

_SAVING: dict[str, dict[str, Any]] = {"png": {}, "webp": {"lossless": True}, "jpeg": {"quality": 95}}


class ImageData(BaseModel):
    """One picture."""

    b64_json: str = Field(description="The file of the picture, in output_format, as base64.")
    seed: int = Field(description="With the same request, this seed and n=1, the picture is drawn again.")


class ImageResponse(BaseModel):
    """The pictures of a request."""

    created: int = Field(description="Seconds since the epoch.")
    data: list[ImageData]
    plan: str = Field(description="What was divided over the devices, such as 'cfg2.patch2'.")
    seconds: float = Field(description="That the drawing took, waiting left out.")


class ErrorBody(BaseModel):
    """What went wrong, and what to do."""

    message: str = Field(description="The value that was wrong and what works instead.")
    type: str = Field(description="invalid_request_error, authentication_error, rate_limit_error or server_error.")
    param: str | None = Field(description="The field that was wrong.")
    code: str = Field(description="A word for programs, such as 'queue_full'.")


class ErrorResponse(BaseModel):
    """The one form of all errors."""

    error: ErrorBody


class ModelData(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server was started; seconds since the epoch.")
    owned_by: str = "distrifusion"


class ModelList(BaseModel):
    """The served models: one."""

    object: Literal["list"] = "list"
    data: list[ModelData]


class CancelResponse(BaseModel):
    """A request that was ended."""

    id: str
    cancelled: Literal[True] = True


class FailureData(BaseModel):
    """A request that was in order and failed."""

    at: int = Field(description="Seconds since the epoch.")
    message: str


class ReadyResponse(BaseModel):
    """Whether requests are taken, and by what."""

    ready: bool
    model: str
    plan: str
    devices: list[str]
    waiting: int = Field(description="Requests in the queue.")
    drawing: int = Field(description="Requests that are being drawn.")
    last_failure: FailureData | None = Field(description="Ranks are started anew by the request after it.")


def image_response(drawn: Drawn, output_format: str, plan: str) -> ImageResponse:
    """The answer with its pictures, which takes some time for large ones."""
    data = [
        ImageData(b64_json=base64.b64encode(_file(picture, output_format)).decode(), seed=seed)
        for picture, seed in zip(drawn.pictures, drawn.seeds, strict=True)
    ]
    return ImageResponse(created=int(time.time()), data=data, plan=plan, seconds=round(drawn.seconds, 3))


def _file(picture: Image, output_format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=output_format, **_SAVING[output_format])
    return file.getvalue()
