"""From a plan to an image's file, through the stages: what the API and the long jobs have in common."""

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ldm.model_card import ModelCard
from pipelines.serve.image_plan import ImagePlan, Refusal
from pipelines.serve.messages import (
    Accepted,
    Condition,
    DecodeRequest,
    Edit,
    Paste,
    Progress,
    Rejected,
    Sampled,
    SampleRequest,
    UpsampleRequest,
)
from pipelines.serve.stages import Stages
from pipelines.serve.step_costs import LatentShape

__all__ = ["EditInput", "ImageMaker", "Made", "MakerEvent", "Previewed", "ResultCache"]

Latent = NDArray[np.float32]


class Made(NamedTuple):
    """The image's file."""

    file: bytes


class Previewed(NamedTuple):
    """How far ``stage`` is."""

    stage: str
    progress: Progress


MakerEvent: TypeAlias = Accepted | Rejected | Previewed | Made


@dataclass(frozen=True)
class EditInput:
    """What is edited: image (H, W, 3); mask (H, W), True where it is made anew, or None for all of it.

    padded_HW3, padded_mask_HW: the same with sides that the model takes.
    """

    image_HW3: NDArray[np.uint8]
    mask_HW: NDArray[np.bool_] | None
    padded_HW3: NDArray[np.uint8]
    latent_mask_hw: NDArray[np.bool_] | None
    strength: float


class ResultCache:
    """Files by `ImagePlan.key`, those used last, of no more than ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._files: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        if key in self._files:
            self._files.move_to_end(key)
        return self._files.get(key)

    def put(self, key: str, file: bytes) -> None:
        if len(file) > self._max_bytes or key in self._files:
            return
        self._files[key] = file
        self._bytes += len(file)
        while self._bytes > self._max_bytes:
            _, oldest = self._files.popitem(last=False)
            self._bytes -= len(oldest)


class ImageMaker:
    """Makes what plans say, each image anew unless it is in the cache."""

    def __init__(self, cards: Mapping[str, ModelCard], stages: Stages, cache: ResultCache) -> None:
        self.cards, self.stages, self.cache = cards, stages, cache

    async def make(
        self, plan: ImagePlan, preview_every: int = 0, edit: EditInput | None = None
    ) -> AsyncIterator[MakerEvent]:
        """Accepted or rejected first; previews where they were asked for; the file last.

        Raises `Refusal` for a prompt that cannot be encoded, `StageFailed`.
        """
        key = plan.key(self.cards[plan.model].fingerprint)
        cached = None if edit else self.cache.get(key)
        if cached is not None:
            yield Accepted()
            yield Made(cached)
            return
        latent_Chw: Latent | None = None
        async for event in self.latent(plan, preview_every, edit):
            if isinstance(event, np.ndarray):
                latent_Chw = event
            else:
                yield event
        if latent_Chw is None:
            return  # rejected
        file = await self.stages.decode(decode_request(plan), latent_Chw, _paste(edit))
        if edit is None:
            self.cache.put(key, file)
        yield Made(file)

    async def latent(
        self, plan: ImagePlan, preview_every: int = 0, edit: EditInput | None = None
    ) -> AsyncIterator[Accepted | Rejected | Previewed | Latent]:
        """As `make`, but with the last stage's latent in place of the file."""
        shape = self._shape(plan, edit)
        refusal = self.stages.refusal(plan.model, shape)
        if refusal is not None:
            yield refusal  # before the text encoder works for it
            return
        request = await self._sample_request(plan, shape, preview_every, edit)
        latent_Chw: Latent | None = None
        async for event in self.stages.sample(request):
            if isinstance(event, Sampled):
                latent_Chw = event.latent_Chw
            else:
                yield Previewed("sampling", event) if isinstance(event, Progress) else event
        if latent_Chw is None:
            return
        for stage in range(1, plan.stages + 1):
            upsampling = UpsampleRequest(
                stage=stage, seed=plan.seed, noise_level=plan.noise_level, preview_every=preview_every
            )
            async for upsampled in self.stages.upsample(upsampling, latent_Chw):
                if isinstance(upsampled, Progress):
                    yield Previewed(f"upsampling {stage}", upsampled)
                else:
                    latent_Chw = upsampled
        yield latent_Chw

    def _shape(self, plan: ImagePlan, edit: EditInput | None) -> LatentShape:
        return self.cards[plan.model].shape_of(plan.size_px if edit is None else edit.padded_HW3.shape[:2])

    async def _sample_request(
        self, plan: ImagePlan, shape: LatentShape, preview_every: int, edit: EditInput | None
    ) -> SampleRequest:
        condition, null = await self._conditions(plan, self.cards[plan.model])
        return SampleRequest(
            model=plan.model,
            shape=shape,
            scheduler=plan.scheduler,
            num_steps=plan.num_steps,
            guidance=plan.guidance,
            seed=plan.seed,
            condition=condition,
            null=null,
            deadline=None if plan.deadline_s is None else time.time() + plan.deadline_s,
            preview_every=preview_every,
            refresh_every=plan.refresh_every,
            edit=None if edit is None else await self._edit(plan.model, edit),
        )

    async def _edit(self, model: str, edit: EditInput) -> Edit:
        latent_Chw = await self.stages.encode(model, edit.padded_HW3)
        return Edit(latent_Chw, edit.strength, edit.latent_mask_hw)

    async def _conditions(self, plan: ImagePlan, card: ModelCard) -> tuple[Condition, Condition | None]:
        """The condition, and the null that it is guided away from."""
        if card.condition == "none":
            return Condition(), None
        if card.condition == "classes":
            none = len(card.class_names or ())
            label = none if plan.class_label is None else plan.class_label
            return Condition(label=label), Condition(label=none)
        found = await self.stages.conditions(plan.model, [plan.prompt, plan.negative_prompt])
        if isinstance(found, str):
            raise Refusal(found, "prompt")
        condition, null = found
        return condition, null


def decode_request(plan: ImagePlan) -> DecodeRequest:
    return DecodeRequest(model=plan.model, format=plan.format, quality=plan.quality)


def _paste(edit: EditInput | None) -> Paste | None:
    if edit is None:
        return None
    everywhere = np.ones(edit.image_HW3.shape[:2], np.bool_)
    return Paste(edit.image_HW3, everywhere if edit.mask_HW is None else edit.mask_HW)
