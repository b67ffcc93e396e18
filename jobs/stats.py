"""``ldm stats``: what a latent dataset holds, and the scale and shift of its latents."""

from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.dataset import LatentDataset
    from pipelines.encode.form_costs import FormCost

__all__ = ["StatsJob"]


class StatsJob(JobConfig):
    """Print the statistics of a latent dataset, from its commits."""

    dataset: CliPositionalArg[str] = Field(description="folder or URL of a latent dataset")
    form_images: NonNegativeInt = Field(4, description="to decode for the cost of each form; 0: do not")

    def run(self) -> dict[str, object]:
        """rows, units, bytes, per-channel mean and std, scaling factor, quarantined by reason, forms.

        forms: what the first images would cost in each form of storage; without those where the dataset
        holds no fp16 moments, or its VAE is not here.
        """
        from pipelines.dataset import LatentDataset

        dataset = LatentDataset.open(self.dataset)
        result = _summary(dataset)
        _print(self.dataset, result)
        costs = self._form_costs(dataset)
        if costs:
            _print_forms(costs)
        return {**result, "forms": [cost._asdict() for cost in costs]}

    def _form_costs(self, dataset: "LatentDataset") -> "Sequence[FormCost]":
        from ldm.errors import UserError
        from pipelines.storage_form import StorageForm

        paths = dataset.derived().manifest["path"].to_pylist()
        has_moments = dataset.header.form.model_copy(update={"mirrored": False}) == StorageForm()
        if not (self.form_images and paths and has_moments):
            return ()
        from ldm.autoencoder import load
        from pipelines.encode.form_costs import form_costs
        from pipelines.latent_table import read_latents

        try:
            autoencoder = load(dataset.header.vae)
        except UserError as error:
            print(f"the forms of storage were not measured: {error}")
            return ()
        with dataset.filesystem.open(dataset.path(paths[0])) as file:
            rows = read_latents(file, [0])
        return list(form_costs(rows, autoencoder.to("cpu"), self.form_images))


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


def _print_forms(costs: "Sequence[FormCost]") -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("stored", "dtype", "bytes per image", "PSNR against the decoded mean")
    table = Table(*columns, title="forms of storage", title_justify="left")
    for cost in costs:
        loss = "the same" if cost.psnr_db is None else f"{cost.psnr_db:.1f} dB"
        table.add_row(cost.stored, cost.dtype, f"{cost.bytes_per_image:.0f}", loss)
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{_text(count)} {name}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    return "none" if value is None else str(value)
