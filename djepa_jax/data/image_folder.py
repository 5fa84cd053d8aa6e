"""Images or animations in one folder per class, or in a folder alone."""

import importlib.util
import os
import pathlib
import stat
from collections import Counter
from collections.abc import Iterable

import numpy as np

from djepa_jax.config.class_names import in_order
from djepa_jax.data.images import (
    CLIP_ENDINGS,
    CLIPS,
    ENDINGS,
    FORMATS,
    MP4,
    NO_MP4,
    BrokenImage,
    is_image,
)
from djepa_jax.data.records import MAX_FILE_BYTES, NO_ENDING, DataError, checksum, counted

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# What systems and cameras leave beside pictures, thumbnails among it; hidden names are besides.
FOREIGN = {"@eadir", "__macosx", "@recycle", "#recycle", "$recycle.bin", "#snapshot", "lost+found"}
FOREIGN |= {"system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}


class FolderRecords:
    """Image files below a folder.

    Args:
        root: the folder.
        folders: those of the classes inside it; one "" where all images are of one class.
        files: the paths of each class, relative to `root`.
        left_out: how many files are no images, by the ends of their names.
    """

    remedy = "write an empty file in its place, which counts as a broken image"

    def __init__(
        self, root: pathlib.Path, folders: list[str], files: list[list[str]], left_out: Counter
    ):
        self.root, self._folders, self.left_out = root, folders, left_out
        # Names go into texts, which bytes that are no Unicode could not.
        names = (os.fsencode(folder or root.resolve().name) for folder in folders)
        self.class_names = tuple(name.decode(errors="backslashreplace") for name in names)
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
            if not (self.root / self._folders[self.labels[index]]).is_dir():
                raise  # it is the disk that is gone
            raise BrokenImage("there is no such file any more") from error

    def key(self, index: int) -> str:
        """The path inside the folder."""
        return os.fsdecode(self._paths[index])

    def digest(self) -> str:
        """A checksum of paths and classes; looking at every file would take as long as reading."""
        return checksum(self._paths, self.labels, *self._folders)


def open_folder(path: str, where: str, clips: bool = False) -> FolderRecords:
    """All images of a folder that holds one folder per class, whose names in order give the labels.

    Without folders in it, its own images are those of one class. Images may lie in folders inside
    those of their class. What counts as one is said by its ending, or else by its content. Hidden
    files and folders are left out; links to folders are followed for classes only.
    With `clips` these are files of formats that hold animations, mp4 among them.
    """
    root, left_out = pathlib.Path(path), Counter()
    formats, endings = (CLIPS, CLIP_ENDINGS) if clips else (FORMATS, ENDINGS)
    try:
        entries = _own([entry.name for entry in root.iterdir()], left_out)
        folders = in_order(name for name in entries if (root / name).is_dir())
        if folders:
            beside = _images(root, set(entries) - set(folders), Counter(), endings)
            left_out.update({"beside the folders of classes": len(beside)})
        files = [_find_images(root, name, left_out, endings) for name in folders or [""]]
    except OSError as error:
        raise DataError(
            f"{where} cannot be searched: {error}; name a folder that holds a folder of images per "
            "class."
        ) from error
    left_out = +left_out
    there = f" ({counted(left_out)})" if left_out else ""
    if folders and SPLITS.issuperset(name.lower() for name in folders):
        raise DataError(
            f"{where} holds {', '.join(folders)}, which are no classes; name a folder that holds a "
            "folder of images per class."
        )
    if not folders and not files[0]:
        raise DataError(
            f"{where} holds no folders and no images of {', '.join(formats)}{there}; name a folder "
            "of images, or one that holds a folder of images per class."
        )
    empty = [name for name, paths in zip(folders, files, strict=False) if not paths]
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(folders)} folders in {where} hold no images of "
            f'{", ".join(formats)}, such as "{empty[0]}"{there}; every folder there is a class: '
            "fill or remove them."
        )
    videos = [name for paths in files for name in paths if name.lower().endswith(MP4)]
    if videos and importlib.util.find_spec("av") is None:
        raise DataError(f'{where} holds {len(videos)} mp4 files, such as "{videos[0]}"; {NO_MP4}.')
    return FolderRecords(root, folders or [""], files, left_out)


def _find_images(root: pathlib.Path, folder: str, left_out: Counter, endings) -> list[str]:
    """Sorted paths of the images below a folder in `root`, relative to `root`."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for parent, folders, files in os.walk(root / folder, onerror=fail):
        folders[:] = _own(folders, left_out)
        inner, names = os.path.relpath(parent, root), _images(parent, files, left_out, endings)
        found += (os.path.normpath(os.path.join(inner, name)) for name in names)
    return sorted(found)


def _own(names: list[str], left_out: Counter) -> list[str]:
    """The names that people gave."""
    left_out.update(name for name in names if name.lower() in FOREIGN)
    return [name for name in names if name[0] != "." and name.lower() not in FOREIGN]


def _images(parent: str | os.PathLike, files: Iterable[str], left_out, endings) -> list[str]:
    """Which files in a folder are images; the others are counted."""
    images = []
    for name in _own(list(files), left_out):
        ending = os.path.splitext(name)[1].lower()
        if ending in endings or _has_image(os.path.join(parent, name), ending):
            images.append(name)
        else:
            left_out[ending or NO_ENDING] += 1
    return images


def _has_image(path: str, ending: str) -> bool:
    # cameras write a thumbnail for each film; opening a pipe would wait for ever
    if ending == ".thm" or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return is_image(file, ending)
