"""Progress, metrics files and grids."""

import io
import json
import pathlib
import resource
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from djepa_jax.runtime import metric_writer


def test_progress_line_names_step_losses_rate_and_time_left():
    stream = io.StringIO()
    metric_writer.ProgressLine(100, stream).show(
        7, {"loss": 1.5, "jepa_loss": 0.5, "skipped_steps": 2.0}, 1234.5, 65
    )
    line = stream.getvalue()
    for word in (
        "step 7/100",
        "loss 1.5000",
        "jepa_loss 0.5000",
        "images/s",
        "1 min 05 s left",
        "2 steps skipped",
    ):
        assert word in line


def test_live_line_stays_on_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = metric_writer.ProgressLine(10, stream)
    progress.show(1, {"loss": 1.0}, 1, 1)
    progress.show(2, {"loss": 0.5}, 1, 1)
    assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 2
    progress.say("saved")
    assert stream.getvalue().endswith("saved\n")


def test_metrics_survive_not_a_number(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": 0.5, "grad_norm": float("nan")})
    writer.write_images(1, {"samples": np.zeros((4, 4, 3), np.uint8)})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 0.5,
        "grad_norm": None,
    }
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert events.stat().st_size > 100


def events_in(folder: pathlib.Path) -> list[Event]:
    """What the event file of a folder holds now, every record with good checksums."""
    (path,) = folder.glob("events.out.tfevents*")
    data, events = path.read_bytes(), []
    while data:
        length, of_length = struct.unpack_from("<QI", data)
        (of_record,) = struct.unpack_from("<I", data, 12 + length)
        record = data[12 : 12 + length]
        assert (masked_crc32c(data[:8]), masked_crc32c(record)) == (of_length, of_record)
        events.append(Event.FromString(record))
        data = data[16 + length :]
    return events


def test_what_was_written_before_a_flush_can_be_read_after_it(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path)
    for step in range(1, 51):  # more than tensorboardX would keep in its queue
        writer.write_scalars(step, {"loss": step / 2, "rate": 1.0})
    writer.write_images(50, {"samples": np.zeros((4, 6, 3), np.uint8)})
    writer.write_texts(50, {"config": "seed: 0"})
    writer.flush()
    first, *events = events_in(tmp_path)
    *scalars, image, text = [
        (event.step, value) for event in events for value in event.summary.value
    ]
    expected = [
        (step, name, value)
        for step in range(1, 51)
        for name, value in (("loss", step / 2), ("rate", 1.0))
    ]
    assert first.file_version == "brain.Event:2"
    assert [(step, value.tag, value.simple_value) for step, value in scalars] == expected
    assert (image[0], image[1].tag, image[1].image.height, image[1].image.width) == (
        50,
        "samples",
        4,
        6,
    )
    assert (text[0], text[1].tag, text[1].tensor.string_val[0]) == (
        50,
        "config/text_summary",
        b"seed: 0",
    )
    writer.close()
    assert len(events_in(tmp_path)) == 1 + len(events)


def test_events_do_not_wait_long(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("djepa_jax.runtime.metric_writer.time.monotonic", lambda: now[0])
    writer, seen = metric_writer.MetricWriter(tmp_path), []
    for step, now[0] in enumerate((100.0, 101.0, 129.0, 130.0), start=1):
        writer.write_scalars(step, {"loss": 1.0})
        seen.append(len(events_in(tmp_path)))
    writer.close()
    assert seen == [2, 2, 2, 5], "the first at once, then those of 30 seconds together"


def test_going_on_drops_steps_that_were_not_saved(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = metric_writer.MetricWriter(tmp_path, start)
        for step in steps:
            writer.write_scalars(step, {"loss": float(start)})
        writer.close()
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write("[" * 100_000 + "\n")  # nothing of ours
            file.write('{"step": 9, "lo')  # a crash in the middle of a line
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-2]] == [1, 2, 3, 4]
    assert [json.loads(line)["loss"] for line in lines[:-2]] == [0, 0, 2, 2]


def test_stopwatch_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("djepa_jax.runtime.metric_writer.time.perf_counter", lambda: now[0])
    watch = metric_writer.Stopwatch()
    now[0] = 103.0
    with watch.waiting():
        now[0] = 104.0
    with watch.paused():
        now[0] = 110.0
    seconds, share = watch.lap()
    assert seconds == pytest.approx(4.0) and share == pytest.approx(0.25)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)  # some 12,000 bytes as PNG


def test_a_full_disk_is_told_with_the_place(tmp_path):
    """Also by `close`, where what is still to be written fails once more."""
    writer = metric_writer.MetricWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for action in (
            lambda: writer.write_scalars(1, {"loss": 1.0, "name" * 50: 2.0}),
            writer.close,
        ):
            with pytest.raises(
                OSError, match=f"{tmp_path} cannot be written .File too large.. Make room there"
            ):
                action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fill(writer: metric_writer.MetricWriter) -> None:
    """Write as a training does, for longer than any queue is."""
    for step in range(1, 1001):
        writer.write_scalars(step, {"loss": 1.0})


@pytest.mark.parametrize(
    "line",
    [
        '{"step": null}',
        '{"step": "x"}',
        '{"step": true}',
        "[" * 100_000,
        '{"loss": 1}',
        "",
        '{"step": 2',
    ],
)
def test_lines_that_tell_no_step_go_when_a_run_goes_on(tmp_path, line):
    path = tmp_path / metric_writer.METRICS_NAME
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"step": 3}}\n')
    metric_writer.MetricWriter(tmp_path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


FULL = {
    "scalars": fill,
    "pictures": lambda writer: writer.write_images(1, {"samples": NOISE}),
    "texts": lambda writer: writer.write_texts(1, {"config": "word " * 10_000}),
    "flush": lambda writer: writer.flush(),
    "close": lambda writer: writer.close(),
}


@pytest.mark.parametrize("action", FULL)
@pytest.mark.skipif(
    not pathlib.Path("/dev/full").exists(), reason="the system has no file that is always full"
)
def test_events_that_cannot_be_written_end_the_run_and_never_hold_it_up(
    tmp_path, monkeypatch, action
):
    """Nothing but the events is on the full disk, so that nothing else tells of it."""
    monkeypatch.setattr(metric_writer, "RecordWriter", lambda path: RecordWriter("/dev/full"))
    writer = metric_writer.MetricWriter(tmp_path)
    with pytest.raises(
        OSError, match=f"{tmp_path} cannot be written .No space left on device.. Make room there"
    ):
        FULL[action](writer)
