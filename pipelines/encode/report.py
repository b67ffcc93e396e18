"""What is told of a unit once it is committed, and of a run: for progress, limits and summaries."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipelines.encode.bad_share import NUM_EXAMPLES

__all__ = ["EncodeSummary", "EncoderSummary", "RunReport", "UnitReport"]


class UnitReport(BaseModel):
    """What came of one unit, who encoded it, when (unix time) and for how long. bytes: of all its files.

    images: encoded ones, which with several resolutions or mirrored ones are more than rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: str
    shard: str
    is_final: bool
    inputs: int
    rows: int
    images: int
    bytes: int
    quarantined: dict[str, int]
    examples: tuple[str, ...]
    decode_s: float
    node: str
    pid: int
    device: str
    encode_started_at: float
    encode_s: float

    def to_table(self) -> pa.Table:
        """One row."""
        return pa.table({"report": [self.model_dump_json()]})

    @classmethod
    def of_table(cls, table: pa.Table) -> list["UnitReport"]:
        """One per row."""
        return [cls.model_validate_json(text) for text in table["report"].to_pylist()]


@dataclass(frozen=True)
class EncoderSummary:
    """One encoder actor: where it ran, what it did, how many seconds it encoded."""

    node: str
    pid: int
    device: str
    units: int
    images: int
    busy_s: float


@dataclass(frozen=True)
class EncodeSummary:
    """What one run did: its own rows, images and bytes; quarantined counts by reason.

    first_batch_at: unix time at which the first unit was begun by an encoder. decode_s: of all decode
    workers.
    """

    rows: int
    images: int
    quarantined: dict[str, int]
    examples: tuple[str, ...]
    units_done: int
    units_skipped: int
    retired_shards: tuple[str, ...]
    removed_shards: tuple[str, ...]
    seconds: float
    first_batch_at: float | None
    images_per_s: float
    bytes_per_image: float
    decode_s: float
    encoders: tuple[EncoderSummary, ...]


@dataclass
class RunReport:
    """Sums over the units of a run, as they are committed. Its size does not grow with their number."""

    units: int = 0
    inputs: int = 0
    rows: int = 0
    images: int = 0
    bytes: int = 0
    decode_s: float = 0.0
    first_batch_at: float | None = None
    quarantined: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    encoders: dict[tuple[str, int, str], EncoderSummary] = field(default_factory=dict)

    def add(self, report: UnitReport) -> None:
        """One more unit is committed."""
        self.units += 1
        self.inputs += report.inputs
        self.rows += report.rows
        self.images += report.images
        self.bytes += report.bytes
        self.decode_s += report.decode_s
        self.first_batch_at = min(self.first_batch_at or report.encode_started_at, report.encode_started_at)
        self.quarantined.update(report.quarantined)
        self.examples += report.examples[: NUM_EXAMPLES - len(self.examples)]
        actor = report.node, report.pid, report.device
        last = self.encoders.get(actor, EncoderSummary(*actor, units=0, images=0, busy_s=0.0))
        self.encoders[actor] = EncoderSummary(
            *actor, last.units + 1, last.images + report.images, last.busy_s + report.encode_s
        )

    def summary(
        self,
        *,
        seconds: float,
        units_skipped: int,
        retired_shards: Sequence[str],
        removed_shards: Sequence[str],
    ) -> EncodeSummary:
        """The whole run's."""
        return EncodeSummary(
            rows=self.rows,
            images=self.images,
            quarantined=dict(sorted(self.quarantined.items())),
            examples=tuple(self.examples),
            units_done=self.units,
            units_skipped=units_skipped,
            retired_shards=tuple(retired_shards),
            removed_shards=tuple(removed_shards),
            seconds=seconds,
            first_batch_at=self.first_batch_at,
            images_per_s=self.images / seconds,
            bytes_per_image=self.bytes / max(self.rows, 1),
            decode_s=self.decode_s,
            encoders=tuple(self.encoders[actor] for actor in sorted(self.encoders)),
        )
