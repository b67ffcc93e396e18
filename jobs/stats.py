"""``ldm stats``: what a latent dataset holds, and the scale and shift of its latents."""

from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig

if TYPE_CHECKING:
    from pipelines.dataset import LatentDataset

__all__ = ["StatsJob"]


class StatsJob(JobConfig):
    """Print the statistics of a latent dataset, from its commits."""

    dataset: CliPositionalArg[str] = Field(description="folder or URL of a latent dataset")

    def run(self) -> dict[str, object]:
        """rows, units, bytes, per-channel mean and std, scaling factor, quarantined by reason."""
        from pipelines.dataset import LatentDataset

        result = _summary(LatentDataset.open(self.dataset))
        _print(self.dataset, result)
        return result


def _summary(dataset: "LatentDataset") -> dict[str, object]:
    derived = dataset.derived()
    totals, stats = derived.totals, derived.stats
    return {
        **totals._asdict(),
        "bytes_per_image": totals.bytes / max(totals.rows, 1),
        "vae": dataset.header.vae,
        "vae_fingerprint": dataset.header.vae_fingerprint,
        "classes": list(dataset.header.class_names or ()),
        "mean": None if stats is None else list(stats.mean_C),
        "std": None if stats is None else list(stats.std_C),
        "scaling_factor": None if stats is None else stats.scaling_factor,
    }


def _print(title: str, result: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "value", title=title, title_justify="left")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), _text(value))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{_text(count)} {name}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    return "none" if value is None else str(value)
