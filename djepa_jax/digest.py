"""Checksums of files."""

import hashlib
import pathlib


def file_sha256(path: pathlib.Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
