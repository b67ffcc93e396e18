"""The last stage: a unit's files, then its commit. Twice gives the same bytes under the same names."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import LatentDataset
from pipelines.dataset_records import Commit, DataFile
from pipelines.encode.bad_share import NUM_EXAMPLES, example
from pipelines.encode.report import UnitReport
from pipelines.encode.rows import EncodedUnit
from pipelines.latent_table import LatentRows, MomentArrays, data_bytes, quarantine_bytes
from pipelines.text_table import text_bytes

__all__ = ["bucket_views", "write_unit"]


def write_unit(dataset: LatentDataset, unit: EncodedUnit) -> UnitReport:
    """Publish a unit's data, text and quarantine files and then, last, its commit."""
    files = tuple(_write_bucket(dataset, unit, name, views) for name, views in bucket_views(dataset, unit))
    quarantined = dict(sorted(Counter(rejected.reason for rejected in unit.rejected).items()))
    commit = Commit(
        unit=unit.unit.id,
        shard=unit.unit.shard.url,
        shard_version=unit.unit.shard.version,
        index=unit.unit.index,
        is_final=unit.unit.is_final,
        num_inputs=unit.num_inputs,
        num_rows=len(unit.samples),
        num_quarantined=len(unit.rejected),
        quarantined=quarantined,
        files=files,
        text_file=_write_text(dataset, unit),
        quarantine_file=_write_quarantine(dataset, unit),
        stats=unit.stats,
    )
    if commit.num_rows + commit.num_quarantined != commit.num_inputs:
        account = f"{commit.num_rows} rows + {commit.num_quarantined} rejected"
        raise ValueError(f"unit {commit.unit} loses or repeats inputs: {commit.num_inputs} are not {account}")
    dataset.commit(commit)
    return UnitReport(
        unit=commit.unit,
        shard=unit.unit.shard.name,
        is_final=commit.is_final,
        inputs=commit.num_inputs,
        rows=commit.num_rows,
        images=len(unit.means_N) + len(unit.mirrored_means_N),
        bytes=sum(file.bytes for file in commit.all_files()),
        quarantined=quarantined,
        examples=tuple(example(rejected) for rejected in unit.rejected[:NUM_EXAMPLES]),
        decode_s=unit.decode_s,
        node=unit.trace.node,
        pid=unit.trace.pid,
        device=unit.trace.device,
        encode_started_at=unit.trace.started_at,
        encode_s=unit.trace.seconds,
    )


def bucket_views(dataset: LatentDataset, unit: EncodedUnit) -> list[tuple[str, list[int]]]:
    """(name, indices of the views) of each resolution and size of image, names in ascending order."""
    sizes, f = dataset.header.preprocess.sizes_px, dataset.header.f
    buckets: dict[str, list[int]] = defaultdict(list)
    for view, mean in enumerate(unit.means_N):
        height, width = mean.shape[1:]
        buckets[f"{sizes[view % len(sizes)]}px-{width * f}x{height * f}"].append(view)
    return sorted(buckets.items())


def _write_bucket(dataset: LatentDataset, unit: EncodedUnit, name: str, views: Sequence[int]) -> DataFile:
    resolutions = len(dataset.header.preprocess.sizes_px)
    samples = unit.samples.take([view // resolutions for view in views])
    mirrored = _arrays(unit.mirrored_means_N, unit.mirrored_stds_N, views) if unit.mirrored_means_N else None
    rows = LatentRows(
        keys=samples.keys,
        labels=samples.labels,
        captions=samples.captions,
        extras=samples.extras,
        moments=_arrays(unit.means_N, unit.stds_N, views),
        mirrored=mirrored,
    )
    data = data_bytes(rows, dataset.header.form)
    return dataset.publish(f"data/{name}/{unit.unit.id}.parquet", data, len(views))


def _arrays(
    means: Sequence[NDArray[np.float16]], stds: Sequence[NDArray[np.float16]], views: Sequence[int]
) -> MomentArrays:
    return MomentArrays(np.stack([means[i] for i in views]), np.stack([stds[i] for i in views]))


def _write_text(dataset: LatentDataset, unit: EncodedUnit) -> DataFile | None:
    if not unit.texts:
        return None
    data = text_bytes(unit.texts, unit.embeddings_T)
    return dataset.publish(f"text/{unit.unit.id}.parquet", data, len(unit.texts))


def _write_quarantine(dataset: LatentDataset, unit: EncodedUnit) -> DataFile | None:
    if not unit.rejected:
        return None
    path = f"quarantine/{unit.unit.id}.parquet"
    return dataset.publish(path, quarantine_bytes(unit.rejected), len(unit.rejected))
