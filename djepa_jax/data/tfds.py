"""Images in a data set that TensorFlow Datasets has prepared; reading needs no TensorFlow."""

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from djepa_jax.data.records import DataError, checksum

SYNTAX = "NAME[/CONFIG][:VERSION][@DATA_DIR][#SPLIT], such as mnist:3.0.1@/data/tfds#test"


class TfdsRecords:
    """Examples of a prepared data set with the features `image`, left encoded, and `label`."""

    labels = None  # each lies in the record of its image
    remedy = "copy the files of the data set again"

    def __init__(self, data, name: str, class_names: tuple[str, ...] | None, files: Sequence[str]):
        self.data, self.name, self.class_names, self._files = data, name, class_names, files
        self.left_out = Counter()  # what is prepared is images alone

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            record = self.data[index]
        except Exception as error:  # whatever the reader of a damaged or missing file raises
            raise OSError(f"{type(error).__name__}: {error}") from error
        return record["image"], int(record["label"])

    def key(self, index: int) -> str:
        """The split and the index in it."""
        return f"{self.name}[{index}]"

    def digest(self) -> str:
        """A checksum of the names, sizes and lengths of the files."""
        return checksum(self.name, *self._files, *(self.class_names or ()))


def open_tfds(path: str, where: str) -> TfdsRecords:
    """A prepared data set, written as `SYNTAX`; nothing is ever downloaded.

    Without a version it is the highest that is there; without a folder the one that TensorFlow
    Datasets uses (TFDS_DATA_DIR or ~/tensorflow_datasets); without a split "train". A split may be
    a part, as in `train[:90%]`.
    """
    import tensorflow_datasets as tfds  # half a second that other sources do not need

    rest, _, split = path.partition("#")
    name, _, folder = rest.partition("@")
    data_dir, split = os.path.expanduser(folder or tfds.core.constants.DATA_DIR), split or "train"
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
        info, features = builder.info.splits[split], dict(builder.info.features.items())
        files = [
            f"{os.path.basename(part.filename)} {os.path.getsize(part.filename)} {part.skip} "
            f"{part.take} {part.examples_in_shard}"
            for part in info.file_instructions
        ]
        encoded = {"image": tfds.decode.SkipDecoding()}
        data = builder.as_data_source(split, decoders=encoded) if info.num_examples else ()
    except Exception as error:  # of many kinds: no such data, other formats, damaged files
        raise DataError(
            f"{where} cannot be opened: {' '.join(str(error).split())} Data sets are written "
            f"{SYNTAX}; they must be complete, in the format array_record: "
            'tfds.builder(NAME, data_dir=DATA_DIR, file_format="array_record")'
            ".download_and_prepare() makes one."
        ) from error
    image, label = features.get("image"), features.get("label")
    scalar = isinstance(label, tfds.features.Tensor) and label.shape == ()
    whole = scalar and np.issubdtype(label.np_dtype, np.integer)
    if not data or not isinstance(image, tfds.features.Image) or not whole:
        raise DataError(
            f"{where} has {len(data)} examples with the features {', '.join(features)}; it needs "
            'some with "image", an encoded image, and "label", one whole number.'
        )
    class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else None
    return TfdsRecords(data, f"{name.partition(':')[0]}#{split}", class_names, files)
