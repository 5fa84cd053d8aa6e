"""Data sources: objects with a length that give `{"image": array, "label": int}` by index."""

import pathlib
import zipfile
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Random access to labelled examples."""

    def __len__(self) -> int:
        """How many examples."""

    def __getitem__(self, index: int) -> dict:
        """Example `index`."""


class ArraySource:
    """A source over arrays in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": np.int32(self.labels[index])}


def load_digits() -> ArraySource:
    """The 1,797 handwritten 8 x 8 digits that ship inside scikit-learn, 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits as load  # a second of import that other sources do not need

    digits = load()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # [1797, 8, 8, 1]
    return ArraySource(images, digits.target)


def load_npz(path: str) -> ArraySource:
    """Arrays `images` (or `latents`) and `labels` of an npz file; images without a channel axis get one.

    Raises:
        ValueError: the file is missing, is not an npz file, or lacks a usable array.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f'data.path is "{path}", where there is no file; name an npz file with arrays "images" and "labels".')
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["latents" if "latents" in arrays else "images"], arrays["labels"]
    except (KeyError, IndexError, TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'data.path "{path}" is not an npz file with arrays "images" (or "latents") and "labels": {error}'
        ) from error
    _check_arrays(path, images, labels)
    return ArraySource(images if images.ndim == 4 else images[..., None], labels)


def _check_arrays(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim not in (3, 4) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f'"{path}" holds {images.dtype} images of shape {images.shape} and {labels.dtype} labels of shape {labels.shape}; '
            "it needs images [n, H, W, C] and one whole number per image as labels [n]."
        )
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f'"{path}" holds {len(images)} images and {len(labels)} labels; it needs as many of one as of the other.'
        )
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise ValueError(f'"{path}" holds values that are not finite; find and remove those examples.')


def open_source(name: str, path: str, modality, num_classes: int) -> Source:
    """The source called `name`, checked against the modality and the number of classes.

    Raises:
        ValueError: unknown name, missing data, examples of another shape, labels out of range.
    """
    if name not in SOURCES:
        raise ValueError(f'data.source is "{name}"; it must be one of {", ".join(sorted(SOURCES))}.')
    source = SOURCES[name](path)
    modality.check_example(source[0]["image"])
    for label in (int(source.labels.min()), int(source.labels.max())):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"the data holds class {label}, data.num_classes is {num_classes}; labels run from 0 to num_classes - 1."
            )
    return source


SOURCES = {"digits": lambda path: load_digits(), "npz": load_npz}
