"""The routes: JSON in, the queue, JSON out; nothing here waits for a device."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from distrifusion.serve import stream
from distrifusion.serve.answers import (
    CancelResponse,
    ErrorResponse,
    FailureData,
    ImageResponse,
    ModelData,
    ModelList,
    ReadyResponse,
    image_response,
)
from distrifusion.serve.engine import Drawn, Engine
from distrifusion.serve.entrance import ID_FORM, Entrance
from distrifusion.serve.faults import Fault, fault_of, fault_of_fields
from distrifusion.serve.following import Following
from distrifusion.serve.metrics import Metrics
from distrifusion.serve.request import ImageRequest

MAX_PIXELS = 2048 * 2048
REQUEST_TIMEOUT = 600.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A value that cannot work; it is named, with what can."},
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong."},
    404: {"model": ErrorResponse, "description": "There is no such model."},
    429: {"model": ErrorResponse, "description": "The queue is full; Retry-After says for how long."},
    499: {"model": ErrorResponse, "description": "The request was cancelled."},
    503: {"model": ErrorResponse, "description": "A rank failed, or the server is being stopped; ask again."},
    504: {"model": ErrorResponse, "description": "The request passed its limit and is cancelled."},
}
_STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "With stream: server-sent events."}}}


@dataclass(frozen=True)
class Settings:
    """What an application is told beside its engine.

    Attributes:
        model: id under which the pipeline is served.
        defaults: arguments of the pipeline's call where a request says nothing.
        max_pixels: of a request, all its pictures together.
        request_timeout: seconds from a request's arrival to its end, waiting included.
        api_key: that requests under /v1 must bear; None: no key.
    """

    model: str = "model"
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"num_inference_steps": 30})
    max_pixels: int = MAX_PIXELS
    request_timeout: float = REQUEST_TIMEOUT
    api_key: str | None = None


def app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """The ASGI application, to be served alone or mounted in another one; whoever made the engine closes it."""
    service = _Service(engine, settings or Settings())
    api = FastAPI(
        title="distrifusion",
        description="Draws pictures of a diffusion model on all devices of this machine, one request after the other.",
        redoc_url=None,
    )
    api.add_middleware(Entrance)
    api.add_exception_handler(Fault, _answer)
    api.add_exception_handler(RequestValidationError, service.refuse)
    api.add_exception_handler(HTTPException, _answer_http)
    api.add_exception_handler(Exception, _answer)
    keyed: dict[str, Any] = {"dependencies": [Depends(service.check_key)]}
    drawn: dict[int | str, dict[str, Any]] = {**_ERRORS, 200: {"content": _STREAM}}
    api.add_api_route(
        "/v1/images/generations",
        service.generate,
        methods=["POST"],
        response_model=ImageResponse,
        responses=drawn,
        summary="Draw pictures",
        **keyed,
    )
    api.add_api_route(
        "/v1/requests/{request_id}",
        service.cancel,
        methods=["DELETE"],
        responses={404: {"model": ErrorResponse}},
        summary="Cancel a request",
        **keyed,
    )
    api.add_api_route("/v1/models", service.models, summary="The served model", **keyed)
    api.add_api_route("/health", service.health, summary="Alive")
    api.add_api_route(
        "/ready",
        service.ready,
        response_model=ReadyResponse,
        responses={503: {"model": ReadyResponse}},
        summary="Ready",
    )
    api.add_api_route("/metrics", service.metrics_text, response_class=PlainTextResponse, summary="For Prometheus")
    return api


class _Service:
    """The routes of one application."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = Metrics(engine, settings.model)
        self._started = int(time.time())

    async def generate(
        self,
        body: ImageRequest,
        request: Request,
        x_request_id: Annotated[
            str | None,
            Header(pattern=ID_FORM, description="By which the request can be cancelled; left out: a new one."),
        ] = None,
    ) -> Response:
        """Draw pictures; the answer waits for them, or with `stream` is a stream of events."""
        try:
            following = self._follow(body, request)
        except Fault as fault:
            self._metrics.ended(fault.code)
            raise

        async def answer(drawn: Drawn) -> ImageResponse:
            self._metrics.drew(drawn)
            return await asyncio.to_thread(image_response, drawn, body.output_format, str(self._engine.pipe.plan))

        if body.stream:
            events = stream.events(self._engine, following, answer, self._metrics)
            return StreamingResponse(
                events,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        with self._metrics.request():
            async with following:
                await following.settle()
            response = await answer(following.drawn())
        return JSONResponse(response.model_dump())

    def _follow(self, body: ImageRequest, request: Request) -> Following:
        """Check a request and put it into the queue."""
        settings, engine = self._settings, self._engine
        if body.model not in (None, settings.model):
            raise Fault(
                404,
                "model_not_found",
                f"there is no model '{body.model}' here; it is '{settings.model}', and may be left out",
                param="model",
            )
        try:
            order = body.order(settings.defaults, settings.max_pixels)
            engine.pipe.check(**order.arguments)
            job = engine.submit(request.state.request_id, order)
        except Exception as error:
            raise fault_of(error) from error
        return Following(engine, job, request.receive, settings.request_timeout)

    async def cancel(self, request_id: str) -> CancelResponse:
        """End a request: at once if it waits, after its step if it is being drawn."""
        if not self._engine.cancel(request_id):
            raise Fault(404, "request_not_found", f"no request '{request_id}' waits or is being drawn")
        return CancelResponse(id=request_id)

    async def models(self) -> ModelList:
        """The one model that is served."""
        return ModelList(data=[ModelData(id=self._settings.model, created=self._started)])

    async def health(self) -> dict[str, str]:
        """The process answers; says nothing of the devices."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Whether requests are taken, and what failed last."""
        engine, last = self._engine, self._engine.last_failure
        state = ReadyResponse(
            ready=not engine.is_closing,
            model=self._settings.model,
            plan=str(engine.pipe.plan),
            devices=[str(device) for device in engine.pipe.devices],
            waiting=engine.num_waiting,
            drawing=engine.num_drawn,
            last_failure=None if last is None else FailureData(at=last.at, message=last.message),
        )
        return JSONResponse(state.model_dump(), status_code=200 if state.ready else 503)

    async def metrics_text(self) -> Response:
        """Counts and times in the form of Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def refuse(self, request: Request, error: Exception) -> JSONResponse:
        """Answer a body that is no request."""
        assert isinstance(error, RequestValidationError)
        fault = fault_of_fields(error.errors(), list(ImageRequest.model_fields))
        self._metrics.ended(fault.code)
        return await _answer(request, fault)

    async def check_key(
        self,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        """Refuse a request without the key; every one passes if there is none."""
        key = self._settings.api_key
        given = "" if bearer is None else bearer.credentials
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            what = "wrong" if given else "missing"
            raise Fault(401, "invalid_api_key", f"the API key is {what}; send it as 'Authorization: Bearer KEY'")


async def _answer(_: Request, error: Exception) -> JSONResponse:
    fault = fault_of(error)
    return JSONResponse(fault.body, status_code=fault.status, headers=fault.headers)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    said = {
        404: f"there is no {path}; /docs says what there is",
        405: f"{request.method} {path} is not served; /docs says what is",
    }
    code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(error.status_code, "invalid_request")
    return await _answer(request, Fault(error.status_code, code, said.get(error.status_code, str(error.detail))))
