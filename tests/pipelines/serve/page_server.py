"""A server that keeps the HTTP contract and has no model: what the page is tested against.

It is a real one on a free port. Its images are of plain colours, and it goes no further than a test lets it.
"""

import asyncio
import base64
import io
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeAlias

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

__all__ = ["FIRST_SEED", "JOB_SIDE_PX", "MODEL", "PageServer", "colour"]

PAGE = Path(__file__).resolve().parents[3] / "pipelines" / "serve" / "page"
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TILE_PX, OVERLAP_PX = 512, 1
JOB_SIDE_PX = 1024
CREATED_S = 1_800_000_000
LATENT_PX = 8
# Of a request that names none; a double cannot hold it.
FIRST_SEED = 2**63 - 9

Json: TypeAlias = dict[str, Any]
Paint: TypeAlias = Callable[[int, tuple[int, int]], Image.Image]

MODEL: Json = {
    "id": "photos",
    "object": "model",
    "created": CREATED_S,
    "owned_by": "ray-ldm",
    "classes": None,
    "takes_prompt": True,
    "default_size": "256x256",
    "size_multiple_px": 64,
    "max_side_px": 512,
    "max_steps": 100,
    "max_images": 4,
    "default_steps": 5,
    "default_guidance": 7.5,
    "max_guidance": 50.0,
    "schedulers": ["ddim", "dpmpp"],
    "default_scheduler": "dpmpp",
    "upscale_sizes_px": [256, 1024, 2048],
}


def colour(seed: int) -> tuple[int, int, int]:
    """RGB of the image that a seed makes."""
    return 37 * seed % 256, 101 * seed % 256, 197 * seed % 256


def _plain(seed: int, size_px: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size_px, colour(seed))


