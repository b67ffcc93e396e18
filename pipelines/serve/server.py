"""What the routes of the API have in common: a server's config, and what it makes images with."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from ldm.model_card import ModelCard
from pipelines.serve.config import ServeConfig
from pipelines.serve.drain import Drain
from pipelines.serve.image_maker import ImageMaker
from pipelines.serve.job_store import JobStore
from pipelines.serve.keys import KeyRing

__all__ = ["Server"]


@dataclass(frozen=True)
class Server:
    """One ingress.

    factors: of the upsamplers. poke: tells the runner that there is a new job. ready: whether every stage
    that is to run all the time does. metrics: all stages', as text for Prometheus.
    """

    config: ServeConfig
    keys: KeyRing
    cards: Mapping[str, ModelCard]
    factors: tuple[int, ...]
    maker: ImageMaker
    jobs: JobStore
    poke: Callable[[], Awaitable[None]]
    ready: Callable[[], Awaitable[bool]]
    metrics: Callable[[], Awaitable[str]]
    drain: Drain = field(default_factory=Drain)

    def upscaled_sides_px(self, card: ModelCard) -> list[int]:
        """Longer sides that the cascade makes of an image of the model's own size."""
        sides, side = [], max(card.size_px)
        for factor in self.factors:
            side *= factor
            sides.append(side)
        return sides
