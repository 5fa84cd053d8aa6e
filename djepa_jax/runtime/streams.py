"""Output that nobody need read: a closed terminal, a pipe whose reader went, a full disk."""

import io
import os
import sys


class _Dropping(io.FileIO):
    """A file that takes everything, and drops what the system refuses."""

    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)  # None: one that must not wait is full
        except OSError:
            return len(data)


def ignore_lost_readers() -> None:
    """Let no print fail in this process, whatever becomes of its standard output and error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get the number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody else's
        kept = {"encoding": stream.encoding, "errors": stream.errors} if stream else {}
        raw = io.BufferedWriter(_Dropping(number, "wb", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, line_buffering=True, **kept))
