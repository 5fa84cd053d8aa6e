"""Images in one folder per class."""

import os
import pathlib
import stat

import numpy as np

from djepa_jax.data.images import BrokenImage
from djepa_jax.data.records import MAX_FILE_BYTES, DataError, checksum

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
)  # in lower or upper case
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class FolderRecords:
    """Image files below a folder.

    Args:
        root: the folder.
        class_names: the folders in it, in the order of their labels.
        files: for each of them the paths of its images, relative to `root`.
    """

    remedy = "write an empty file in its place, which counts as a broken image"

    def __init__(self, root: pathlib.Path, class_names: list[str], files: list[list[str]]):
        self.root, self.class_names = root, tuple(class_names)
        # One array of bytes pickles and takes memory as a million strings would not.
        self._paths = np.array([os.fsencode(path) for paths in files for path in paths])
        self.labels = np.repeat(
            np.arange(len(files), dtype=np.int32), [len(paths) for paths in files]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path = self.root / self.key(index)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                raise BrokenImage("it is not a file")
            if status.st_size > MAX_FILE_BYTES:
                raise BrokenImage(
                    f"the file has {status.st_size} bytes, the limit is {MAX_FILE_BYTES}"
                )
            return path.read_bytes(), int(self.labels[index])
        except (FileNotFoundError, NotADirectoryError) as error:
            if not (
                self.root / self.class_names[self.labels[index]]
            ).is_dir():  # it is the disk that is gone
                raise
            raise BrokenImage("there is no such file any more") from error

    def key(self, index: int) -> str:
        """The path inside the folder."""
        return os.fsdecode(self._paths[index])

    def digest(self) -> str:
        """A checksum of the paths and classes; looking at every file would take as long as reading
        them.
        """
        return checksum(self._paths, self.labels, *self.class_names)


def open_folder(path: str, key: str = "data.path") -> FolderRecords:
    """All images of a folder that holds one folder per class; their sorted names give the labels.

    Images may lie in folders inside those of their class. Hidden files and folders are left out;
    links to folders are followed for classes only.

    Args:
        path: the folder.
        key: what its setting is called.

    Raises:
        DataError: no such folder, no class folders in it, or one without images.
    """
    root = pathlib.Path(path).expanduser()
    if not path or not root.is_dir():
        raise DataError(
            f'{key} is "{path}", where there is no folder; name one that holds a folder of images '
            "per class."
        )
    try:
        names = sorted(
            entry.name
            for entry in os.scandir(root)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        _check_names(path, key, names)
        files = [_find_images(root, name) for name in names]
    except OSError as error:
        raise DataError(
            f'{key} "{path}" cannot be searched: {error}; correct its permissions.'
        ) from error
    empty = [name for name, paths in zip(names, files, strict=True) if not paths]
    if empty:
        raise DataError(
            f'{len(empty)} of the {len(names)} folders in {key} "{path}" hold no images '
            f"({', '.join(SUFFIXES)}), "
            f'such as "{empty[0]}"; every folder there is a class: fill or remove them.'
        )
    return FolderRecords(root, names, files)


def _check_names(path: str, key: str, names: list[str]) -> None:
    if not names:
        raise DataError(
            f'{key} "{path}" holds no folders; put the images of each class into a folder of its '
            "own there."
        )
    if SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f'{key} "{path}" holds {", ".join(names)}, which are splits and not classes; '
            f'name one of them, such as "{pathlib.Path(path) / names[0]}".'
        )


def _find_images(root: pathlib.Path, class_name: str) -> list[str]:
    """Sorted paths of the images of a class, relative to `root`."""
    found = []
    for folder, folders, files in os.walk(root / class_name, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [
            name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
        prefix = os.path.relpath(folder, root)
        found += [os.path.join(prefix, name) for name in images]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
