"""What travels between the stages: one unit, as one row of one Arrow table.

Ray Data may cut and join blocks wherever it likes, but never inside a row. With a whole unit in
one row, its samples in list columns, no re-blocking can split a unit or mix two of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ldm.errors import BadSampleError
from pipelines.dataset_records import StoredStats
from pipelines.encode.units import Unit, UnitSamples
from pipelines.latent_table import Rejected
from pipelines.shards import Sample, Shard

__all__ = ["DecodedUnit", "Embedded", "EncodedUnit", "EncoderTrace", "ReadUnit", "SampleColumns"]

Row: TypeAlias = dict[str, object]
Element = TypeVar("Element", bound=np.generic)

TEXT = pa.string()
# 64-bit offsets: the images of one unit may be more than 2 GiB.
BYTES = pa.large_binary()
_SHARD = pa.struct([("url", TEXT), ("name", TEXT), ("version", TEXT)])
_UNIT = pa.struct(
    [
        ("id", TEXT),
        ("shard", _SHARD),
        ("index", pa.int64()),
        ("first", pa.int64()),
        ("last", pa.int64()),
        ("is_final", pa.bool_()),
    ]
)
_REJECTED = pa.list_(
    pa.struct([("key", TEXT), ("source", TEXT), ("position", pa.int64()), ("reason", TEXT), ("detail", TEXT)])
)
_SAMPLES = pa.list_(pa.struct([("key", TEXT), ("image", BYTES), ("fields", pa.map_(TEXT, BYTES))]))
_DAMAGE = pa.struct([("reason", TEXT), ("detail", TEXT)])
_COLUMNS = pa.struct(
    [
        ("keys", pa.list_(TEXT)),
        ("labels", pa.list_(pa.int32())),
        ("captions", pa.list_(TEXT)),
        ("extras", pa.list_(TEXT)),
        ("positions", pa.list_(pa.int64())),
    ]
)
_ARRAYS = pa.list_(pa.struct([("shape", pa.list_(pa.int32())), ("data", BYTES)]))


_EMBEDDED = (("texts", pa.list_(TEXT)), ("embeddings_T", _ARRAYS))
_FAILURES = pa.list_(pa.struct([("text", TEXT), ("reason", TEXT), ("detail", TEXT)]))
_ACCOUNT = (("unit", _UNIT), ("num_inputs", pa.int64()), ("rejected", _REJECTED))


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a unit, float16 (tokens, D) each: of its distinct captions, or of single samples.

    texts: the captions, or the keys where every sample brought its own. failures: caption → why it
    has none.
    """

    texts: Sequence[str] = ()
    embeddings_T: Sequence[NDArray[np.float16]] = ()
    failures: Mapping[str, BadSampleError] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadUnit:
    """A unit as it was read, and the embeddings of its captions once the text stage has made them."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [("unit", _UNIT), ("samples", _SAMPLES), ("damage", _DAMAGE), *_EMBEDDED, ("failures", _FAILURES)]
    )

    content: UnitSamples
    embedded: Embedded = Embedded()

    def to_table(self) -> pa.Table:
        """One row."""
        damage, samples = self.content.damage, self.content.samples
        failures = self.embedded.failures.items()
        values: Row = {
            "unit": asdict(self.content.unit),
            "samples": [{"key": s.key, "image": s.image, "fields": list(s.fields.items())} for s in samples],
            "damage": None if damage is None else {"reason": damage.reason, "detail": damage.detail},
            "texts": self.embedded.texts,
            "failures": [{"text": text, "reason": e.reason, "detail": e.detail} for text, e in failures],
        }
        return _table(self.SCHEMA, values, {"embeddings_T": self.embedded.embeddings_T})

    @classmethod
    def from_table(cls, table: pa.Table) -> "ReadUnit":
        """The unit of a table of one row."""
        row = table.drop_columns(["embeddings_T"]).to_pylist(maps_as_pydicts="strict")[0]
        samples = [Sample(**sample) for sample in row["samples"]]
        damage = BadSampleError(**row["damage"]) if row["damage"] else None
        failures = {f["text"]: BadSampleError(f["reason"], f["detail"]) for f in row["failures"]}
        embedded = Embedded(row["texts"], _unpack(table["embeddings_T"], np.float16), failures)
        return cls(UnitSamples(_unit(row["unit"]), samples, damage), embedded)


@dataclass(frozen=True)
class SampleColumns:
    """What is known of a unit's good samples beside their pixels, in their order."""

    keys: Sequence[str]
    labels: Sequence[int | None]
    captions: Sequence[str | None]
    extras: Sequence[str | None]
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Any, ...]]) -> "SampleColumns":
        """Of (key, label, caption, extra, position) for each sample."""
        return cls(*(list(column) for column in zip(*rows, strict=True))) if rows else cls([], [], [], [], [])

    def take(self, indices: Sequence[int]) -> "SampleColumns":
        """Some of the samples."""
        return SampleColumns(*([column[index] for index in indices] for column in vars(self).values()))


