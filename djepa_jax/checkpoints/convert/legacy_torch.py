"""Files that PyTorch wrote before 1.6, read without PyTorch; no code in them is run.

Such a file is five pickles (a magic number, a protocol, a description of the machine, the content,
the keys of its storages), then every storage as a count (int64) and its values. A pickle can only
call what `find_class` hands out: here the two functions below, neither of which runs anything.
"""

import collections
import os
import pickle

import numpy as np

from djepa_jax.checkpoints.convert.tensor_files import SourceError


def _rebuild(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_) -> np.ndarray:
    """A view of a storage; numpy refuses one that reaches beyond it."""
    size = storage.itemsize
    return np.ndarray(
        shape, storage.dtype, storage, offset * size, tuple(size * stride for stride in strides)
    )


ALLOWED = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.LongStorage": np.dtype("<i8"),
}


class _Unpickler(pickle.Unpickler):
    """Builds dicts and tensors, whose storages are filled afterwards."""

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in ALLOWED:
            raise SourceError(
                f"asks for {module}.{name}, which a file of tensors does not need; nothing in it "
                "was run. Name another file."
            )
        return ALLOWED[f"{module}.{name}"]

    def persistent_load(self, stored: tuple) -> np.ndarray:
        _, dtype, key, _, count, _ = stored
        return self.storages.setdefault(key, np.zeros(count, dtype))


def read_legacy_torch(path: os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict."""
    with open(path, "rb") as file:
        for _ in range(3):
            _Unpickler(file).load()
        content = _Unpickler(file)
        tensors = content.load()
        for key in _Unpickler(file).load():
            file.read(8)  # the count, which is in the content, too
            file.readinto(content.storages[key])
    return dict(tensors)
