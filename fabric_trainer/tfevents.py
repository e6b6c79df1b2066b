"""TensorBoard's event files, cut back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from fabric_trainer.files import write_atomically


def drop_events_after(path: Path, step: int) -> None:
    """Rewrite an event file without the events after ``step``, without a torn end, and without restart markers:
    they were for readers of that time, and would hide later events if files were read out of order."""
    from tensorboard.compat.proto.event_pb2 import Event

    data, kept = path.read_bytes(), bytearray()
    for record, payload in _records(data):
        event = Event.FromString(payload)
        if event.step <= step and not event.HasField("session_log"):
            kept += record
    if len(kept) < len(data):
        write_atomically(path, bytes(kept))


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(record, payload) of a TFRecord file: uint64 length, uint32 crc, payload, uint32 crc. Stops at a torn end."""
    position = 0
    while position + 16 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        end = position + 16 + length
        if length == 0 or end > len(data):
            return
        yield data[position:end], data[position + 12 : end - 4]
        position = end
