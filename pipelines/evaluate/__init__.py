"""Evaluation on Ray Data: reconstructions beside their originals, samples beside a reference set.

Actors compute per image; what is compared over a whole set travels as states that merge, so that
the number of actors moves no figure.
"""

from pipelines.evaluate.images import ImageId, Rejected
from pipelines.evaluate.pool import EvaluatePool
from pipelines.evaluate.recon import ImageFigures, Measured, ReconModels, Reconstruction, measure, reconstruct
from pipelines.evaluate.sets import ImageSet, array_set, pictures_of, shard_set

__all__ = [
    "EvaluatePool",
    "ImageFigures",
    "ImageId",
    "ImageSet",
    "Measured",
    "ReconModels",
    "Reconstruction",
    "Rejected",
    "array_set",
    "measure",
    "pictures_of",
    "reconstruct",
    "shard_set",
]