@dataclass(frozen=True)
class DecodedUnit:
    """A unit after preprocessing.

    images_N: uint8 (H, W, 3), the views of one sample after those of another: as many of each as
    there are resolutions.
    """

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [*_ACCOUNT, ("samples", _COLUMNS), ("decode_s", pa.float64()), ("images_N", _ARRAYS), *_EMBEDDED]
    )

    unit: Unit
    num_inputs: int
    rejected: Sequence[Rejected]
    samples: SampleColumns
    decode_s: float
    images_N: Sequence[NDArray[np.uint8]]
    texts: Sequence[str] = ()
    embeddings_T: Sequence[NDArray[np.float16]] = ()

    def to_table(self) -> pa.Table:
        """One row."""
        values = _account(self) | {
            "samples": vars(self.samples),
            "decode_s": self.decode_s,
            "texts": self.texts,
        }
        return _table(self.SCHEMA, values, {"images_N": self.images_N, "embeddings_T": self.embeddings_T})

    @classmethod
    def from_table(cls, table: pa.Table) -> "DecodedUnit":
        """The unit of a table of one row; the images are views of the table's memory, not to be written."""
        arrays = ("images_N", "embeddings_T")
        return cls(
            **_values(table, without=arrays),
            images_N=_unpack(table["images_N"], np.uint8),
            embeddings_T=_unpack(table["embeddings_T"], np.float16),
        )


@dataclass(frozen=True)
class EncoderTrace:
    """Which encoder worked on a unit, and when: node's name, process, device, unix time, seconds."""

    node: str
    pid: int
    device: str
    started_at: float
    seconds: float


@dataclass(frozen=True)
class EncodedUnit:
    """A unit with its latents, float16 (C, h, w) as stored, of any bucket's size each.

    means_N, stds_N: in the order of `DecodedUnit.images_N`; mirrored_means_N, mirrored_stds_N: the
    same of the mirrored images, or empty. texts and embeddings_T: the distinct captions and, each
    float16 (tokens, D), what the text encoder made of them.
    """

    unit: Unit
    num_inputs: int
    rejected: Sequence[Rejected]
    samples: SampleColumns
    stats: StoredStats | None
    decode_s: float
    trace: EncoderTrace
    means_N: Sequence[NDArray[np.float16]]
    stds_N: Sequence[NDArray[np.float16]]
    mirrored_means_N: Sequence[NDArray[np.float16]] = ()
    mirrored_stds_N: Sequence[NDArray[np.float16]] = ()
    texts: Sequence[str] = ()
    embeddings_T: Sequence[NDArray[np.float16]] = ()


def _values(table: pa.Table, without: Sequence[str]) -> dict[str, Any]:
    """The row of a table of one row, apart from its arrays."""
    row: dict[str, Any] = table.drop_columns(list(without)).to_pylist()[0]
    row["unit"] = _unit(row["unit"])
    row["rejected"] = [Rejected(**rejected) for rejected in row["rejected"]]
    row["samples"] = SampleColumns(**row["samples"])
    return row


def _account(unit: DecodedUnit) -> Row:
    rejected = [asdict(rejected) for rejected in unit.rejected]
    return {"unit": asdict(unit.unit), "num_inputs": unit.num_inputs, "rejected": rejected}


def _unit(fields: Mapping[str, object]) -> Unit:
    values = dict(fields)
    shard = values.pop("shard")
    assert isinstance(shard, dict)
    return Unit(shard=Shard(**shard), **values)  # type: ignore[arg-type]  # the schema is the check


def _table(schema: pa.Schema, values: Row, arrays: Mapping[str, Sequence[NDArray[np.generic]]]) -> pa.Table:
    columns = {
        name: _pack(arrays[name]) if name in arrays else pa.array([values[name]], schema.field(name).type)
        for name in schema.names
    }
    return pa.table(columns, schema=schema)


def _pack(arrays: Sequence[NDArray[np.generic]]) -> pa.Array:
    """Arrays of any shapes → one list of (shape, bytes). Their bytes are copied once, into one buffer."""
    flat = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    offsets = np.cumsum([0, *(len(part) for part in flat)], dtype=np.int64)
    joined = np.concatenate(flat) if flat else np.empty(0, np.uint8)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(joined)]
    data = pa.LargeBinaryArray.from_buffers(BYTES, len(flat), buffers)
    shapes = pa.array([array.shape for array in arrays], pa.list_(pa.int32()))
    structs = pa.StructArray.from_arrays([shapes, data], fields=list(_ARRAYS.value_type))
    return pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), structs)


def _unpack(column: pa.ChunkedArray, dtype: type[Element]) -> list[NDArray[Element]]:
    shapes, data = column.combine_chunks().flatten().flatten()
    return [
        np.frombuffer(item.as_buffer(), dtype).reshape(shape)
        for item, shape in zip(data, shapes.to_pylist(), strict=True)
    ]
