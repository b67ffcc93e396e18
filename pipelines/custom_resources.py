"""Resources of Ray that nodes were started with, by which work names its nodes: as configs state them.

Ray has labels for the same, and they are no use here: Ray Train of 2.60 counts how many workers a cluster has
room for by resources alone, so it would count nodes on which their labels forbid them to start. Imports
neither torch nor ray.
"""

from typing import Annotated, TypeAlias

from pydantic import Field, PositiveFloat

__all__ = ["CustomResources"]

# A plain default beside it: every use is `resources: CustomResources = {}`.
CustomResources: TypeAlias = Annotated[
    dict[str, PositiveFloat],
    Field(description="custom resources of Ray that each takes of its node, as `pool:encode-gpu: 1`"),
]
