"""What is there, and how it is: ``/v1/models``, health, metrics, and the page."""

from math import lcm
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from ldm.model_card import ModelCard
from pipelines.serve.api_errors import ApiError
from pipelines.serve.server import Server

__all__ = ["PAGE", "model_routes"]

PAGE = Path(__file__).parent / "page"


def model_routes(server: Server) -> APIRouter:
    """GET ``/v1/models``, ``/healthz``, ``/readyz``, ``/metrics`` and ``/``."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [_shown(name, server) for name in server.cards]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in server.cards:
            raise ApiError(404, "no such model", param="model", code="model_not_found")
        return JSONResponse(_shown(name, server))

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz")
    async def readyz() -> Response:
        is_ready = await server.ready()
        status = "ready" if is_ready else "starting"
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(await server.metrics(), media_type="text/plain; version=0.0.4")

    @router.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    return router


def _shown(name: str, server: Server) -> dict[str, object]:
    card, config = server.cards[name], server.config
    height, width = card.size_px
    multiple = _multiple_px(card, server)
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "ray-ldm",
        "classes": card.class_names,
        "takes_prompt": card.condition == "text",
        "default_size": f"{width}x{height}",
        "size_multiple_px": multiple,
        "max_side_px": config.limits.max_side_px,
        "max_steps": config.limits.max_steps,
        "max_images": config.limits.max_images,
        "default_steps": config.default_steps,
        "default_guidance": 1.0 if card.condition == "none" else config.default_guidance,
        "max_guidance": config.limits.max_guidance,
        "schedulers": card.schedulers,
        "default_scheduler": card.default_scheduler,
        "upscale_sizes_px": server.upscaled_sides_px(card),
    }


def _multiple_px(card: ModelCard, server: Server) -> int:
    """Of both: what the model takes, and what the server allows."""
    return lcm(card.size_multiple_px, server.config.limits.sizes_multiple_px)
