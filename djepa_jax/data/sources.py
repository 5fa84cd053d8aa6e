"""Data sources: objects with a length that give `{"example": array, "condition": value}` by index.

- digits: the handwritten digits inside scikit-learn
- npz: arrays in a file
- synthetic: noise (for latents, moments of it), for trying a configuration without data
- folder: image files, a folder per class
- tar: image files in tar files, as webdataset writes them
- tfds: a data set prepared by TensorFlow Datasets
- latents: a latent cache
"""

import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from djepa_jax.data.arrays import read_npz
from djepa_jax.data.image_folder import open_folder
from djepa_jax.data.latent_cache import DTYPES, LatentCache, check_cache, read_metadata
from djepa_jax.data.records import (
    ANY_CLASS,
    MAX_BROKEN,
    MAX_PIXELS,
    DataError,
    ImageSource,
    Robust,
    check_labels,
    checksum,
    match_classes,
)
from djepa_jax.data.tfds import open_tfds
from djepa_jax.data.webdataset import open_tars
from djepa_jax.runtime.staging import local_source, reachable


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
        return {"example": self.images[index], "condition": np.int32(self.labels[index])}

    def digest(self) -> str:
        """A checksum of all images and labels."""
        return checksum(self.images, self.labels)


def load_digits() -> ArraySource:
    """The 1,797 handwritten 8 x 8 digits that ship inside scikit-learn, 0..16 spread over
    0..255.
    """
    from sklearn.datasets import (
        load_digits as load,
    )  # a second of import that other sources do not need

    digits = load()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # [1797, 8, 8, 1]
    return ArraySource(images, digits.target)


