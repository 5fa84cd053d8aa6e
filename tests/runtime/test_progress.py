"""What people see of a run's progress."""

import io

import pytest

from djepa_jax.runtime import progress
from djepa_jax.runtime.progress import ProgressLine, Stopwatch, format_bytes, format_seconds

METRICS = {"loss": 1.5, "jepa_loss": 0.5, "skipped_steps": 2.0}


class Terminal(io.StringIO):
    """A stream that stands for a terminal."""

    def isatty(self):
        return True


def test_a_line_names_step_losses_rate_and_time_left():
    stream = io.StringIO()
    ProgressLine(100, stream).show(7, METRICS, 1234.5, 65)
    words = ["step 7/100", "loss 1.5000", "jepa_loss 0.5000", "1234 images/s", "1 min 05 s left"]
    assert all(word in stream.getvalue() for word in [*words, "2 steps skipped"])
    ProgressLine(100, quiet := io.StringIO(), quiet=True).show(7, METRICS, 1234.5, 65)
    assert quiet.getvalue() == ""


def test_a_live_line_stays_on_one_line():
    line = ProgressLine(10, stream := Terminal())
    line.show(1, METRICS, 1, 1)
    line.show(2, METRICS, 1, 1)
    assert "\n" not in stream.getvalue() and stream.getvalue().count("\r") == 2
    line.say("saved")
    assert stream.getvalue().endswith("\rsaved\n")


def test_a_stopwatch_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    now[0] = 103.0
    with watch.waiting():
        now[0] = 104.0
    with watch.paused():
        now[0] = 110.0
    assert watch.lap() == (pytest.approx(4.0), pytest.approx(0.25))


def test_times_and_sizes_read_like_speech():
    times = {0: "0 s", 59.4: "59 s", 185: "3 min 05 s", 7620: "2 h 07 min", -3: "0 s"}
    assert {seconds: format_seconds(seconds) for seconds in times} == times
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 200 * 2**20: "200 MiB", 2**42: "4096 GiB"}
    assert {size: format_bytes(size) for size in sizes} == sizes