class Refusal(Exception):
    """An answer with a status of an error; ``wait_s`` goes into Retry-After."""

    def __init__(self, status: int, message: str, wait_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.wait_s = status, message, wait_s

    @property
    def response(self) -> Response:
        headers = {} if self.wait_s is None else {"Retry-After": str(self.wait_s)}
        error = {"message": self.message, "type": "error", "param": None, "code": None}
        return JSONResponse({"error": error}, self.status, headers)


class PageServer:
    """A context that serves; a test sets what is to happen, and reads what came.

    refusal: the answer to everything that asks for images; hold_at: the step at which a generation waits for
    ``released``; trouble: told by an ``error`` event after the first step; left: a client went too early;
    bodies: of requests for images; tiles: asked for, as ``level/x_y``. Jobs stand until a test moves them.
    """

    def __init__(self, models: list[Json] | None = None, paint: Paint = _plain, key: str = "") -> None:
        self.models, self.paint, self.key = models or [MODEL], paint, key
        self.refusal: Refusal | None = None
        self.hold_at: int | None = None
        self.released, self.left = threading.Event(), threading.Event()
        self.trouble = ""
        self.bodies: list[Json] = []
        self.jobs: dict[str, Json] = {}
        self.tiles: list[str] = []

    def __enter__(self) -> "PageServer":
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            _app(self), log_level="error", ws="none", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def refuse(self, status: int, message: str, wait_s: int | None = None) -> None:
        self.refusal = Refusal(status, message, wait_s)

    def move_job(self, **changes: Any) -> None:
        """Change the newest job."""
        list(self.jobs.values())[-1].update(changes)

    def check_key(self, request: Request) -> None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise Refusal(401, "no such key")

    async def take(self, request: Request) -> Json:
        """The body of a request for images, unless it is to be refused."""
        body: Json = json.loads(await request.body())
        self.bodies.append(body)
        if self.refusal:
            raise self.refusal
        return body

    def add_job(self, body: Json) -> Json:
        job = {
            "id": f"job-{len(self.jobs)}",
            "object": "job",
            "status": "queued",
            "stage": None,
            "progress": 0.0,
            "created_at": CREATED_S,
            "expires_at": None,
            "seed": body.get("seed", 0),
            "size": None,
            "error": None,
            "has_preview": False,
        }
        self.jobs[job["id"]] = job
        return job

    async def stream(self, request: Request, body: Json) -> AsyncIterator[str]:
        """All events of a generation; sets ``left`` where the client goes before the end."""
        is_done = False
        try:
            async for event in self._events(request, body):
                kind, data = event.get("type", "error"), json.dumps(event)
                yield f": keep-alive\r\n\r\nevent: {kind}\r\ndata: {data}\r\n\r\n"
            is_done = True
        finally:
            if not is_done:
                self.left.set()

    async def _events(self, request: Request, body: Json) -> AsyncIterator[Json]:
        for step in range(1, body["num_inference_steps"] + 1):
            for image in range(body["n"]):
                yield self._partial(body, image, step)
            await self._wait(request, step)
            if self.trouble:
                yield {"error": {"message": self.trouble, "type": "error", "param": None, "code": None}}
                return
        for image in range(body["n"]):
            yield self._image(body, image, "image_generation.completed", 1)

    def _partial(self, body: Json, image: int, step: int) -> Json:
        partial = self._image(body, image, "image_generation.partial_image", LATENT_PX)
        del partial["seed"]
        return partial | {
            "partial_image_index": step - 1,
            "step": step,
            "num_steps": body["num_inference_steps"],
        }

    def _image(self, body: Json, image: int, kind: str, scale: int) -> Json:
        width, height = (int(side) // scale for side in body["size"].split("x"))
        seed = body.get("seed", FIRST_SEED) + image
        return {
            "type": kind,
            "b64_json": _base64(self.paint(seed, (width, height))),
            "image_index": image,
            "seed": seed,
            "created_at": CREATED_S,
            "size": body["size"],
            "output_format": "png",
        }

    async def _wait(self, request: Request, step: int) -> None:
        while step == self.hold_at and not self.released.is_set():
            if await request.is_disconnected():
                raise asyncio.CancelledError
            await asyncio.sleep(0.005)


def _app(server: PageServer) -> FastAPI:
    app = FastAPI()
    app.add_exception_handler(Refusal, lambda _, refusal: refusal.response)
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/")
    def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": CONTENT_POLICY})

    keyed = [Depends(server.check_key)]

    @app.get("/v1/models", dependencies=keyed)
    def models() -> Json:
        return {"object": "list", "data": server.models}

    @app.post("/v1/images/generations", dependencies=keyed)
    async def generate(request: Request) -> Response:
        body = await server.take(request)
        return StreamingResponse(server.stream(request, body), media_type="text/event-stream")

    @app.post("/v1/jobs", dependencies=keyed, status_code=202)
    async def start_job(request: Request) -> Json:
        return server.add_job(await server.take(request))

    @app.get("/v1/jobs", dependencies=keyed)
    def jobs() -> Json:
        return {"object": "list", "data": list(reversed(server.jobs.values()))}

    @app.post("/v1/jobs/{job}/cancel", dependencies=keyed)
    def cancel_job(job: str) -> Json:
        server.jobs[job]["status"] = "cancelled"
        return server.jobs[job]

    @app.get("/v1/jobs/{job}/preview", dependencies=keyed)
    def preview(job: str) -> Response:
        return _png(server.paint(server.jobs[job]["seed"], (32, 32)))

    @app.get("/v1/jobs/{job}/content", dependencies=keyed)
    def content(job: str) -> Response:
        return _png(server.paint(server.jobs[job]["seed"], (JOB_SIDE_PX, JOB_SIDE_PX)))

    @app.get("/v1/jobs/{job}/tiles.dzi", dependencies=keyed)
    def tiles(job: str) -> Response:
        return Response(_dzi(), media_type="application/xml")

    @app.get("/v1/jobs/{job}/tiles_files/{level}/{name}.jpg", dependencies=keyed)
    def tile(job: str, level: int, name: str) -> Response:
        server.tiles.append(f"{level}/{name}")
        image = server.paint(server.jobs[job]["seed"], (JOB_SIDE_PX, JOB_SIDE_PX))
        return Response(_bytes(_tile(image, level, name), "JPEG"), media_type="image/jpeg")

    return app


def _dzi() -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?><Image xmlns="http://schemas.microsoft.com/deepzoom/2008" '
        f'Format="jpg" Overlap="{OVERLAP_PX}" TileSize="{TILE_PX}">'
        f'<Size Width="{JOB_SIDE_PX}" Height="{JOB_SIDE_PX}"/></Image>'
    )


def _tile(image: Image.Image, level: int, name: str) -> Image.Image:
    side = math.ceil(JOB_SIDE_PX / 2 ** (math.ceil(math.log2(JOB_SIDE_PX)) - level))
    spans = []
    for index in name.split("_"):
        start = TILE_PX * int(index)
        spans.append((max(start - OVERLAP_PX, 0), min(start + TILE_PX + OVERLAP_PX, side)))
    (left, right), (top, bottom) = spans
    return image.resize((side, side)).crop((left, top, right, bottom))


def _bytes(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _png(image: Image.Image) -> Response:
    return Response(_bytes(image, "PNG"), media_type="image/png")


def _base64(image: Image.Image) -> str:
    return base64.b64encode(_bytes(image, "PNG")).decode()
