"""Times and sizes for people."""

import pytest

from djepa_jax.runtime.units import format_bytes, format_seconds

GIB = 2**30


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (-3, "0 s")],
)
def test_durations_read_like_speech(seconds, text):
    assert format_seconds(seconds) == text


def test_sizes_are_rounded_for_people():
    sizes = {
        0: "0 B",
        1023: "1023 B",
        1536: "1.5 KiB",
        200 * 2**20: "200 MiB",
        3 * GIB: "3.0 GiB",
        4000 * GIB: "4000 GiB",
    }
    assert {size: format_bytes(size) for size in sizes} == sizes
