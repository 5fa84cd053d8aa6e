"""Metrics: lines and events, going on, a full disk, and a bucket that does not answer."""

import json
import pathlib
import resource

import numpy as np
import pytest
from buckets import WORKDIR
from event_files import events_in, shown
from tensorboardX import event_file_writer
from tensorboardX.proto.event_pb2 import SessionLog
from tensorboardX.record_writer import RecordWriter

from djepa_jax.runtime.metric_writer import METRICS_NAME, MetricWriter
from djepa_jax.runtime.storage import as_path


def steps(text: str | bytes) -> list[int]:
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_what_is_written_can_be_read_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 51):  # more than tensorboardX would keep in its queue
        writer.write_scalars(step, {"loss": step / 2, "grad_norm": float("nan")})
    writer.write_images(50, {"samples": np.zeros((4, 6, 3), np.uint8)})
    writer.write_texts(50, {"config": "seed: 0"})
    lines = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert lines[-1] == {"step": 50, "loss": 25.0, "grad_norm": None} and len(lines) == 50
    first, start, *events = events_in(tmp_path)
    assert first.file_version == "brain.Event:2" and all(event.wall_time for event in events)
    assert (start.session_log.status, start.step) == (SessionLog.START, 1)
    values = [(event.step, value) for event in events for value in event.summary.value]
    assert [(step, value.simple_value) for step, value in values if value.tag == "loss"] == [
        (step, step / 2) for step in range(1, 51)
    ]
    image, text = values[-2][1], values[-1][1]
    assert (image.tag, image.image.height, image.image.width) == ("samples", 4, 6)
    assert text.tensor.string_val[0] == b"seed: 0"
    writer.close()
    assert len(events_in(tmp_path)) == 2 + len(events)


BROKEN = ['{"step": null}', '{"step": "x"}', "[[", '{"loss": 1}', "", '{"step": 2']


def test_going_on_drops_what_was_not_saved(tmp_path):
    """Lines of later steps and such as a crash leaves; TensorBoard is told to do the same."""
    path = tmp_path / METRICS_NAME
    path.write_text("".join(f"{line}\n" for line in ['{"step": 1}', *BROKEN, '{"step": 2}']))
    with open(path, "a") as file:
        file.write('{"step": 3}\n{"step": 9, "lo')
    writer = MetricWriter(tmp_path, 2)
    writer.write_scalars(3, {"loss": 1.0})
    writer.close()
    assert steps(path.read_text()) == [1, 2, 3]
    start = events_in(tmp_path)[1]
    assert (start.session_log.status, start.step) == (SessionLog.START, 3)


def test_tensorboard_shows_no_step_twice_and_none_is_lost(tmp_path):
    """Lives that follow one another within a second, each going back to before the last's end."""
    for life, (first, last) in enumerate([(0, 10), (4, 8), (6, 9)]):
        writer = MetricWriter(tmp_path, first)
        for step in range(first + 1, last + 1):
            writer.write_scalars(step, {"loss": float(life)})
            if step % 2 == 0:
                writer.write_images(step, {"samples": np.zeros((2, 2, 3), np.uint8)})
        writer.close()
    found = shown(tmp_path)
    assert found["samples"] == [2, 4, 6, 8]
    assert found["loss"] == list(range(1, 10)) == steps((tmp_path / METRICS_NAME).read_text())


FULL = {
    "lines": lambda writer: [writer.write_scalars(step, {"loss": 1.0}) for step in range(1000)],
    "pictures": lambda writer: writer.write_images(
        1, {"samples": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)}
    ),
    "texts": lambda writer: writer.write_texts(1, {"config": "word " * 10_000}),
    "close": lambda writer: writer.close(),
}


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no file that is always full")
@pytest.mark.parametrize("action", FULL)
def test_a_full_disk_ends_the_run_and_never_holds_it_up(tmp_path, monkeypatch, action):
    """Nothing but the events is on the full disk, so that nothing else tells of it."""
    monkeypatch.setattr(event_file_writer, "RecordWriter", lambda path: RecordWriter("/dev/full"))
    writer = MetricWriter(tmp_path)
    with pytest.raises(OSError, match=f"{tmp_path} cannot be written .No space left.*Make room"):
        FULL[action](writer)


def test_a_full_disk_is_told_by_lines_too(tmp_path):
    writer = MetricWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path} cannot be written .File too large"):
            writer.write_scalars(1, {"name" * 50: 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---------------------------------------------------------------- a workdir in a bucket


def test_copies_are_made_up_for(empty, caplog):
    writer = MetricWriter(as_path(WORKDIR))
    with empty.refused_uploads("run/metrics.jsonl"):
        writer.write_scalars(1, {"loss": 1.0})
        writer.flush()
        assert "run/metrics.jsonl" not in empty.objects
    assert f"{WORKDIR}/metrics.jsonl was not written" in caplog.text
    writer.write_scalars(2, {"loss": 0.5})
    writer.close()
    assert steps(empty.objects["run/metrics.jsonl"]) == [1, 2]
    assert any("tfevents" in name for name in empty.objects) and not writer.folder.exists()
    writer = MetricWriter(as_path(WORKDIR), 1)
    writer.close()
    assert steps(empty.objects["run/metrics.jsonl"]) == [1]


def test_what_could_not_be_copied_is_kept(empty, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with empty.refused_uploads():
        writer = MetricWriter(as_path(WORKDIR))
        writer.write_scalars(1, {"loss": 1.0})
        writer.close()
    assert f"is kept in {writer.folder}" in caplog.text
    assert steps((writer.folder / METRICS_NAME).read_text()) == [1]
