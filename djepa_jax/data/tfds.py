"""Images in a data set that TensorFlow Datasets has prepared; reading needs no TensorFlow."""

import os
import re
from collections.abc import Sequence

import numpy as np

from djepa_jax.data.records import DataError, checksum

SYNTAX = (
    "NAME[/CONFIG][:VERSION][@DATA_DIR][#SPLIT], such as imagenet2012:5.1.0@/data/tfds#validation"
)
PATH = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<version>[\w.]+))?(@(?P<folder>[^#]+))?(#(?P<split>.+))?"
)
VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsRecords:
    """Examples of a prepared data set with the features `image` and `label`.

    Args:
        data: from `as_data_source`, with images left encoded.
        name: of the data set and its split, for messages.
        class_names: of the labels, or None.
        files: what is read of which file, as `_describe_files` writes it.
    """

    labels = None  # each lies in the record of its image
    remedy = "copy the files of the data set again"

    def __init__(self, data, name: str, class_names: tuple[str, ...] | None, files: Sequence[str]):
        self.data, self.name, self.class_names, self._files = data, name, class_names, tuple(files)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            record = self.data[index]
        except (
            Exception
        ) as error:  # whatever the reader of a damaged, missing or silent file raises
            raise OSError(f"{type(error).__name__}: {error}") from error
        return record["image"], int(record["label"])

    def key(self, index: int) -> str:
        """The split and the index in it."""
        return f"{self.name}[{index}]"

    def digest(self) -> str:
        """A checksum of the names, sizes and lengths of the files."""
        return checksum(self.name, *self._files, *(self.class_names or ()))


def open_tfds(path: str, key: str = "data.path") -> TfdsRecords:
    """A prepared data set; nothing is ever downloaded.

    Args:
        path: `NAME[/CONFIG][:VERSION][@DATA_DIR][#SPLIT]`. Without a version the highest that is
            there; without a folder the one that TensorFlow Datasets uses (TFDS_DATA_DIR or
            ~/tensorflow_datasets); without a split "train". A split may be a part, as in
            `train[:90%]`.
        key: what the setting of the path is called.

    Raises:
        DataError: another syntax, no such data set, version or split, or one without images and
            labels.
    """
    import tensorflow_datasets as tfds  # half a second that other sources do not need

    parts = PATH.fullmatch(path)
    if parts is None:
        raise DataError(
            f'{key} is "{path}"; a data set of TensorFlow Datasets is written {SYNTAX}.'
        )
    data_dir = tfds.core.Path(parts["folder"] or tfds.core.constants.DATA_DIR).expanduser()
    folder, split = (
        _find_version(data_dir, parts["name"], parts["version"]),
        parts["split"] or "train",
    )
    try:
        builder = tfds.builder_from_directory(folder)
        count = builder.info.splits[split].num_examples
        files = _describe_files(builder.info.splits[split].file_instructions)
        data = (
            builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            if count
            else ()
        )
    except (
        Exception
    ) as error:  # of many kinds, for missing splits, other file formats and damaged files
        raise DataError(
            f'split "{split}" of the data set in "{folder}" cannot be opened: '
            f"{' '.join(str(error).split())}; the data set "
            "must have that split, be complete, and be in the format array_record."
        ) from error
    if not count:
        raise DataError(
            f'split "{split}" of the data set in "{folder}" is empty; name another after "#".'
        )
    return TfdsRecords(
        data, f"{parts['name']}#{split}", _class_names(tfds, folder, builder.info.features), files
    )


def _describe_files(instructions) -> list[str]:
    """For each file of a split its name and size, and which of its examples are read."""
    return [
        f"{os.path.basename(part.filename)} {os.path.getsize(part.filename)} {part.skip} "
        f"{part.take} {part.examples_in_shard}"
        for part in instructions
    ]


def _find_version(data_dir, name: str, version: str | None):
    """The folder of a prepared data set; without a version that of the highest."""
    root = data_dir / name
    present = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    versions = sorted(
        filter(VERSION.fullmatch, present), key=lambda text: [int(part) for part in text.split(".")]
    )
    if versions and version in (None, *versions):
        return root / (version or versions[-1])
    wanted = f"{root}/{version or 'VERSION'}"
    there = (
        f"which holds {', '.join(sorted(present)[:8])}"
        if present
        else "which is empty or does not exist"
    )
    how = (
        "python -m djepa_jax.data.ilsvrc --tars=TARS --data_dir=DATA_DIR makes it from the two "
        "tar files of ILSVRC 2012"
        if name == "imagenet2012"
        else f'tfds.builder("{name}", data_dir=DATA_DIR, '
        'file_format="array_record").download_and_prepare() makes it'
    )
    raise DataError(
        f'there is no prepared data set "{wanted}": "{root}" was searched, {there}; {how}. '
        f"Syntax: {SYNTAX}."
    )


def _class_names(tfds, folder, features) -> tuple[str, ...] | None:
    """The names of the classes, where there are some. Raises DataError unless there are images and
    labels.
    """
    known = dict(features.items())
    image, label = known.get("image"), known.get("label")
    whole_number = (
        isinstance(label, tfds.features.Tensor)
        and label.shape == ()
        and np.issubdtype(label.np_dtype, np.integer)
    )
    if not isinstance(image, tfds.features.Image) or not whole_number:
        raise DataError(
            f'the data set in "{folder}" has the features {", ".join(known)}; it needs "image", '
            "an encoded image, "
            'and "label", one whole number.'
        )
    return tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None
