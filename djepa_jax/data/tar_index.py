"""What lies where in a tar file, without reading more than its headers."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from djepa_jax.data.records import DataError

BLOCK = 512
MAX_NAME_BYTES = 2**16  # of an extended header, which holds a long name
FILES, FOLDER, LINKS = (b"0", b"\0", b"7"), b"5", (b"1", b"2")
LONG_NAME, LONG_LINK, EXTENDED, GLOBAL = b"L", b"K", b"x", b"g"
PREAMBLES = (
    LONG_NAME,
    LONG_LINK,
    EXTENDED,
    GLOBAL,
)  # entries that tell something about the next, or about all


class Member(NamedTuple):
    """A file inside a tar file: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


class _Header(NamedTuple):
    name: bytes
    kind: bytes
    size: int


def walk_tar(fd: int, file: str, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The files in an uncompressed tar file, in their order; nothing is unpacked.

    Not with Python's `tarfile`, which takes a damaged header for the end and memory without limit
    for a long name.

    Args:
        fd: the open file.
        file: its name, for messages.
        start: where the tar begins in the file.
        stop: where it ends; None for the end of the file.

    Raises:
        DataError: not a tar file, damaged, cut off, or with links, special files or names that lead
            outside.
    """
    position, stop, known = start, os.fstat(fd).st_size if stop is None else stop, {}
    while True:
        block = os.pread(fd, BLOCK, position)
        if position + BLOCK > stop or len(block) < BLOCK:
            raise DataError(
                f'"{file}" is cut off at byte {position}, or is no tar file; make or copy it again.'
            )
        if not block.strip(b"\0"):
            return
        try:
            header = _parse_header(block, known)
            data, size = position + BLOCK, 0 if header.kind == FOLDER else header.size
            if data + size > stop:
                raise ValueError(f'"{_text(header.name)}" claims {size} bytes, more than there are')
            extra = _read_preamble(fd, header, data) if header.kind in PREAMBLES else None
        except ValueError as error:
            raise DataError(
                f'"{file}" is no uncompressed tar file, or damaged at byte {position}: {error}.'
            ) from error
        position = data + -(-size // BLOCK) * BLOCK
        if extra is not None:
            known |= extra
            continue
        known = {}
        name = _safe_name(file, header)
        if header.kind != FOLDER and not name.endswith("/"):
            yield Member(name, data, size)


def _parse_header(block: bytes, known: dict[bytes, bytes]) -> _Header:
    """Read a block of 512 bytes; `known` is what came before it and overrides it.

    Raises:
        ValueError: it is not a header.
    """
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(block[148:156]):
        raise ValueError("the header does not match its checksum")
    name, kind, size = block[:100].split(b"\0", 1)[0], block[156:157], _number(block[124:136])
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    if kind in PREAMBLES:
        return _Header(name, kind, size)
    return _Header(
        known.get(b"path", name), kind, _number(known[b"size"]) if b"size" in known else size
    )


def _number(field: bytes) -> int:
    """Octal digits, or a binary number marked by the highest bit."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.strip(b" \0")
    if digits and not digits.isdigit():
        raise ValueError(f"{digits!r} is not a number")
    return int(digits or b"0", 8)


def _read_preamble(fd: int, header: _Header, offset: int) -> dict[bytes, bytes]:
    """What an extended header says about the file after it."""
    if header.kind in (
        LONG_LINK,
        GLOBAL,
    ):  # links are refused anyway; a global header holds comments
        return {}
    if header.size > MAX_NAME_BYTES:
        raise ValueError(f"an extended header claims {header.size} bytes")
    data = os.pread(fd, header.size, offset)
    if header.kind == LONG_NAME:
        return {b"path": data.split(b"\0", 1)[0]}
    found = {}
    while data:
        length = int(
            data.partition(b" ")[0]
        )  # of the record "LENGTH NAME=VALUE" and the end of its line
        name, _, value = data[:length].partition(b" ")[2].removesuffix(b"\n").partition(b"=")
        if not 5 <= length <= len(data) or name.startswith(b"GNU.sparse"):
            raise ValueError("an extended header is damaged, or describes a sparse file")
        found[name], data = value, data[length:]
    if b"size" in found:
        found[b"size"] = b"%o" % int(found[b"size"])  # decimal here, octal in headers
    return found


def _safe_name(file: str, header: _Header) -> str:
    """The name of a file or folder. Raises DataError for anything that could lead out of a folder
    it is put into.
    """
    name, wrong = _text(header.name), None
    if header.kind in LINKS:
        wrong = "is a link"
    elif header.kind not in FILES and header.kind != FOLDER:
        wrong = f"is a special file of kind {header.kind!r}"
    elif not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        wrong = "is not a path inside the archive"
    if wrong:
        raise DataError(
            f'"{name}" in "{file}" {wrong}; such archives are refused, make one of plain files.'
        )
    return name


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
