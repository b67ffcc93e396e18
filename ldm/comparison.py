"""Two sets of images compared by their features: FID, KID, precision, recall, each with its interval."""

from dataclasses import dataclass
from typing import NamedTuple

from ldm.bootstrap import BootstrapConfig, Figure, frechet_interval, kernel_interval, mean_interval
from ldm.distribution import frechet_distance, kernel_distance, precision_recall, squared_distances
from ldm.feature_stats import FeatureSample, FeatureSummary

__all__ = ["NEIGHBOURS", "Comparison", "Neighbour", "compare", "nearest_real"]

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3


@dataclass(frozen=True)
class Comparison:
    """fid of all images; kid, precision and recall, None for too few images, of the kept ones."""

    fid: Figure
    kid: Figure | None
    precision: Figure | None
    recall: Figure | None

    def figures(self) -> dict[str, Figure | None]:
        """Name → figure."""
        return {"fid": self.fid, "kid": self.kid, "precision": self.precision, "recall": self.recall}


class Neighbour(NamedTuple):
    """A generated image, the real one nearest to it, and their Euclidean distance in feature space."""

    generated: str
    real: str
    distance: float


def compare(
    real: FeatureSummary, generated: FeatureSummary, config: BootstrapConfig, *, paired: bool = False
) -> Comparison:
    """All figures. paired: every generated image is made from the real one with the same id.

    The intervals of precision and recall are those of a mean, the two manifolds as they are.
    """
    a, b = real.sample.features_ND, generated.sample.features_ND
    fid = frechet_distance(real.stats, generated.stats)
    fid_figure = Figure(fid, frechet_interval(fid, a, b, config, paired=paired))
    if min(len(a), len(b)) < 2:
        return Comparison(fid_figure, None, None, None)
    kid = Figure(kernel_distance(a, b, paired=paired), kernel_interval(a, b, config, paired=paired))
    if min(len(a), len(b)) <= NEIGHBOURS:
        return Comparison(fid_figure, kid, None, None)
    precision, recall = (
        Figure(float(within.mean()), mean_interval(within, config))
        for within in precision_recall(a, b, NEIGHBOURS)
    )
    return Comparison(fid_figure, kid, precision, recall)


def nearest_real(real: FeatureSample, generated: FeatureSample) -> list[Neighbour]:
    """Of every kept generated image its nearest kept real one; those furthest from any come first."""
    squares_NM = squared_distances(real.features_ND, generated.features_ND)
    found = [
        Neighbour(name, real.ids[row], float(squares_NM[row, column]) ** 0.5)
        for column, (name, row) in enumerate(zip(generated.ids, squares_NM.argmin(0), strict=True))
    ]
    return sorted(found, key=lambda neighbour: (-neighbour.distance, neighbour.generated))
