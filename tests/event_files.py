"""What is in a run's event files, and what TensorBoard shows of it."""

import pathlib
import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


def events_in(folder: pathlib.Path) -> list[Event]:
    """What the event files of a folder hold now, every record with good checksums."""
    events = []
    for path in sorted(folder.glob("events.out.tfevents*")):
        data = path.read_bytes()
        while data:
            length, of_length = struct.unpack_from("<QI", data)
            (of_record,) = struct.unpack_from("<I", data, 12 + length)
            record = data[12 : 12 + length]
            assert (masked_crc32c(data[:8]), masked_crc32c(record)) == (of_length, of_record)
            events.append(Event.FromString(record))
            data = data[16 + length :]
    return events


def shown(folder: pathlib.Path) -> dict[str, list[int]]:
    """The steps of every tag as TensorBoard shows them: a start drops what has its step or more."""
    points = []
    for event in events_in(folder):
        if event.session_log.status == SessionLog.START:
            points = [(step, tag) for step, tag in points if step < event.step]
        points += [(event.step, value.tag) for value in event.summary.value]
    return {tag: [step for step, t in points if t == tag] for _, tag in points}
