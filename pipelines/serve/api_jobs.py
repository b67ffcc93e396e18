"""``/v1/jobs``: images that take long. The answer is an id; the rest is in the store."""

import asyncio
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pipelines.serve.api_errors import ApiError
from pipelines.serve.api_requests import parsed, planned
from pipelines.serve.job_store import JobNotFound, JobRecord, Result, TooManyJobs
from pipelines.serve.server import Server

__all__ = ["job_routes"]

Answer = TypeVar("Answer")

TILE = re.compile(r"(\d{1,2})/(\d{1,5})_(\d{1,5})\.jpg")
BLOCK_BYTES = 2**18
FULL_RETRY_S = 30


def job_routes(server: Server) -> APIRouter:
    """Everything below ``/v1/jobs``."""
    router, store = APIRouter(prefix="/v1/jobs"), server.jobs

    @router.post("")
    async def create(http: Request) -> Response:
        request = parsed(await http.body(), server.config.limits)
        if request.n != 1:
            raise ApiError(400, f"n {request.n} for a job; allowed: 1", param="n", code="invalid_value")
        plan, *_ = planned(request, server)
        values = request.model_dump(mode="json", exclude_unset=True)
        keep_s = server.config.jobs.keep_s
        record = await _call(store.create, values, _principal(http), plan.seed, keep_s)
        await server.poke()
        return JSONResponse(_shown(record), 202)

    @router.get("")
    async def listed(http: Request) -> dict[str, object]:
        records = await _call(store.list, _principal(http))
        return {"object": "list", "data": [_shown(record) for record in records]}

    @router.get("/{job_id}")
    async def read(http: Request, job_id: str) -> dict[str, object]:
        return _shown(await _call(store.read, job_id, _principal(http)))

    @router.post("/{job_id}/cancel")
    async def cancel(http: Request, job_id: str) -> dict[str, object]:
        record = await _call(store.cancel, job_id, _principal(http))
        await server.poke()
        return _shown(record)

    @router.get("/{job_id}/preview")
    async def preview(http: Request, job_id: str) -> Response:
        png = await _call(store.preview, job_id, _principal(http))
        if png is None:
            raise ApiError(404, "no preview yet", code="no_preview")
        return Response(png, media_type="image/png", headers={"Cache-Control": "no-store"})

    @router.get("/{job_id}/content")
    async def content(http: Request, job_id: str) -> Response:
        result = await _call(store.open_result, job_id, _principal(http))
        suffix = result.content_type.removeprefix("image/")
        headers = {
            "Content-Length": str(result.size_bytes),
            "Content-Disposition": f'attachment; filename="{job_id}.{suffix}"',
        }
        return StreamingResponse(_blocks(result), media_type=result.content_type, headers=headers)

    @router.get("/{job_id}/tiles.dzi")
    async def dzi(http: Request, job_id: str) -> Response:
        return Response(await _call(store.dzi, job_id, _principal(http)), media_type="application/xml")

    @router.get("/{job_id}/tiles_files/{name:path}")
    async def tile(http: Request, job_id: str, name: str) -> Response:
        found = TILE.fullmatch(name)
        if found is None:
            raise ApiError(404, "no such tile", code="not_found")
        level, x, y = map(int, found.groups())
        jpeg = await _call(store.tile, job_id, _principal(http), level, x, y)
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    return router


async def _call(method: Callable[..., Answer], *arguments: Any) -> Answer:
    """In a thread, since the store waits for its files."""
    try:
        return await asyncio.to_thread(method, *arguments)
    except JobNotFound as error:
        raise ApiError(404, "no such job", code="not_found") from error
    except TooManyJobs as error:
        message = f"{error.allowed} jobs are not done yet, which is as many as are allowed"
        headers = {"Retry-After": str(FULL_RETRY_S)}
        raise ApiError(429, message, code="too_many_jobs", headers=headers) from error


def _principal(http: Request) -> str:
    return str(http.state.principal)


def _blocks(result: Result) -> Iterator[bytes]:
    with result.stream as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _shown(record: JobRecord) -> dict[str, object]:
    """What a client sees: nothing of the request, which it knows."""
    return {
        "id": record.id,
        "object": "job",
        "status": record.status,
        "stage": record.stage,
        "progress": record.progress,
        "created_at": int(record.created_at),
        "expires_at": None if record.expires_at is None else int(record.expires_at),
        "seed": record.seed,
        "size": record.size,
        "error": None if record.error is None else {"message": record.error},
        "has_preview": record.has_preview,
    }
