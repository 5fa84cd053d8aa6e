"""Keeping compiled programs between runs."""

import contextlib
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator

import jax

DEFAULT_SECONDS = 1.0  # of compiling, below which JAX keeps no program unless it is told to
CHECKED_NAME = "checked"  # file whose time is that of the last check
ZSTD = bytes.fromhex("28b52ffd")  # what its data begin with
BLOCK_BYTES = 2**20


def use_compilation_cache(say: Callable[[str], None] = print) -> None:
    """Keep compiled programs in the user's cache folder, one folder per JAX version, unless JAX was
    told where.

    Programs that were cut off, because a process was killed while it wrote them, are removed, and
    `say` is told: JAX would compile them anew at every start, and never replace them.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not jax.config.jax_compilation_cache_dir and os.path.isabs(
        root
    ):  # there are users without a home
        jax.config.update(
            "jax_compilation_cache_dir",
            str(pathlib.Path(root) / "djepa_jax" / f"jax-{jax.__version__}"),
        )
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return
    if jax.config.jax_persistent_cache_min_compile_time_secs == DEFAULT_SECONDS:
        jax.config.update(
            "jax_persistent_cache_min_compile_time_secs", 0.0
        )  # so that going on compiles nothing at all
    if "://" not in folder:
        with contextlib.suppress(OSError):  # a folder that is not there yet, or not to be written
            remove_damaged(pathlib.Path(folder), say)


def remove_damaged(folder: pathlib.Path, say: Callable[[str], None] = print) -> None:
    """Remove what cannot be read of the programs that were written since the last call.

    Raises:
        OSError: the folder is not there, or may not be written.
    """
    checked = folder / CHECKED_NAME
    since = checked.stat().st_mtime_ns if checked.exists() else 0
    checked.write_bytes(
        b""
    )  # before anything is read: what is written meanwhile is looked at the next time
    for path in list(_entries(folder, since)):
        if not _is_whole(path):
            path.unlink(missing_ok=True)
            path.with_name(path.name.removesuffix("-cache") + "-atime").unlink(missing_ok=True)
            say(f"removed {path}, a compiled program that was cut off; it is compiled again")


def _entries(folder: pathlib.Path, since: int) -> Iterator[pathlib.Path]:
    """JAX's files in a folder that were changed at or after a time in nanoseconds."""
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            if path.stat().st_mtime_ns >= since:
                yield path


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a file can be decompressed to its end; True where that cannot be told."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        block = file.read(BLOCK_BYTES)
        decompressor = _decompressor(block)
        if decompressor is None:
            return True
        while block and not decompressor.eof:
            try:
                decompressor.decompress(block)
            except Exception:  # each package has its own
                return False
            block = file.read(BLOCK_BYTES)
        return decompressor.eof
    return True


def _decompressor(start: bytes):
    """What reads data that begin so; None if the package that it takes is not here."""
    if not start.startswith(ZSTD):
        return zlib.decompressobj()
    with contextlib.suppress(ImportError):
        from compression import zstd  # Python 3.14

        return zstd.ZstdDecompressor()
    with contextlib.suppress(ImportError):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj()
    return None
