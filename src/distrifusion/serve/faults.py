"""Errors as answers: which status, and one form for all of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from distrifusion.errors import Cancelled, OutOfMemory, PoolTooLarge, RankFailed, StepTimeout
from distrifusion.serve.answers import ErrorBody, ErrorResponse
from distrifusion.serve.engine import Closing
from distrifusion.serve.scheduler import QueueFull

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
# Seconds after which to ask again where nothing is known of how long pictures take.
_SOON = 5
# Letters of a wrong value that are repeated.
_SHOWN = 80


class Fault(Exception):
    """An error that is answered.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        param: the field that was wrong.
        retry_after: seconds after which to ask again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = ErrorBody(message=str(self), type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=error).model_dump()

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**found, "WWW-Authenticate": "Bearer"} if self.status == 401 else found


def fault_of(error: BaseException) -> Fault:
    """How an error is answered."""
    match error:
        case Fault():
            return error
        case QueueFull():
            seconds = _SOON if error.free_in is None else max(1, -(-error.free_in // 1000))
            return Fault(429, "queue_full", f"{error}; ask again in about {seconds} s", retry_after=seconds)
        case Closing():
            return Fault(503, "shutting_down", str(error), retry_after=_SOON)
        case Cancelled():
            return Fault(499, "cancelled", str(error))
        case PoolTooLarge():
            return Fault(400, "too_large", str(error), param="size")
        case OutOfMemory():
            return Fault(503, "out_of_memory", f"{error}; draw a smaller picture, or fewer")
        case RankFailed() | StepTimeout():
            code = "rank_failed" if isinstance(error, RankFailed) else "step_timeout"
            return Fault(503, code, f"{error}; the next request starts the ranks anew", retry_after=1)
        case ValueError():
            return Fault(400, "invalid_value", str(error), param=_param(str(error)))
    return Fault(500, "internal_error", f"the picture could not be drawn: {type(error).__name__}: {error}")


def fault_of_fields(errors: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> Fault:
    """How the errors that pydantic found in a request are answered.

    Args:
        errors: in its form.
        fields: that a request may have.
    """
    found = [_of_field(error, fields) for error in errors]
    return Fault(400, found[0].code, "; ".join(map(str, found)), param=found[0].param)


def _of_field(error: Mapping[str, Any], fields: Sequence[str]) -> Fault:
    where = [str(part) for part in error["loc"][1:]]
    name = ".".join(where) or None
    match error["type"]:
        case "json_invalid":
            return Fault(400, "invalid_json", f"the body is not JSON: {error['ctx']['error']}")
        case "missing" if name is None:
            return Fault(400, "missing_field", 'the body is missing; send JSON, such as {"prompt": "a lake"}')
        case "missing":
            return Fault(400, "missing_field", f"{name} is missing, and is needed", param=name)
        case "model_attributes_type" if name is None:
            what = "the body must be a JSON object, sent with 'Content-Type: application/json'"
            return Fault(400, "invalid_value", what)
        case "extra_forbidden":
            near = difflib.get_close_matches(where[-1], fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(fields)}"
            return Fault(400, "unknown_field", f"there is no field '{name}'; {hint}", param=name)
        case "value_error":
            what, said = str(error["ctx"]["error"]), ""
        case _:
            what, said = error["msg"].removeprefix("Input "), f"={_shown(error['input'])}"
    if name is None:
        return Fault(400, "invalid_value", what, param=_param(what))
    return Fault(400, "invalid_value", what if what.startswith(name) else f"{name}{said}: {what}", param=name)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _param(message: str) -> str | None:
    """The field that a message begins with, as errors here name what was wrong."""
    match = re.match(r"(\w+)=", message)
    if match is None:
        return None
    return "size" if match[1] in ("width", "height") else match[1]
