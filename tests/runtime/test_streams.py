"""Output that nobody reads: the program goes on and ends with its own status."""

import os
import pathlib
import subprocess
import sys

import pytest

# What a program does after `ignore_lost_readers`: it prints far more than any buffer holds.
PROGRAM = """
import os, sys
from djepa_jax.runtime.streams import ignore_lost_readers
ignore_lost_readers()
numbers = [os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)]
for _ in range(5):
    print("word " * 9999)
    print("word " * 9999, file=sys.stderr)
os.write(numbers[0], b"done" if min(numbers) > 2 else b"printed into")
sys.exit(7)
"""

KEPT = []


def without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe() -> int:
    """One that nobody empties, and that refuses instead of waiting."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    KEPT.append(reader)
    return writer


OUTPUTS = {
    "nobody reads": without_reader,
    "nobody empties": full_pipe,
    "full disk": lambda: os.open("/dev/full", os.O_WRONLY),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_cannot_be_printed_is_dropped(output, tmp_path):
    if output == "full disk" and not pathlib.Path("/dev/full").exists():
        pytest.skip("no file that is always full")
    number = OUTPUTS[output]()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    ended = subprocess.run(command, stdout=number, stderr=number, check=False)
    os.close(number)
    assert ended.returncode == 7 and (tmp_path / "file").read_bytes() == b"done"


def test_closed_outputs_are_no_other_files(tmp_path):
    command = f"'{sys.executable}' -c '{PROGRAM}' '{tmp_path / 'file'}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 7
    assert (tmp_path / "file").read_bytes() == b"done"


def test_what_is_read_comes_at_once_and_nothing_more_is_said(tmp_path):
    """A pipe that loses its reader after the first line."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "word " * 9999 + "\n"
        process.stdout.close()
        assert set(process.stderr.read().split()) == {"word"}, "a complaint"
        assert process.wait() == 7
