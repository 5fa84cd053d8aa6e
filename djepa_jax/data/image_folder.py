"""Images in one folder per class."""

import os
import pathlib
import stat

import numpy as np

from djepa_jax.data.images import BrokenImage
from djepa_jax.data.records import MAX_FILE_BYTES, DataError, checksum

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FolderRecords:
    """Image files below a folder; `files` holds the paths of each class, relative to `root`."""

    remedy = "write an empty file in its place, which counts as a broken image"

    def __init__(self, root: pathlib.Path, class_names: list[str], files: list[list[str]]):
        self.root, self.class_names = root, tuple(class_names)
        # One array of bytes takes memory as a million strings would not.
        self._paths = np.array([os.fsencode(path) for paths in files for path in paths])
        counts = [len(paths) for paths in files]
        self.labels = np.repeat(np.arange(len(files), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path = self.root / self.key(index)
        try:
            status = path.stat()
            # reading a pipe would wait for ever
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
                raise BrokenImage(f"it is no file of at most {MAX_FILE_BYTES} bytes")
            return path.read_bytes(), int(self.labels[index])
        except (FileNotFoundError, NotADirectoryError) as error:
            if not (self.root / self.class_names[self.labels[index]]).is_dir():
                raise  # it is the disk that is gone
            raise BrokenImage("there is no such file any more") from error

    def key(self, index: int) -> str:
        """The path inside the folder."""
        return os.fsdecode(self._paths[index])

    def digest(self) -> str:
        """A checksum of paths and classes; looking at every file would take as long as reading."""
        return checksum(self._paths, self.labels, *self.class_names)


def open_folder(path: str, where: str) -> FolderRecords:
    """All images of a folder that holds one folder per class; their sorted names give the labels.

    Images may lie in folders inside those of their class. Hidden files and folders are left out;
    links to folders are followed for classes only.
    """
    root = pathlib.Path(path)
    try:
        entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        names = sorted(entry.name for entry in entries if entry.is_dir())
        files = [_find_images(root, name) for name in names]
    except OSError as error:
        raise DataError(
            f"{where} cannot be searched: {error}; name a folder that holds a folder of images per "
            "class."
        ) from error
    if not names or SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f"{where} holds {', '.join(names) or 'no folders'}, which are no classes; name a "
            "folder that holds a folder of images per class."
        )
    empty = [name for name, paths in zip(names, files, strict=True) if not paths]
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(names)} folders in {where} hold no images "
            f'({", ".join(SUFFIXES)}), such as "{empty[0]}"; every folder there is a class: fill '
            "or remove them."
        )
    return FolderRecords(root, names, files)


def _find_images(root: pathlib.Path, class_name: str) -> list[str]:
    """Sorted paths of the images of a class, relative to `root`."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, files in os.walk(root / class_name, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [os.path.join(os.path.relpath(folder, root), name) for name in files]
        found += [path for path in paths if path.lower().endswith(SUFFIXES)]
    return sorted(path for path in found if not os.path.basename(path).startswith("."))