def load_npz(path: str, key: str = "data.path") -> ArraySource:
    """Arrays `images` (or `latents`) and `labels` of an npz file; images without a channel axis get
    one.

    Args:
        path: the file.
        key: what its setting is called.

    Raises:
        ValueError: the file is missing, is not an npz file, or lacks a usable array.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(
            f'{key} is "{path}", where there is no file; name an npz file with arrays "images" '
            'and "labels".'
        )
    try:
        images, labels = read_npz(file, ("latents", "images"), ("labels",))
    # damaged files make zip, its compressors and numpy fail in ways that nobody has listed
    except Exception as error:
        raise ValueError(
            f'{key} "{path}" is not an npz file with arrays "images" (or "latents") and "labels": '
            f"{error}"
        ) from error
    _check_arrays(path, images, labels)
    return ArraySource(images if images.ndim == 4 else images[..., None], labels)


def _check_arrays(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    if images.ndim not in (3, 4) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f'"{path}" holds {images.dtype} images of shape {images.shape} and {labels.dtype} '
            f"labels of shape {labels.shape}; "
            "it needs images [n, H, W, C] and one whole number per image as labels [n]."
        )
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f'"{path}" holds {len(images)} images and {len(labels)} labels; it needs as many of '
            "one as of the other."
        )
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise ValueError(
            f'"{path}" holds values that are not finite; find and remove those examples.'
        )


def open_source(
    name: str,
    path: str,
    modality,
    num_classes: int,
    *,
    class_names: str | Sequence[str] = "",
    max_pixels: int = MAX_PIXELS,
    max_broken: int = MAX_BROKEN,
    group: str = "data",
    staging: str = "",
) -> Source:
    """The source called `name`, checked against the modality and the number of classes.

    Args:
        name: one of `SOURCES`.
        path: where its data is; what can be written is told by the function that reads it.
        modality: tells what examples must look like; images in files are cropped to that.
        num_classes: labels run from 0 to one less; `ANY_CLASS` where they do not matter.
        class_names: as `config.data.class_names`; must fit the names of the data's classes, if
            those have some.
        max_pixels: image files of more count as broken.
        max_broken: broken image files that may be skipped.
        group: where in the config the settings are, for messages.
        staging: as `config.data.staging`.

    Raises:
        ValueError: unknown name, missing data, examples of another shape, classes that do not fit,
            too many broken images.
    """
    if name not in SOURCES:
        raise ValueError(
            f'{group}.source is "{name}"; it must be one of {", ".join(sorted(SOURCES))}.'
        )
    _check_path(name, path, group)
    path = local_source(name, path, staging, group)
    if name == "synthetic":
        source = Synthetic(modality, num_classes)
    elif name in ARRAY_SOURCES:
        source = ARRAY_SOURCES[name](path, f"{group}.path")
    else:
        _check_image_modality(name, modality)
        records = FILE_SOURCES[name](path, f"{group}.path")
        records = match_classes(records, num_classes, class_names, f'{group}.path "{path}"')
        check_labels(records.labels, num_classes)  # before an image of a wrong class is met
        images = ImageSource(records, modality.example_shape, num_classes, max_pixels)
        source = Robust(images, max_broken, f"{group}.max_broken")
    modality.check_example(source[0]["example"])
    check_labels(source.labels, num_classes)
    return source


def _check_path(name: str, path: str, group: str) -> None:
    """Raise DataError if a source has no path but needs one."""
    if path or name in PATHLESS:
        return
    make = ""
    if name == "latents":
        make = (
            "; make one with --mode=prepare --workdir=CACHE --config.prepare.path=IMAGES "
            "--config.autoencoder.path=WEIGHTS, or "
            "of ImageNet's archives with launch/prepare_imagenet.sh"
        )
    raise DataError(
        f'{group}.path is empty, and {group}.source is "{name}"; name {WHAT[name]} with '
        f"--config.{group}.path=PATH{make}."
    )


def _check_image_modality(name: str, modality) -> None:
    """Raise DataError unless examples are to be square uint8 images with 1 or 3 channels."""
    height, width, channels = modality.example_shape
    if modality.example_dtype != np.uint8 or height != width or channels not in (1, 3):
        raise DataError(
            f'data.source "{name}" gives square uint8 images with 1 or 3 channels, the config '
            "expects "
            f"{modality.example_dtype} examples of shape {(height, width, channels)}; choose "
            "another data.modality or "
            'data.channels, or data.source "npz".'
        )


def open_data(config, modality) -> Source:
    """The source that `config.data` names, checked against all of it.

    Raises:
        ValueError: as `open_source`; DataError: a latent cache that was made for another config.
    """
    data = config.data
    if data.source == "latents":
        _check_path(data.source, data.path, "data")
        check_cache(
            read_metadata(reachable(data.path)), data
        )  # names every difference, where an array tells of one
    num_classes = ANY_CLASS if data.unconditional else data.num_classes
    path = local_source(data.source, data.path, data.staging)
    names = data.class_names
    if data.source == "latents":
        check_cache(
            read_metadata(pathlib.Path(path)), data
        )  # of the copy, should the bucket's have changed since
    source = open_source(
        data.source, path, modality, num_classes, class_names=names, max_broken=data.max_broken
    )
    if data.random_flip and data.modality == "image_latents" and "mirror" not in source[0]:
        raise DataError(
            f'data.random_flip is True, but data.path "{data.path}" holds latents without those '
            "of the mirror images, which "
            "only an autoencoder can make; set --config.data.random_flip=False, or use a cache "
            "that --mode=prepare made."
        )
    return Unlabelled(source) if data.unconditional else source


class Unlabelled:
    """A source whose examples all count to class 0."""

    labels = np.zeros(1, np.int64)

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return {**self.source[index], "condition": np.int32(0)}

    def key(self, index: int) -> str:
        """What an image is called in messages."""
        return self.source.key(index)

    def digest(self) -> str:
        """A checksum of what is there."""
        return self.source.digest()


class Synthetic:
    """Made-up examples, noise around a value of their class, for trying a configuration without
    data.

    Latents come as a cache has them: moments, of which training draws a sample, and those of a
    mirror image.
    """

    def __init__(self, modality, num_classes: int, count: int = 512):
        self.shape, self.dtype, self.num_classes, self.count = (
            modality.example_shape,
            modality.example_dtype,
            num_classes,
            count,
        )
        self.labels = np.arange(count) % num_classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        """Example `index`, a function of it alone."""
        rng, label = np.random.default_rng(index), index % self.num_classes
        values = rng.standard_normal(self.shape) + np.sin(1 + label)
        if self.dtype == np.uint8:
            return {
                "example": np.clip(128 + 40 * values, 0, 255).astype(np.uint8),
                "condition": np.int32(label),
            }
        maps = {"example": values, "mirror": values[:, ::-1]}
        return {name: synthetic_moments(mean) for name, mean in maps.items()} | {
            "condition": np.int32(label)
        }


def synthetic_moments(mean: np.ndarray) -> np.ndarray:
    """Means and log variances `[h, w, 2c]` of a made-up posterior around `mean`, in the type of a
    cache.
    """
    return np.concatenate([mean, np.full(mean.shape, -2.0)], axis=-1).astype(DTYPES["bfloat16"])


ARRAY_SOURCES = {
    "digits": lambda path, key: load_digits(),
    "npz": load_npz,
    "latents": lambda path, key: LatentCache(path),
}
FILE_SOURCES = {"folder": open_folder, "tar": open_tars, "tfds": open_tfds}
SOURCES = {"synthetic", *ARRAY_SOURCES, *FILE_SOURCES}
PATHLESS = {"synthetic", "digits"}
WHAT = {  # the path of a source names
    "latents": "a latent cache",
    "npz": "an npz file",
    "folder": "a folder that holds a folder of images per class",
    "tar": "tar files",
    "tfds": "a data set that TensorFlow Datasets has prepared",
}
