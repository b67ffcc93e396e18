"""The records of a latent dataset: what is in ``dataset.json`` and in a commit."""

import json
from typing import Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from ldm.preprocess import Preprocess
from pipelines.shards import InputConfig
from pipelines.storage_form import StorageForm
from pipelines.text_config import TextConfig

__all__ = ["FORMAT_VERSION", "Commit", "DataFile", "DatasetHeader", "StoredStats", "TextRecord", "Totals"]

FORMAT_VERSION: Final = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def json_bytes(self) -> bytes:
        """UTF-8 JSON that depends on the values alone."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, indent=1)
        return f"{text}\n".encode()


class TextRecord(_Record):
    """Where embeddings come from. Of an encoder, ``fingerprint`` is what counts; ``width`` its features."""

    config: TextConfig
    fingerprint: str | None = None
    width: int | None = None


class DatasetHeader(_Record):
    """``dataset.json``: everything that the stored bytes depend on, apart from the images.

    ``vae`` says where the VAE was loaded from. It is for people: the fingerprint is what counts.
    """

    format_version: Literal[1] = FORMAT_VERSION
    vae: str
    vae_fingerprint: str
    f: int
    channels: int
    form: StorageForm = StorageForm()
    preprocess: Preprocess
    input: InputConfig = InputConfig()
    pass_through: tuple[str, ...] = ()
    text: TextRecord | None = None
    unit_size: int
    class_names: tuple[str, ...] | None = None

    def _content(self) -> dict[str, object]:
        """What counts: not where a model was loaded from."""
        return self.model_dump(exclude={"vae": True, "text": {"config": {"encoder"}}})

    def differences(self, other: "DatasetHeader") -> list[str]:
        """``name: mine, not theirs`` for every field in which the two differ, nested ones too."""
        mine, theirs = _flat(self._content()), _flat(other._content())
        names = sorted(mine.keys() | theirs.keys())
        return [f"{n}: {mine.get(n)}, not {theirs.get(n)}" for n in names if mine.get(n) != theirs.get(n)]


class StoredStats(_Record):
    """`ldm.latents.LatentStats` as JSON: per-channel mean and sum of squared deviations."""

    count: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]


class DataFile(_Record):
    """A file of one unit: path inside the dataset, size, digest, rows."""

    path: str
    bytes: int
    sha256: str
    rows: int


class Commit(_Record):
    """``commits/<unit>.json``: what one unit gave. rows + quarantined = inputs.

    stats is None where the unit has no row; quarantined counts inputs by reason.
    """

    unit: str
    shard: str
    shard_version: str
    index: int
    is_final: bool
    num_inputs: int
    num_rows: int
    num_quarantined: int
    quarantined: dict[str, int]
    files: tuple[DataFile, ...]
    text_file: DataFile | None = None
    quarantine_file: DataFile | None
    stats: StoredStats | None

    def all_files(self) -> tuple[DataFile, ...]:
        """Every file that exists because of this unit."""
        return (*self.files, *(file for file in (self.text_file, self.quarantine_file) if file is not None))


class Totals(NamedTuple):
    """Sums over commits; ``bytes`` counts data files only."""

    units: int
    inputs: int
    rows: int
    bytes: int
    quarantined: dict[str, int]


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
