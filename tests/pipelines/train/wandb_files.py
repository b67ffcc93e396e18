"""The history in a ``.wandb`` file, which is a log in LevelDB's format of wandb's own records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

__all__ = ["history"]

BLOCK_BYTES = 32768


def history(path: Path) -> list[dict[str, Any]]:
    """One mapping for each step that was logged."""
    records = [Record.FromString(data) for data in _records(path.read_bytes())]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def _records(data: bytes) -> Iterator[bytes]:
    """Chunks (checksum, length, kind, data) fill blocks, of which the first begins with 7 bytes of wandb."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""
