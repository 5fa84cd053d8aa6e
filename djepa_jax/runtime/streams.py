"""Output that nobody need read: a closed terminal, a pipe whose reader went, a full disk."""

import contextlib
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
    """Let no print fail in this process, whatever becomes of its standard output and error, and
    whatever characters they can show.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get the number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            # Somebody else's: notebooks have others, and one that is a pipe cannot be changed.
            with contextlib.suppress(AttributeError, OSError):
                stream.reconfigure(errors="backslashreplace")
            continue
        raw = io.BufferedWriter(_Dropping(number, "wb", closefd=False))
        encoding = stream.encoding if stream else None
        text = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, text)
