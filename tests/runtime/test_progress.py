"""What people see of a run's progress."""

import io

import pytest

from djepa_jax.runtime import progress
from djepa_jax.runtime.progress import Progress, Stopwatch, format_bytes, format_seconds, say


class Terminal(io.StringIO):
    """A stream that stands for a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_stays_of_the_first_the_last_and_now_and_then(clock, capsys):
    work = Progress("training", "step", 1100, 100)
    assert "training 1,000 steps" in capsys.readouterr().out, "something before the first step"
    said = {}
    for step in range(101, 1101):
        clock[0] += 1.0
        work.show(step, f"loss {step}.5")
        said[step] = capsys.readouterr().out
    assert [step for step, text in said.items() if text] == [*range(101, 1101, 30), 1100]
    assert all(
        f"step {step}/1100" in said[step] and f"loss {step}.5" in said[step]
        for step in said
        if said[step]
    )
    assert "16 min 39 s left" in said[101] and "left" not in said[1100] and "16 min" in said[1100]


def test_a_terminal_has_a_bar_below_the_lines_that_stay(monkeypatch):
    monkeypatch.setattr(progress.sys, "stdout", stream := Terminal())
    work = Progress("sampling", "sample", 8)
    for count in work.over(range(7)):
        say(f"item {count}")
    assert "/8 [" in stream.getvalue().rpartition("\r")[2], "the bar is below"
    work.show(8)
    written = stream.getvalue()
    assert all(f"\ritem {count}\n" in written for count in range(7)), "lines of their own"
    assert "sample 8/8" in written and written.split("\r")[-2].strip() == ""


def test_who_is_quiet_says_nothing(monkeypatch):
    monkeypatch.setattr(progress.sys, "stdout", stream := Terminal())
    work = Progress("sampling", "sample", 2, quiet=True)
    work.show(1)
    work.show(2)
    assert stream.getvalue() == ""


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
