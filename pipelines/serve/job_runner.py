"""Long jobs, run: takes up whatever the store has unfinished, also after it was killed itself."""

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress

from ldm.errors import LdmError
from ldm.images import encode_png
from ldm.model_card import ModelCard
from pipelines.serve.config import ServeConfig
from pipelines.serve.generation_request import GenerationRequest
from pipelines.serve.image_maker import ImageMaker, Previewed, ResultCache, decode_request
from pipelines.serve.image_plan import ImagePlan, Refusal, plan_images
from pipelines.serve.job_store import JobFinished, JobNotFound, JobRecord, JobStore
from pipelines.serve.messages import Rejected
from pipelines.serve.stages import StageFailed, Stages
from pipelines.serve.tracing import job_span

__all__ = ["JobRunner"]

LOG = logging.getLogger("ldm.serve")
# Between two looks into the store; one that is new is told of at once.
POLL_S = 2.0
EXPIRE_S = 60.0
PREVIEW_EVERY = 2
RETRY_S = 2.0
MAX_ATTEMPTS = 5


class JobRunner:
    """Replica, of which there is one. stages: as `Stages` takes them; factors: of the upsamplers."""

    def __init__(
        self, cards: Mapping[str, ModelCard], factors: tuple[int, ...], config: ServeConfig, **stages: object
    ) -> None:
        self.cards, self.factors, self.config = cards, factors, config
        self.maker = ImageMaker(cards, Stages(**stages), ResultCache(0))  # type: ignore[arg-type]
        self.store = JobStore(config.jobs.url)
        self.running: dict[str, asyncio.Task[None]] = {}
        self.wake = asyncio.Event()
        self.main = asyncio.create_task(self._run())

    async def poke(self) -> None:
        """There is something new in the store."""
        self.wake.set()

    async def check_health(self) -> None:
        """Ray Serve starts another replica where this raises: one that looks at the store anew."""
        if self.main.done():
            await self.main

    async def _run(self) -> None:
        expired_at = 0.0
        while True:
            for record in await asyncio.to_thread(self.store.unfinished):
                await self._look_at(record)
            if time.time() - expired_at > EXPIRE_S:
                expired_at = time.time()
                await asyncio.to_thread(self.store.expire, expired_at)
            try:
                await asyncio.wait_for(self.wake.wait(), POLL_S)
            except TimeoutError:
                continue
            self.wake.clear()

    async def _look_at(self, record: JobRecord) -> None:
        if await asyncio.to_thread(self.store.is_cancelled, record.id):
            await self._cancel(record)
        elif record.id not in self.running and len(self.running) < self.config.jobs.at_once:
            task = asyncio.create_task(self._make(record))
            self.running[record.id] = task
            task.add_done_callback(lambda _: self._ended(record.id))

    def _ended(self, job_id: str) -> None:
        del self.running[job_id]
        self.wake.set()

    async def _cancel(self, record: JobRecord) -> None:
        if record.id in self.running:
            self.running[record.id].cancel()
        with suppress(JobFinished, JobNotFound):
            await self._put(record, status="cancelled", stage=None)

    async def _make(self, record: JobRecord) -> None:
        try:
            record = await self._put(record, status="running", attempts=record.attempts + 1)
            if record.attempts > MAX_ATTEMPTS:
                await self._put(record, status="failed", error=f"tried {MAX_ATTEMPTS} times")
                return
            with job_span(record.id):
                await self._image(record, self._plan(record))
        except (StageFailed, Refusal, LdmError) as error:
            if not isinstance(error, JobFinished | JobNotFound):
                await self._put(record, status="failed", error=str(error))
        except Exception:
            LOG.exception("job %s failed", record.id)
            await self._put(record, status="failed", error="failed; the server's log says why")
            raise

    def _plan(self, record: JobRecord) -> ImagePlan:
        request = GenerationRequest.model_validate(record.request, context={"limits": self.config.limits})
        plan, *_ = plan_images(
            request.model_copy(update={"seed": record.seed}), self.cards, self.config, self.factors
        )
        return plan

    async def _image(self, record: JobRecord, plan: ImagePlan) -> None:
        latent_Chw = None
        while latent_Chw is None:
            async for event in self.maker.latent(plan, PREVIEW_EVERY):
                if isinstance(event, Previewed):
                    record = await self._tell(record, plan, event)
                elif isinstance(event, Rejected):
                    # Nobody waits for it: it may come later.
                    await asyncio.sleep(max(RETRY_S, min(60.0, event.retry_after_s)))
                elif not isinstance(event, tuple):
                    latent_Chw = event
        record = await self._put(record, stage="decoding", progress=_share(plan, "decoding", 0.0))
        height, width = await self.maker.stages.decode_for_job(decode_request(plan), latent_Chw, record.id)
        content_type, size = f"image/{plan.format}", f"{width}x{height}"
        await self._put(
            record, status="completed", stage=None, progress=1.0, size=size, content_type=content_type
        )

    async def _tell(self, record: JobRecord, plan: ImagePlan, event: Previewed) -> JobRecord:
        progress = event.progress
        if progress.preview is not None:
            png = encode_png(progress.preview)
            await asyncio.to_thread(self.store.put_preview, record.id, png)
        share = _share(plan, event.stage, progress.step / progress.num_steps)
        return await self._put(record, stage=event.stage, progress=share, has_preview=True)

    async def _put(self, record: JobRecord, **changes: object) -> JobRecord:
        return await asyncio.to_thread(self.store.update, record.revised(**changes))


def _share(plan: ImagePlan, stage: str, done: float) -> float:
    """Of the whole job: stages take so much longer one after the other that each counts as one."""
    stages = ["sampling", *(f"upsampling {number}" for number in range(1, plan.stages + 1)), "decoding"]
    return (stages.index(stage) + done) / len(stages)
