"""Progress, metrics files and grids."""

import io
import json
import resource

import numpy as np
import pytest

from djepa_jax import logs


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (-3, "0 s")]
)
def test_durations_read_like_speech(seconds, text):
    assert logs.format_seconds(seconds) == text


def test_progress_line_names_step_losses_rate_and_time_left():
    stream = io.StringIO()
    logs.ProgressLine(100, stream).show(7, {"loss": 1.5, "jepa_loss": 0.5, "skipped_steps": 2.0}, 1234.5, 65)
    line = stream.getvalue()
    for word in ("step 7/100", "loss 1.5000", "jepa_loss 0.5000", "images/s", "1 min 05 s left", "2 steps skipped"):
        assert word in line


def test_live_line_stays_on_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = logs.ProgressLine(10, stream)
    progress.show(1, {"loss": 1.0}, 1, 1)
    progress.show(2, {"loss": 0.5}, 1, 1)
    assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 2
    progress.say("saved")
    assert stream.getvalue().endswith("saved\n")


def test_metrics_survive_not_a_number(tmp_path):
    writer = logs.MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": 0.5, "grad_norm": float("nan")})
    writer.write_images(1, {"samples": np.zeros((4, 4, 3), np.uint8)})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "grad_norm": None}
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert events.stat().st_size > 100


def test_going_on_drops_steps_that_were_not_saved(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = logs.MetricWriter(tmp_path, start)
        for step in steps:
            writer.write_scalars(step, {"loss": float(start)})
        writer.close()
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "lo')  # a crash in the middle of a line
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2, 3, 4]
    assert [json.loads(line)["loss"] for line in lines[:-1]] == [0, 0, 2, 2]


def test_stopwatch_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("djepa_jax.logs.time.perf_counter", lambda: now[0])
    watch = logs.Stopwatch()
    now[0] = 103.0
    with watch.waiting():
        now[0] = 104.0
    with watch.paused():
        now[0] = 110.0
    seconds, share = watch.lap()
    assert seconds == pytest.approx(4.0) and share == pytest.approx(0.25)


def test_a_full_disk_is_told_with_the_place(tmp_path):
    """Also by `close`, where what is still to be written fails once more."""
    writer = logs.MetricWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for action in (lambda: writer.write_scalars(1, {"loss": 1.0, "name" * 50: 2.0}), writer.close):
            with pytest.raises(OSError, match=f"{tmp_path} cannot be written .File too large.. Make room there"):
                action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
