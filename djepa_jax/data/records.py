"""Images in files as a source: decoding, cropping, and going on when some of them are broken."""

import logging
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from djepa_jax.data.images import BrokenImage, center_crop, decode_image, to_channels

MAX_PIXELS = 2**26  # of one image: 8192 x 8192, which decodes into 200 MB
MAX_BROKEN = 100  # images of a data set, before something more must be wrong than a few images
MAX_FILE_BYTES = 2**28  # of one image file
SHOWN = 3  # broken images in an error message

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used; the message says what, where, and what to do."""


class Records(Protocol):
    """Random access to encoded images with labels; must pickle, and be readable from several threads."""

    labels: np.ndarray | None
    """All labels `[n]`, where they are known without reading the images."""

    class_names: tuple[str, ...] | None
    """Names in the order of the labels, where they are known."""

    def __len__(self) -> int:
        """How many images."""

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """An image file and its label. Raises BrokenImage if it cannot be read."""

    def key(self, index: int) -> str:
        """What an image is called in messages."""


class ImageSource:
    """A source over `Records`: every example is decoded, cropped to a square and given its channels.

    Args:
        records: the encoded images.
        shape: `(size, size, channels)` of an example, with 1 or 3 channels.
        num_classes: labels must be below.
        max_pixels: images of more count as broken.
    """

    def __init__(self, records: Records, shape: Sequence[int], num_classes: int, max_pixels: int = MAX_PIXELS):
        self.records, self.num_classes, self.max_pixels = records, num_classes, max_pixels
        self.size, _, self.channels = shape

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        data, label = self.records[index]
        if not 0 <= label < self.num_classes:
            raise label_error(f"{self.key(index)} is of", label, self.num_classes)
        pixels = center_crop(decode_image(data, self.max_pixels), self.size)
        return {"image": to_channels(pixels, self.channels), "label": np.int32(label)}

    @property
    def labels(self) -> np.ndarray | None:
        """All labels `[n]`, or None where reading them means reading the images."""
        return self.records.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in the order of the labels, or None."""
        return self.records.class_names

    def key(self, index: int) -> str:
        """What an image is called in messages."""
        return self.records.key(index)


class Robust:
    """An `ImageSource` that gives the next readable image in the place of a broken one.

    Which image that is depends on the index alone, so the order of examples stays a function of the seed. Broken
    images are logged once and counted, in each process for itself.

    Args:
        source: the images.
        max_broken: one more broken image than this is an error.
    """

    def __init__(self, source: ImageSource, max_broken: int = MAX_BROKEN):
        self.source, self.max_broken = source, max_broken
        self._broken: dict[int, str] = {}  # why, by index
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """Example `index`, or the next one that can be read.

        Raises:
            DataError: too many images are broken, or all.
        """
        start = range(len(self))[index]  # an IndexError beyond the end, where iteration stops
        for position in range(start, start + len(self)):
            position %= len(self)
            if position in self._broken:
                continue
            try:
                return self.source[position]
            except BrokenImage as error:
                self._remember(position, str(error))
        raise self._error()

    def _remember(self, position: int, reason: str) -> None:
        with self._lock:
            if position in self._broken:
                return
            self._broken[position] = reason
            count = len(self._broken)
        if count > self.max_broken:
            raise self._error()
        logger.warning("skipping %s: %s (broken image %d, %d allowed)", self.key(position), reason, count, self.max_broken)

    def _error(self) -> DataError:
        broken = self.broken
        shown = "; ".join(f"{key}: {reason}" for key, reason in list(broken.items())[:SHOWN])
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        return DataError(
            f"{len(broken)} of {len(self)} images cannot be read, {self.max_broken} are allowed: {shown}{more}. "
            "Repair or remove them, or raise max_broken."
        )

    @property
    def broken(self) -> dict[str, str]:
        """Why images were skipped so far, by their key."""
        with self._lock:
            found = dict(self._broken)
        return {self.key(position): reason for position, reason in found.items()}

    @property
    def labels(self) -> np.ndarray | None:
        """All labels `[n]`, those of broken images too, or None."""
        return self.source.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in the order of the labels, or None."""
        return self.source.class_names

    def key(self, index: int) -> str:
        """What an image is called in messages."""
        return self.source.key(index)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _lock=threading.Lock())


def check_classes(labels: Sequence[int] | np.ndarray | None, class_names: Sequence[str] | None, num_classes: int) -> None:
    """Raise DataError if there are more classes than `num_classes`, or labels out of range."""
    if class_names is not None and len(class_names) > num_classes:
        shown = ", ".join(class_names[:SHOWN]) + (", ..." if len(class_names) > SHOWN else "")
        raise DataError(
            f"the data has {len(class_names)} classes ({shown}), data.num_classes is "
            f"{num_classes}; set it to {len(class_names)}, or remove classes."
        )
    if labels is None:
        return
    for label in (int(np.min(labels)), int(np.max(labels))):
        if not 0 <= label < num_classes:
            raise label_error("the data holds", label, num_classes)


def label_error(what: str, label: int, num_classes: int) -> DataError:
    """The error for a label out of range; `what` comes before "class N"."""
    return DataError(f"{what} class {label}, data.num_classes is {num_classes}; labels run from 0 to num_classes - 1.")
