"""What travels between the stages: one unit, as one row of one Arrow table.

Ray Data may cut and join blocks wherever it likes, but never inside a row. With a whole unit in
one row, its samples in list columns, no re-blocking can split a unit or mix two of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ldm.errors import BadSampleError
from pipelines.dataset import StoredStats
from pipelines.encode.units import Unit, UnitSamples
from pipelines.latent_table import Rejected
from pipelines.shards import Sample, Shard

__all__ = ["DecodedUnit", "EncodedUnit", "EncoderTrace", "ReadUnit"]

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
_ARRAYS = pa.list_(pa.struct([("shape", pa.list_(pa.int32())), ("data", BYTES)]))
_STATS = pa.struct([("count", pa.int64()), ("mean", pa.list_(pa.float64())), ("m2", pa.list_(pa.float64()))])
_TRACE = pa.struct([("node", TEXT), ("pid", pa.int64()), ("device", TEXT), ("seconds", pa.float64())])


@dataclass(frozen=True)
class ReadUnit:
    """A unit as it was read: `UnitSamples` as a row."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema([("unit", _UNIT), ("samples", _SAMPLES), ("damage", _DAMAGE)])

    content: UnitSamples

    def to_table(self) -> pa.Table:
        """One row."""
        damage, samples = self.content.damage, self.content.samples
        row: Row = {
            "unit": asdict(self.content.unit),
            "samples": [{"key": s.key, "image": s.image, "fields": list(s.fields.items())} for s in samples],
            "damage": None if damage is None else {"reason": damage.reason, "detail": damage.detail},
        }
        return pa.Table.from_pylist([row], schema=self.SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> "ReadUnit":
        """The unit of a table of one row."""
        row = table.to_pylist(maps_as_pydicts="strict")[0]
        samples = [Sample(**sample) for sample in row["samples"]]
        damage = BadSampleError(**row["damage"]) if row["damage"] else None
        return cls(UnitSamples(_unit(row["unit"]), samples, damage))


@dataclass(frozen=True)
class DecodedUnit:
    """A unit after preprocessing: images_N are uint8 (H, W, 3), in the order of keys and labels."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("unit", _UNIT),
            ("num_inputs", pa.int64()),
            ("rejected", _REJECTED),
            ("keys", pa.list_(TEXT)),
            ("labels", pa.list_(pa.int32())),
            ("positions", pa.list_(pa.int64())),
            ("images", _ARRAYS),
        ]
    )

    unit: Unit
    num_inputs: int
    rejected: Sequence[Rejected]
    keys: Sequence[str]
    labels: Sequence[int | None]
    positions: Sequence[int]
    images_N: Sequence[NDArray[np.uint8]]

    def to_table(self) -> pa.Table:
        """One row."""
        lists = {"keys": self.keys, "labels": self.labels, "positions": self.positions}
        return _table(self.SCHEMA, _account(self) | lists, {"images": self.images_N})

    @classmethod
    def from_table(cls, table: pa.Table) -> "DecodedUnit":
        """The unit of a table of one row; the images are views of the table's memory, not to be written."""
        row = table.drop_columns(["images"]).to_pylist()[0]
        unit, rejected = _unit(row.pop("unit")), [Rejected(**r) for r in row.pop("rejected")]
        return cls(unit=unit, rejected=rejected, images_N=_unpack(table["images"], np.uint8), **row)


@dataclass(frozen=True)
class EncoderTrace:
    """Which encoder worked on a unit, and for how long: node's name, process, device, seconds."""

    node: str
    pid: int
    device: str
    seconds: float


@dataclass(frozen=True)
class EncodedUnit:
    """A unit with its moments: means_N and stds_N are float16 (C, h, w), of any bucket's size each."""

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("unit", _UNIT),
            ("num_inputs", pa.int64()),
            ("rejected", _REJECTED),
            ("keys", pa.list_(TEXT)),
            ("labels", pa.list_(pa.int32())),
            ("stats", _STATS),
            ("trace", _TRACE),
            ("means", _ARRAYS),
            ("stds", _ARRAYS),
        ]
    )

    unit: Unit
    num_inputs: int
    rejected: Sequence[Rejected]
    keys: Sequence[str]
    labels: Sequence[int | None]
    stats: StoredStats | None
    trace: EncoderTrace
    means_N: Sequence[NDArray[np.float16]]
    stds_N: Sequence[NDArray[np.float16]]

    def to_table(self) -> pa.Table:
        """One row."""
        stats = None if self.stats is None else self.stats.model_dump()
        values: Row = {"keys": self.keys, "labels": self.labels, "stats": stats, "trace": asdict(self.trace)}
        return _table(self.SCHEMA, _account(self) | values, {"means": self.means_N, "stds": self.stds_N})

    @classmethod
    def from_table(cls, table: pa.Table) -> "EncodedUnit":
        """The unit of a table of one row."""
        row = table.drop_columns(["means", "stds"]).to_pylist()[0]
        stats = row.pop("stats")
        return cls(
            unit=_unit(row.pop("unit")),
            rejected=[Rejected(**r) for r in row.pop("rejected")],
            stats=None if stats is None else StoredStats(**stats),
            trace=EncoderTrace(**row.pop("trace")),
            means_N=_unpack(table["means"], np.float16),
            stds_N=_unpack(table["stds"], np.float16),
            **row,
        )


def _account(unit: DecodedUnit | EncodedUnit) -> Row:
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
