"""Images in files as a source: decoding, cropping, and going on when some of them are broken."""

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from djepa_jax.config.class_names import IMAGENET, imagenet
from djepa_jax.data.images import BrokenImage, center_crop, decode_image, to_channels

MAX_PIXELS = 2**26  # of one image: 8192 x 8192, which decodes into 200 MB
MAX_BROKEN = 100  # images of a data set, before something more must be wrong than a few images
MAX_FILE_BYTES = 2**28  # of one image file
ANY_CLASS = 2**31 - 1  # the number of classes where labels do not matter
SHOWN = 3  # broken images or classes in an error message
WAITS = (0.1, 0.5, 2.0)  # seconds before each further attempt at a file that could not be read

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used; the message says what, where, and what to do."""


class Records(Protocol):
    """Random access to encoded images with labels; must pickle, and be readable from several
    threads.
    """

    labels: np.ndarray | None
    """All labels `[n]`, where they are known without reading the images."""

    class_names: tuple[str, ...] | None
    """Names in the order of the labels, where they are known."""

    remedy: str
    """What to do about an image that stays unreadable."""

    def __len__(self) -> int:
        """How many images."""

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """An image file and its label.

        Raises:
            BrokenImage: it is absent, or no file that could hold an image.
            OSError: it cannot be read, which may pass.
        """

    def key(self, index: int) -> str:
        """What an image is called in messages."""

    def digest(self) -> str:
        """A checksum of what is there: names, and what is cheap to know besides; not of where it
        lies.
        """


def checksum(*parts: str | np.ndarray) -> str:
    """The sha256 of texts and arrays, one after the other with their sizes."""
    digest = hashlib.sha256()
    for part in parts:
        array = (
            np.frombuffer(part.encode(errors="surrogateescape"), np.uint8)
            if isinstance(part, str)
            else part
        )
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


class ImageSource:
    """A source over `Records`: every example is decoded, cropped to a square and given its
    channels.

    Args:
        records: the encoded images.
        shape: `(size, size, channels)` of an example, with 1 or 3 channels.
        num_classes: labels must be below.
        max_pixels: images of more count as broken.
    """

    def __init__(
        self, records: Records, shape: Sequence[int], num_classes: int, max_pixels: int = MAX_PIXELS
    ):
        self.records, self.num_classes, self.max_pixels = records, num_classes, max_pixels
        self.size, _, self.channels = shape

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """Example `index`.

        Raises:
            BrokenImage: there is no image, or none that can be decoded.
            DataError: it could not be read, even after some time, or its label is out of range.
        """
        data, label = self._read(index)
        if not 0 <= label < self.num_classes:
            raise label_error(f"{self.key(index)} is of", label, self.num_classes)
        pixels = center_crop(decode_image(data, self.max_pixels), self.size)
        return {"example": to_channels(pixels, self.channels), "condition": np.int32(label)}

    def _read(self, index: int) -> tuple[bytes, int]:
        """An image file and its label. Storage that fails says nothing about the image, so it is
        asked again.
        """
        for wait in (*WAITS, None):
            try:
                return self.records[index]
            except OSError as error:
                reason = error.strerror or str(error)
                if wait is None:
                    raise DataError(
                        f"{self.key(index)} cannot be read ({reason}), after {len(WAITS) + 1} "
                        "attempts; nothing was left out "
                        "for it. Run the same command again once its storage answers; if it "
                        f"stays so, {self.records.remedy}."
                    ) from error
            logger.warning(
                "%s cannot be read (%s); trying again in %s s", self.key(index), reason, wait
            )
            time.sleep(wait)

    def digest(self) -> str:
        """A checksum of what is there."""
        return self.records.digest()

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

    Which image that is depends on the index alone, so the order of examples stays a function of the
    seed. Broken images are logged once and counted, in each process for itself.

    Args:
        source: the images.
        max_broken: one more broken image than this is an error.
        limit: what the setting of `max_broken` is called.
    """

    def __init__(
        self, source: ImageSource, max_broken: int = MAX_BROKEN, limit: str = "data.max_broken"
    ):
        self.source, self.max_broken, self._limit = source, max_broken, limit
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
        logger.warning(
            "skipping %s: %s (broken image %d, %d allowed)",
            self.key(position),
            reason,
            count,
            self.max_broken,
        )

    def _error(self) -> DataError:
        broken = self.broken
        shown = "; ".join(f"{key}: {reason}" for key, reason in list(broken.items())[:SHOWN])
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        return DataError(
            f"{len(broken)} of {len(self)} images cannot be read, {self.max_broken} are allowed: "
            f"{shown}{more}. "
            f"Repair or remove them, or raise {self._limit}."
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


class Renumbered:
    """`Records` whose classes have other numbers.

    Args:
        records: the images.
        numbers: `[k]`, for every class of `records` its number here.
        class_names: in the order of the new numbers.
    """

    def __init__(self, records: Records, numbers: np.ndarray, class_names: tuple[str, ...]):
        self.records, self.numbers, self.class_names, self.remedy = (
            records,
            numbers,
            class_names,
            records.remedy,
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        data, label = self.records[index]
        if not 0 <= label < len(self.numbers):
            raise DataError(
                f"{self.key(index)} is of class {label}, but only classes 0 to "
                f"{len(self.numbers) - 1} have a name."
            )
        return data, int(self.numbers[label])

    @property
    def labels(self) -> np.ndarray | None:
        """All labels `[n]`, where those of `records` are known."""
        return None if self.records.labels is None else self.numbers[self.records.labels]

    def key(self, index: int) -> str:
        """What an image is called in messages."""
        return self.records.key(index)

    def digest(self) -> str:
        """A checksum of the images and of their new numbers."""
        return checksum(self.records.digest(), self.numbers)


def match_classes(
    records: Records, num_classes: int, names: str | Sequence[str], where: str
) -> Records:
    """The records with their labels as the config counts classes.

    Where classes have names, those must fit: with the ImageNet names they must be WordNet ids,
    which say what they are, so that some may be absent; otherwise there must be `num_classes` of
    them.

    Args:
        records: the images.
        num_classes: `data.num_classes`, or `ANY_CLASS`.
        names: `data.class_names`.
        where: the data lies, for messages.

    Raises:
        DataError: classes that do not fit.
    """
    own = records.class_names
    if own is None or num_classes == ANY_CLASS:
        return records
    if names == IMAGENET:
        return _by_wordnet_id(records, where)
    if len(own) != num_classes:
        remedy = (
            f"set --config.data.num_classes={len(own)}, or "
            f"{'remove' if len(own) > num_classes else 'add'} classes"
        )
        raise DataError(
            f"{where} holds {len(own)} classes ({_shown(own)}), data.num_classes is "
            f"{num_classes}; {remedy}."
        )
    return records


def _by_wordnet_id(records: Records, where: str) -> Records:
    """Records with the labels of ImageNet. Raises DataError for classes that are not called by
    WordNet ids.
    """
    known = {wnid: number for number, (wnid, _) in enumerate(imagenet())}
    own = records.class_names
    foreign = next((name for name in own if name not in known), None)
    if foreign is not None:
        raise DataError(
            f'data.class_names is "{IMAGENET}", but {where} holds the class "{foreign}", which is '
            "not the WordNet id of one of "
            "ImageNet's 1000 classes, such as n01440764; remove it, or, for classes of your own, "
            "set "
            f"--config.data.num_classes={len(own)} --config.data.class_names="
        )
    numbers = np.array([known[name] for name in own], np.int32)
    return records if own == tuple(known) else Renumbered(records, numbers, tuple(known))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def check_labels(labels: Sequence[int] | np.ndarray | None, num_classes: int) -> None:
    """Raise DataError for labels out of range."""
    if labels is None:
        return
    for label in (int(np.min(labels)), int(np.max(labels))):
        if not 0 <= label < num_classes:
            raise label_error("the data holds", label, num_classes)


def label_error(what: str, label: int, num_classes: int) -> DataError:
    """The error for a label out of range; `what` comes before "class N"."""
    return DataError(
        f"{what} class {label}, data.num_classes is {num_classes}; labels run from 0 to "
        "num_classes - 1."
    )
