"""Images in files as a source: decoding, cropping, and going on when some of them are broken."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from absl import logging

from djepa_jax.config.class_names import IMAGENET, imagenet, listed, misplaced, resolve
from djepa_jax.data.images import BrokenImage, center_crop, decode_frames, decode_image
from djepa_jax.runtime.errors import UserError

MAX_PIXELS = 2**26  # of one image: 8192 x 8192, which decodes into 200 MB
MAX_FILE_BYTES = 2**28  # of one image file
ANY_CLASS = 2**31 - 1  # the number of classes where labels do not matter
NO_ENDING = "without an ending"  # what such files are counted as
MAX_LISTED = 12  # kinds of files in a message
SHOWN = 3  # broken images or classes in an error message
WAITS = (0.1, 0.5, 2.0)  # seconds before each further attempt at a file that could not be read


class DataError(UserError, ValueError):
    """Data that cannot be used; the message says what, where, and what to do."""


class Source:
    """Random access to `{"example": array, "condition": number or array}`, from several threads."""

    labels: np.ndarray | None = None  # the classes that occur, where they are known
    class_names: tuple[str, ...] | None = None  # in the order of the labels, where there are some

    def key(self, index: int) -> str:
        """What an example is called in messages."""
        return str(index)


def unwrapped(source):
    """The source inside of those that wrap another (`source.source`), such as `SkipBroken`."""
    while hasattr(source, "source"):
        source = source.source
    return source


def counted(numbers: Counter) -> str:
    """Names with their numbers, the largest first, as "3 .heic, 1 .txt"."""
    shown = [f"{number:,} {name}" for name, number in numbers.most_common(MAX_LISTED)]
    more = ["and other kinds"] if len(numbers) > MAX_LISTED else []
    return ", ".join(shown + more).encode(errors="backslashreplace").decode()


def digest_of(source) -> str:
    """A checksum of what a source holds, whatever wraps it; the length of one that has none."""
    while hasattr(source, "source") and not hasattr(source, "digest"):
        source = source.source
    return source.digest() if hasattr(source, "digest") else str(len(source))


def checksum(*parts: str | np.ndarray) -> str:
    """The sha256 of texts and arrays, one after the other with their sizes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            part = np.frombuffer(part.encode(errors="surrogateescape"), np.uint8)
        digest.update(f"{part.dtype} {part.shape}\n".encode())
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def cut_file(data: bytes, shape: Sequence[int]) -> tuple[np.ndarray, tuple[int, int]]:
    """A file as an example, and the width and height that it has.

    Of a `shape` `(size, size, channels)` it is an image, of `(frames, size, size, channels)` the
    first frames of an animation.
    """
    *count, size, _, channels = shape
    images = decode_frames(data, MAX_PIXELS, *count) if count else [decode_image(data, MAX_PIXELS)]
    pixels = []
    for image in images:
        pixels.append(center_crop(image, size, channels))
    return np.stack(pixels).reshape(shape), image.size


class ImageSource(Source):
    """Decodes and crops encoded images or animations; a broken one raises BrokenImage.

    Args:
        records: (image file, label) by index, raising OSError where storage fails; `labels` `[n]`
            and `class_names`, or None; the `key` of an image; a `digest` of what is there, wherever
            it lies; how many files were `left_out`, by kind; and the `remedy` for what stays
            unreadable.
        shape: `([frames,] size, size, channels)` of an example, with 1 or 3 channels.
        num_classes: as `config.data` has it, 0 for as many as there are, or `ANY_CLASS`.
        names: as `config.data.class_names`.
        where: the images lie, for messages.
    """

    def __init__(self, records, shape: Sequence[int], num_classes: int, names, where: str):
        self.class_names, numbers = match_classes(records.class_names, num_classes, names, where)
        self.records, self.labels, self._numbers = records, records.labels, numbers
        self.where, self.shape = where, shape
        own = len(self.class_names or ()) or ANY_CLASS
        self._num_classes = (num_classes or own) if numbers is None else len(numbers)
        if numbers is not None and records.labels is not None:
            self.labels = numbers[records.labels]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        data, label = self._read(index)
        check_labels([label], self._num_classes, f"{self.key(index)} is")
        label = label if self._numbers is None else self._numbers[label]
        return {"example": cut_file(data, self.shape)[0], "condition": np.int32(label)}

    def _read(self, index: int) -> tuple[bytes, int]:
        """Storage that fails says nothing about the image, so it is asked again."""
        for wait in (*WAITS, None):
            try:
                return self.records[index]
            except OSError as error:
                what = f"{self.key(index)} cannot be read ({error.strerror or error})"
                if wait is None:
                    raise DataError(
                        f"{what}, after {len(WAITS) + 1} attempts; nothing was left out for it. "
                        "Run the same command again once its storage answers; if it stays so, "
                        f"{self.records.remedy}."
                    ) from error
            logging.warning("%s; trying again in %s s", what, wait)
            time.sleep(wait)

    def key(self, index: int) -> str:
        """What the records call an image."""
        return self.records.key(index)

    def digest(self) -> str:
        """The checksum of the records, and of other labels than theirs."""
        own = self.records.digest()
        return own if self._numbers is None else checksum(own, self._numbers)


