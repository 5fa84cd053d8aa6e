"""Arrays in npz files, whose sizes are found to be true and affordable before any memory is taken
for them.
"""

import math
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(file: pathlib.Path, *groups: Sequence[str]) -> list[np.ndarray]:
    """From each group of names the first array that is in an npz file.

    Raises:
        ValueError: an array is missing, holds Python objects, claims another size than it has, or
            would not fit into the memory.
        Exception: whatever zip, its compressors and numpy make of a damaged file.
    """
    with zipfile.ZipFile(file) as archive:
        present = set(archive.namelist())
        members = [
            next((f"{name}.npy" for name in names if f"{name}.npy" in present), None)
            for names in groups
        ]
        for names, member in zip(groups, members, strict=True):
            if member is None:
                raise ValueError(f"{names[-1]} is not in it")
        check_memory(sum(archive.getinfo(member).file_size for member in members))
        return [_read_member(archive, member) for member in members]


def check_memory(wanted: int) -> None:
    """Raise ValueError for more bytes than the machine has."""
    if wanted > total_memory():
        raise ValueError(f"unpacked it has {wanted:,} bytes, more than this machine's memory")


def total_memory() -> float:
    """Bytes of memory of this machine; infinite where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return math.inf


def _read_member(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """One array; no more is unpacked than the archive's index says."""
    with archive.open(member) as stream:
        _check_size(stream, member, archive.getinfo(member).file_size)
    with archive.open(member) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_size(stream: BinaryIO, member: str, size: int) -> None:
    """Compare what an array's header claims with the bytes that there are. numpy would take the
    memory at once.
    """
    version = np.lib.format.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"{member} has the unknown version {version}")
    shape, _, dtype = HEADERS[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{member} holds Python objects, which are not loaded")
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed != size - stream.tell():
        raise ValueError(
            f"{member} claims the shape {shape} of {dtype}, and has {size - stream.tell():,} "
            "bytes for it"
        )
