"""The ingress: the HTTP API in front of the stages, as a deployment of Ray Serve."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ldm.model_card import ModelCard
from pipelines.serve import api_errors
from pipelines.serve.api_images import image_routes
from pipelines.serve.api_jobs import job_routes
from pipelines.serve.api_models import PAGE, model_routes
from pipelines.serve.cluster_metrics import cluster_metrics
from pipelines.serve.config import ServeConfig
from pipelines.serve.device_thread import switch_often
from pipelines.serve.drain import Drain
from pipelines.serve.guard import Guard
from pipelines.serve.image_maker import ImageMaker, ResultCache
from pipelines.serve.job_store import JobStore
from pipelines.serve.keys import KeyRing
from pipelines.serve.server import Server
from pipelines.serve.stage_metrics import RequestMetrics
from pipelines.serve.stages import Handle, Stages

__all__ = ["Ingress", "api"]


class Ingress:
    """Replica. stages: as `Stages` takes them; factors: of the upsamplers."""

    def __init__(
        self,
        cards: Mapping[str, ModelCard],
        factors: tuple[int, ...],
        config: ServeConfig,
        runner: Handle,
        **stages: Any,
    ) -> None:
        switch_often()
        _log_as_ray_does()
        self._drain = Drain()
        self.server = Server(
            config=config,
            keys=KeyRing.load(config.access.key_file),
            cards=cards,
            factors=factors,
            maker=ImageMaker(
                cards, Stages(**stages, observer=RequestMetrics()), ResultCache(config.cache_bytes)
            ),
            jobs=JobStore(
                config.jobs.url,
                max_jobs=config.jobs.max_unfinished_per_key,
                max_unfinished=config.jobs.max_unfinished,
            ),
            poke=runner.poke.remote,
            ready=self._is_ready,
            metrics=cluster_metrics,
            drain=self._drain,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return api(self.server)

    def drain(self) -> int:
        """Take no more work; returns how many requests are still on their way."""
        return self._drain.begin()

    async def _is_ready(self) -> bool:
        return not self._drain.begun and await _all_run()


def api(server: Server) -> ASGIApp:
    """Everything behind its guard."""
    app = FastAPI(
        title="ray-ldm",
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        # Its own spans begin a trace anew; see `pipelines.serve.tracing`.
        telemetry={"tracing": False},
    )
    api_errors.install(app)
    for routes in (image_routes(server), job_routes(server), model_routes(server)):
        app.include_router(routes)
    app.mount("/page", StaticFiles(directory=PAGE))
    # Ray Serve's proxy puts the id into every answer.
    guarded: ASGIApp = Guard(app, server.config.access, server.keys, echoes_id=False, drain=server.drain)
    origins = server.config.access.allowed_origins
    if origins:
        return CORSMiddleware(
            guarded,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization"],
            expose_headers=["x-request-id", "Retry-After"],
        )
    return guarded


async def _all_run() -> bool:
    """Whether every application's deployments have the replicas that they are to have at least."""
    status = await asyncio.to_thread(serve.status)
    return all(application.status == "RUNNING" for application in status.applications.values())


def _log_as_ray_does() -> None:
    """Our lines into the replica's own log."""
    ours = logging.getLogger("ldm.serve")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.handlers = logging.getLogger("ray.serve").handlers
