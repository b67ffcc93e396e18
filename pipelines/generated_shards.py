"""A generated dataset: images of a checkpoint in WebDataset tars, with what each was asked for beside it.

    shard-000000.tar    a unit, published in one step: that it is there says that it is done
    run.json            what the images depend on, written first: a run goes on with nothing else
    classes.json        the names of the labels, where the checkpoint has classes

    units ──► sampler actors: latents of a unit ──► decoder actors, which publish its tar ──► driver

Image n has the seed ``seed + n`` and the n-th label, which take turns. A unit goes through the U-Net and the
VAE in batches of its own, so that its bytes are the same whatever was done before and on how many actors.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from ldm import storage
from ldm.checkpoint import CheckpointInfo
from ldm.errors import UserError
from ldm.images import encode_png
from pipelines.class_names import CLASSES_FILE, class_names_bytes
from pipelines.generate import Decoder, GeneratePools, Pool, Request, Sampler
from pipelines.publish import publish
from pipelines.shards import Sample, tar_bytes
from pipelines.vae_source import on_every_node

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["GeneratedShards", "ImagePlan", "write_units"]

RECORD_FILE = "run.json"
SHARD_NAME = re.compile(r"shard-(\d{6,})\.tar")


@dataclass(frozen=True)
class ImagePlan:
    """Which images: ``num_images`` requests, and the cut into units of ``unit_size``."""

    num_images: int
    unit_size: int
    labels: tuple[int | None, ...]
    seed: int
    guidance: float
    num_inference_steps: int
    scheduler: str

    @property
    def num_units(self) -> int:
        return -(-self.num_images // self.unit_size)

    def request(self, index: int) -> Request:
        """Of the image with that number."""
        label = self.labels[index % len(self.labels)]
        return Request(label, self.seed + index, self.guidance, self.num_inference_steps, self.scheduler)

    def unit(self, index: int) -> range:
        """The numbers of its images."""
        first = index * self.unit_size
        return range(first, min(first + self.unit_size, self.num_images))


@dataclass(frozen=True)
class GeneratedShards:
    """The output folder or URL."""

    filesystem: AbstractFileSystem
    root: str

    @classmethod
    def at(cls, url: str) -> "GeneratedShards":
        return cls(*storage.filesystem(url))

    def check(self, record: Mapping[str, object]) -> None:
        """UserError where it was begun with another record, or something else is there. Writes nothing."""
        self.filesystem.invalidate_cache()
        stored, content = self._stored(), _as_json(record)
        if stored is None and self._is_used():
            raise UserError(f"{self.root} is there already", do="give a folder that is new or empty")
        if stored is not None and stored != content:
            names = sorted(n for n in stored.keys() | content.keys() if stored.get(n) != content.get(n))
            shown = "; ".join(f"{name}: {content.get(name)}, was {stored.get(name)}" for name in names)
            raise UserError(
                f"{self.root} holds a run of another kind ({shown})",
                do="give the settings of that run, or another folder",
            )

    def begin(self, record: Mapping[str, object], class_names: Sequence[str] | None) -> None:
        """Write what says what the dataset is of; the same once more where it is there."""
        self.check(record)  # only now does nobody else write
        self.publish(RECORD_FILE, json.dumps(_as_json(record), indent=1, sort_keys=True).encode() + b"\n")
        if class_names:
            self.publish(CLASSES_FILE, class_names_bytes(list(class_names)))

    def publish(self, name: str, data: bytes) -> None:
        publish(self.filesystem, f"{self.root}/{name}", data)

    def done(self) -> set[int]:
        """Units whose tar is there."""
        matches = (SHARD_NAME.fullmatch(name) for name in self._names())
        return {int(match[1]) for match in matches if match}

    def _names(self) -> list[str]:
        if not self.filesystem.isdir(self.root):
            return []
        return [path.rsplit("/", 1)[-1] for path in self.filesystem.ls(self.root, detail=False)]

    def _is_used(self) -> bool:
        # The lock of a writer that was ended before it wrote anything else.
        return any(name != "writers" for name in self._names()) or self.filesystem.isfile(self.root)

    def _stored(self) -> dict[str, object] | None:
        path = f"{self.root}/{RECORD_FILE}"
        try:
            return dict(json.loads(self.filesystem.cat_file(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}", do="give another folder") from error


def write_units(
    folder: Path,
    info: CheckpointInfo,
    vae: str,
    plan: ImagePlan,
    shards: GeneratedShards,
    units: Sequence[int],
    pools: GeneratePools,
) -> Iterator[int]:
    """Make the images of ``units``; yields the number of images of each once its tar is there.

    folder: the checkpoint, info: of it; vae: as `ldm.autoencoder.load` takes it. Needs a connected Ray.
    """
    import ray

    dataset = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    # Of actors without a unit Ray Data would warn.
    sampler, decoder = (
        pool.model_copy(update={"size": min(pool.size, len(units))})
        for pool in (pools.sampler, pools.decoder)
    )
    sampled = _through(dataset, UnitSampler, (folder.absolute(), plan, sampler), sampler)
    written = _through(sampled, UnitWriter, (on_every_node(vae), info, plan, decoder, shards), decoder)
    for table in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        assert isinstance(table, pa.Table)
        yield from table["images"].to_pylist()


def _through(dataset: "Dataset", stage: type[Any], arguments: tuple[object, ...], pool: Pool) -> "Dataset":
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        stage,
        fn_constructor_args=arguments,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        compute=ActorPoolStrategy(size=pool.size),
    )


class UnitSampler:
    """Actor: adds ``latents`` to a unit's number: float32 (N, C, h, w) in the VAE's own scale, as bytes."""

    def __init__(self, folder: Path, plan: ImagePlan, pool: Pool) -> None:
        self.sampler = Sampler(folder, pool.fixed_threads)
        self.plan, self.batch_size = plan, pool.batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of ``unit`` → the same with ``latents``."""
        numbers = self.plan.unit(table["unit"][0].as_py())
        made = [self.sampler(self._batch(part))["latent"] for part in _parts(numbers, self.batch_size)]
        return table.append_column("latents", pa.array([np.concatenate(made).tobytes()], pa.large_binary()))

    def _batch(self, numbers: range) -> dict[str, NDArray[Any]]:
        rows = [asdict(self.plan.request(number)) for number in numbers]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["label"] = [-1 if label is None else label for label in columns["label"]]
        return {name: np.array(values) for name, values in columns.items()}


