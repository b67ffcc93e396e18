"""Nodes of a cluster on one machine, as ``ldm cluster up`` and tests state them. Imports no Ray."""

import json

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from jobs.config import Section

__all__ = ["POOL_NAME", "LocalPool", "pool_resource"]

# What a node has of the resource that bears its pool's name: more than workers fit on it.
UNITS_OF_POOL = 1000
POOL_NAME = r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"


class LocalPool(Section):
    """Nodes of one kind. CPUs and GPUs are what Ray counts there, however many the machine has."""

    nodes: PositiveInt = Field(1, description="raylets that are started")
    num_cpus: NonNegativeInt = Field(1, description="CPUs of each, in Ray's count")
    num_gpus: NonNegativeInt = Field(0, description="GPUs of each, in Ray's count")
    resources: dict[str, PositiveFloat] = Field(
        {}, description="custom resources of each, as `accelerator_type:L4: 1`"
    )
    object_store_memory_bytes: int = Field(
        200_000_000, ge=80_000_000, description="most shared memory of each one's object store"
    )

    def start_options(self, name: str) -> list[str]:
        """Of ``ray start``, for a node of the pool of this name."""
        resources = {**self.resources, pool_resource(name): UNITS_OF_POOL}
        return [
            "--num-cpus", str(self.num_cpus), "--num-gpus", str(self.num_gpus),
            "--object-store-memory", str(self.object_store_memory_bytes),
            "--resources", json.dumps(resources),
        ]  # fmt: skip


def pool_resource(pool: str) -> str:
    """The resource by which work names a pool: ``{"pool:encode-gpu": 1}``."""
    return f"pool:{pool}"
