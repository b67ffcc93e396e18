"""``/v1/images``: OpenAI's image API, at once or as a stream with previews."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse, JSONServerSentEvent

from ldm.images import encode_png
from pipelines.serve.api_errors import ApiError, error_body
from pipelines.serve.api_requests import parsed, planned, rejected
from pipelines.serve.edit_upload import read_edit
from pipelines.serve.generation_request import GenerationRequest
from pipelines.serve.image_maker import EditInput, ImageMaker, Made, MakerEvent, Previewed
from pipelines.serve.image_plan import ImagePlan, Refusal
from pipelines.serve.merging import merged, together
from pipelines.serve.messages import Rejected
from pipelines.serve.server import Server
from pipelines.serve.stages import StageFailed

__all__ = ["image_routes"]

LOG = logging.getLogger("ldm.serve")
PREFIX = "image_generation"


@dataclass(frozen=True)
class Images:
    """Images of one request, on their way: the events of each, of which the first has come."""

    request: GenerationRequest
    plans: Sequence[ImagePlan]
    events: Sequence[AsyncIterator[MakerEvent]]
    kind: str = PREFIX
    created_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def common(self) -> dict[str, object]:
        """What OpenAI says of every image."""
        height, width = self.plans[0].size_px
        return {
            "size": f"{width}x{height}",
            "quality": self.request.quality,
            "output_format": self.request.output_format,
            "background": "opaque",
        }


def image_routes(server: Server) -> APIRouter:
    """POST ``/v1/images/generations`` and ``/v1/images/edits``."""
    router = APIRouter(prefix="/v1/images")

    @router.post("/generations")
    async def generations(http: Request) -> Response:
        request = parsed(await http.body(), server.config.limits)
        return await _answer(server, request, None)

    @router.post("/edits")
    async def edits(http: Request) -> Response:
        request, edit = await read_edit(http, server)
        return await _answer(server, request, edit)

    return router


async def _answer(server: Server, request: GenerationRequest, edit: EditInput | None) -> Response:
    plans = planned(request, server)
    if server.config.log_prompts:
        LOG.info("prompt %r, negative prompt %r", request.prompt, request.negative_prompt)
    try:
        async with asyncio.timeout(server.config.request_timeout_s):
            images = await _begun(server.maker, request, plans, edit)
            if not request.stream:
                return await _at_once(images)
    except (StageFailed, TimeoutError) as error:
        raise failed(error) from error
    return EventSourceResponse(_stream(images, server), ping=int(server.config.keep_alive_s), sep="\n")


async def _begun(
    maker: ImageMaker, request: GenerationRequest, plans: Sequence[ImagePlan], edit: EditInput | None
) -> Images:
    """All accepted; or ApiError, and none goes on."""
    events = [maker.make(plan, _preview_every(request, plan), edit) for plan in plans]
    try:
        for first in await together(_next(each) for each in events):
            if isinstance(first, Rejected):
                raise rejected(first)
    except Refusal as refusal:
        await _close(events)
        raise ApiError(400, str(refusal), param=refusal.param, code="invalid_value") from refusal
    except BaseException:
        await _close(events)
        raise
    return Images(request, plans, events, PREFIX if edit is None else "image_edit")


async def _next(events: AsyncIterator[MakerEvent]) -> MakerEvent:
    return await anext(events)


async def _close(events: Sequence[AsyncIterator[MakerEvent]]) -> None:
    for each in events:
        await each.aclose()  # type: ignore[attr-defined]  # they are generators


def _preview_every(request: GenerationRequest, plan: ImagePlan) -> int:
    """So that there are no more than were asked for, and the last is not the image itself."""
    return -(-plan.num_steps // (request.partial_images + 1)) if request.partial_images else 0


async def _at_once(images: Images) -> Response:
    files = await together(map(_file, images.events))
    data = [
        {"b64_json": _base64(file), "seed": plan.seed} for file, plan in zip(files, images.plans, strict=True)
    ]
    return JSONResponse({"created": images.created_at, "data": data, **images.common})


async def _file(events: AsyncIterator[MakerEvent]) -> bytes:
    async for event in events:
        if isinstance(event, Rejected):
            raise rejected(event)
        if isinstance(event, Made):
            return event.file
    raise StageFailed("the last stage ended without an image")


async def _stream(images: Images, server: Server) -> AsyncIterator[JSONServerSentEvent]:
    """Events of all images as they come; an error is the last of them."""
    counts = [0] * len(images.plans)
    try:
        async with asyncio.timeout(server.config.request_timeout_s):
            async for index, event in merged(images.events):
                if isinstance(event, Rejected):
                    yield _error(rejected(event))
                    return
                if isinstance(event, Previewed) and event.progress.preview is not None:
                    yield _partial(images, index, counts[index], event)
                    counts[index] += 1
                elif isinstance(event, Made):
                    yield _completed(images, index, event)
    except (StageFailed, TimeoutError) as error:
        yield _error(failed(error))
    finally:
        await _close(images.events)


def failed(error: Exception) -> ApiError:
    """What is told where a stage failed, or the time was over."""
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than this server allows", code="timeout")
    return ApiError(503, f"{error}; try again", code="stage_failed", headers={"Retry-After": "1"})


def _partial(images: Images, index: int, count: int, event: Previewed) -> JSONServerSentEvent:
    assert event.progress.preview is not None
    return _event(
        images,
        "partial_image",
        b64_json=_base64(encode_png(event.progress.preview)),
        partial_image_index=count,
        image_index=index,
        stage=event.stage,
        step=event.progress.step,
        num_steps=event.progress.num_steps,
        output_format="png",
    )


def _completed(images: Images, index: int, event: Made) -> JSONServerSentEvent:
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    usage |= {"input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}  # type: ignore[dict-item]
    return _event(
        images,
        "completed",
        b64_json=_base64(event.file),
        image_index=index,
        seed=images.plans[index].seed,
        usage=usage,
    )


def _event(images: Images, name: str, **values: object) -> JSONServerSentEvent:
    kind = f"{images.kind}.{name}"
    data: dict[str, Any] = {"type": kind, "created_at": images.created_at, **images.common, **values}
    return JSONServerSentEvent(data, event=kind)


def _error(error: ApiError) -> JSONServerSentEvent:
    body = error_body(str(error.detail), "server_error", error.param, error.code)
    return JSONServerSentEvent(body, event="error")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