class UnitWriter:
    """Actor: latents of a unit → images, and their tar, published."""

    def __init__(
        self, vae: str, info: CheckpointInfo, plan: ImagePlan, pool: Pool, shards: GeneratedShards
    ) -> None:
        self.decoder = Decoder(vae, info.vae_fingerprint, pool.fixed_threads)
        self.info, self.plan, self.batch_size, self.shards = info, plan, pool.batch_size, shards

    def __call__(self, table: pa.Table) -> pa.Table:
        """One row of ``unit`` and ``latents`` → how many ``images`` were written."""
        unit = table["unit"][0].as_py()
        flat = np.frombuffer(table["latents"][0].as_buffer(), np.float32)
        latents_NChw = flat.reshape(-1, *self.info.latent_shape)
        samples = self._samples(self.plan.unit(unit), latents_NChw)
        self.shards.publish(f"shard-{unit:06d}.tar", tar_bytes(samples))
        return pa.table({"images": [len(latents_NChw)]})

    def _samples(self, numbers: range, latents_NChw: NDArray[np.float32]) -> Iterator[Sample]:
        for part in _parts(range(len(numbers)), self.batch_size):
            images = self.decoder({"latent": latents_NChw[part.start : part.stop]})["image"]
            for index, image_HW3 in zip(part, images, strict=True):
                yield self._sample(numbers[index], image_HW3)

    def _sample(self, number: int, image_HW3: NDArray[np.uint8]) -> Sample:
        request, names = self.plan.request(number), self.info.class_names
        asked = {name: value for name, value in asdict(request).items() if value is not None}
        if names and request.label is not None:
            asked["class"] = names[request.label]
        fields = {"json": json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()}
        return Sample(f"{number:09d}", encode_png(image_HW3), fields)


def _as_json(record: Mapping[str, object]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(record)))


def _parts(numbers: range, size: int) -> Iterator[range]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]
