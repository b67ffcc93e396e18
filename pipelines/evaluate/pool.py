"""The actors of an evaluation."""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

__all__ = ["EvaluatePool"]


class EvaluatePool(BaseModel):
    """Actors that encode, decode and extract features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: PositiveInt = 1
    batch_size: PositiveInt = Field(16, description="images per call of an extractor; of recon always 1")
    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0

    def strategy(self, num_inputs: int = 1) -> "ActorPoolStrategy":
        """All of them from the start; of those without one of ``num_inputs`` blocks, Ray Data would warn."""
        from ray.data import ActorPoolStrategy

        return ActorPoolStrategy(
            min_size=max(min(self.size, num_inputs), 1), max_size=self.size, initial_size=self.size
        )
