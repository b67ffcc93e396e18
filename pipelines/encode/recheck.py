"""Encoding a random share of a dataset's units once more, and comparing with what is stored."""

import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.autoencoder import Autoencoder
from ldm.seeds import keyed_seed
from pipelines.dataset import LatentDataset
from pipelines.dataset_records import Commit
from pipelines.device import pick_device
from pipelines.encode.attempts import Attempt, Mark
from pipelines.encode.decode import Judge, decode_unit
from pipelines.encode.encoder import encode_unit
from pipelines.encode.micro_batches import ImageEncoder
from pipelines.encode.pools import EncoderPool
from pipelines.encode.rows import EncodedUnit
from pipelines.encode.units import slice_units
from pipelines.encode.write import bucket_views
from pipelines.latent_table import read_latents
from pipelines.shards import Shard, read_samples
from pipelines.unit_ids import parse_unit_id

__all__ = ["chosen_units", "recheck"]

# Another machine, precision or batch size moves the last bits of fp32 arithmetic; stored fp16 has 11 bits.
# Relative to a channel's largest value, because what is near zero is the difference of larger numbers.
TOLERANCE = {"float16": 2.0**-9, "int8": 1.5 / 127}


def chosen_units(units: Sequence[str], share: float, seed: int) -> list[str]:
    """A share of the units, at least one, by a hash of the seed and each unit's name."""
    order = sorted(units, key=lambda unit: keyed_seed("recheck", seed, unit))
    return sorted(order[: max(1, round(share * len(order)))])


def recheck(
    dataset: LatentDataset, units: Sequence[str], shards: Sequence[Shard], vae: Autoencoder
) -> Iterator[str]:
    """Encode these units again from the input; yields a line for everything that is not as stored.

    shards: those of the input; a unit of a shard that is not among them, or was edited, cannot be checked
    and is told.
    """
    versions = {shard.name: shard for shard in shards}
    encoder = ImageEncoder(vae, EncoderPool(), pick_device())
    for commit in dataset.commits(units):
        shard = versions.get(parse_unit_id(commit.unit)[0])
        if shard is None or shard.version != commit.shard_version:
            yield f"{commit.unit}: its shard is not in the input, or was edited"
            continue
        again = _encode_again(dataset, commit, shard, encoder)
        yield from _differences(dataset, commit, again)


def _encode_again(
    dataset: LatentDataset, commit: Commit, shard: Shard, encoder: ImageEncoder
) -> EncodedUnit | None:
    header = dataset.header
    others = range(commit.index)
    samples = read_samples(shard, header.input)
    for unit in slice_units(shard, samples, header.unit_size, frozenset(others)):
        precomputed = header.text.config.precomputed if header.text else None
        judge = Judge(header.preprocess, header.class_names, header.pass_through, precomputed)
        with tempfile.TemporaryDirectory() as folder:
            attempt = Attempt({}, Mark(Path(folder) / "mark"))
            return encode_unit(encoder, decode_unit(unit, judge, attempt), header.form, attempt)
    return None


def _differences(dataset: LatentDataset, commit: Commit, again: EncodedUnit | None) -> Iterator[str]:
    if again is None:
        yield f"{commit.unit}: the input has no such unit"
        return
    stored = {file.path.split("/")[1]: file for file in commit.files}
    found = dict(bucket_views(dataset, again))
    if stored.keys() != found.keys():
        yield f"{commit.unit}: buckets {sorted(found)}, {sorted(stored)} are stored"
        return
    resolutions = len(dataset.header.preprocess.sizes_px)
    for bucket, views in found.items():
        data = dataset.filesystem.cat_file(dataset.path(stored[bucket].path))
        rows = read_latents(io.BytesIO(data))
        keys = [again.samples.keys[view // resolutions] for view in views]
        if list(rows.keys) != keys:
            yield f"{commit.unit}: other keys in {bucket}"
            continue
        for name, kept, new in (
            ("mean", rows.moments.mean_NChw, again.means_N),
            ("std", rows.moments.std_NChw, again.stds_N),
        ):
            error = _largest_error(kept, np.stack([new[view] for view in views]))
            if error > TOLERANCE[dataset.header.form.dtype]:
                yield f"{commit.unit}: {name} in {bucket} differs by {error:.2g} of the largest value"


def _largest_error(stored: NDArray[np.float16], again: NDArray[np.float16]) -> float:
    """Of any value, relative to the largest of its channel."""
    scale = np.abs(stored.astype(np.float32)).max((0, 2, 3), keepdims=True) + 1e-30
    return float((np.abs(again.astype(np.float32) - stored) / scale).max())
