"""What TensorBoard would show of a folder of event files, read as it reads them but without it."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog

__all__ = ["shown"]


def shown(folder: Path) -> list[tuple[int, str, object]]:
    """(step, tag, number or PNG) of what is left when each start has hidden the steps from its own on."""
    events: list[tuple[int, str, object]] = []
    for path in sorted(folder.iterdir()):
        for event in _events(path.read_bytes()):
            if event.session_log.status == SessionLog.START:
                events = [found for found in events if found[0] < event.step]
            events += [
                (
                    event.step,
                    value.tag,
                    value.image.encoded_image_string if value.HasField("image") else value.simple_value,
                )
                for value in event.summary.value
            ]
    return events


def _events(data: bytes) -> Iterator[Event]:
    """The records of a TFRecord file: length, its checksum, data, their checksum."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
