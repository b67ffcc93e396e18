"""Resources of ENCODE's stages, as a job's config states them. Imports neither torch nor ray."""

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, model_validator

__all__ = ["ActorPool", "TaskPool"]


class _Pool(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs of each worker")


class TaskPool(_Pool):
    """A stage of Ray tasks."""

    max_size: PositiveInt | None = Field(None, description="most tasks at once; without it as many as fit")


class ActorPool(_Pool):
    """A stage of Ray actors; the pool grows from min_size to max_size while its queue is long."""

    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs of each worker; fractions share one")
    min_size: PositiveInt = Field(1, description="actors that start with the job")
    max_size: PositiveInt = Field(1, description="most actors")

    @model_validator(mode="after")
    def _sizes_in_order(self) -> "ActorPool":
        if self.max_size < self.min_size:
            raise ValueError(f"max_size {self.max_size} is below min_size {self.min_size}")
        return self