class SkipBroken(Source):
    """Gives the next readable image in the place of a broken one.

    Which that is depends on the index alone, so the order of examples stays a function of the seed.
    Each process logs and counts the broken images that it meets.
    """

    def __init__(self, source: ImageSource, max_broken: int):
        self.source, self.labels, self.class_names = source, source.labels, source.class_names
        self._max_broken = max_broken
        self._reasons: dict[int, str] = {}  # by index

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        start = range(len(self))[index]  # an IndexError beyond the end, where iteration stops
        for position in range(start, start + len(self)):
            position %= len(self)
            if position in self._reasons:
                continue
            try:
                return self.source[position]
            except BrokenImage as error:
                self._reasons[position] = str(error)
                check_broken(self.broken, len(self), self._max_broken, "data.max_broken")
                logging.warning("skipping %s: %s", self.source.key(position), error)
        some = "".join(f" ({key}: {why})" for key, why in list(self.broken.items())[:1])
        raise DataError(f"none of the {len(self)} images can be read{some}; name other images.")

    @property
    def broken(self) -> dict[str, str]:
        """Why images were skipped so far, by their key."""
        return {self.source.key(index): reason for index, reason in dict(self._reasons).items()}


def check_broken(broken: dict[str, str], total: int, limit: int, setting: str) -> None:
    """Raise DataError for more broken images than `limit`, which `setting` sets."""
    if len(broken) > limit:
        some = "; ".join(f"{key}: {reason}" for key, reason in list(broken.items())[:SHOWN])
        raise DataError(
            f"{len(broken)} of {total} images cannot be read so far, {limit} are allowed: {some}. "
            f"Repair or remove them, or raise {setting}."
        )


def match_classes(
    own: tuple[str, ...] | None, num_classes: int, names: str | Sequence[str], where: str
) -> tuple[tuple[str, ...] | None, np.ndarray | None]:
    """The names of the classes as the config counts them, and the label of each of `own` there.

    With the ImageNet names, classes must be called by WordNet ids, which say what they are, so that
    some may be absent; otherwise there must be `num_classes` of them, 0 for any number, and labels
    stay. Other names may be given for the same classes, not the same names for others.
    """
    if own is None or num_classes == ANY_CLASS:
        return own, None
    if names == IMAGENET:
        known = {wnid: number for number, (wnid, _) in enumerate(imagenet())}
        foreign = next((name for name in own if name not in known), None)
        if foreign is not None:
            raise DataError(
                f'data.class_names is "{IMAGENET}", but {where} holds the class "{foreign}", which '
                "is not the WordNet id of one of ImageNet's 1000 classes, such as n01440764; "
                "remove it, or, for classes of your own, set "
                f"--config.data.num_classes={len(own)} --config.data.class_names="
            )
        same = own == tuple(known)
        return tuple(known), None if same else np.array([known[name] for name in own], np.int32)
    if num_classes and len(own) != num_classes:
        some = ", ".join(own[:SHOWN]) + (", ..." if len(own) > SHOWN else "")
        remedy = f"set --config.data.num_classes={len(own)}, or correct the classes"
        if isinstance(names, tuple):  # those of a run
            some = f"new: {', '.join(name for name in own if name not in names) or 'none'}"
            remedy = "correct them, or train in another --workdir with --config and --init_from"
        raise DataError(
            f"{where} holds {len(own)} classes ({some}), data.num_classes is {num_classes}; "
            f"{remedy}."
        )
    name = misplaced(resolve(names, len(own)), own) if names else None
    if name:
        raise DataError(
            f'data.class_names calls another class "{name}" than {where} does, where the classes '
            f"are {listed(range(len(own)), own)}; write --config.data.class_names= for those "
            "names, or put yours in this order."
        )
    return own, None


def check_labels(labels: Sequence[int] | np.ndarray | None, num_classes: int, what: str) -> None:
    """Raise DataError for labels out of range, which `what` has."""
    for label in () if labels is None else (int(np.min(labels)), int(np.max(labels))):
        if not 0 <= label < num_classes:
            raise DataError(
                f"{what} of class {label}; labels must be at least 0 and below {num_classes}, as "
                "data.num_classes or the names of the classes say."
            )
