"""Parameters from sets of tensors, in the authors' layout or in ours, checked before the first one
is read.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import traverse_util

from djepa_jax.checkpoints.convert.mismatch import check_shapes
from djepa_jax.checkpoints.convert.official import from_official, official_shapes
from djepa_jax.checkpoints.convert.tensor_files import SourceError, Tensors, open_tensors
from djepa_jax.core import sharding
from djepa_jax.core.models.djepa import ModelConfig

WRAPPERS = ("module.", "_orig_mod.")  # in front of every name when a wrapped model was saved
LAYOUT = {"layout": "djepa_jax"}  # metadata of safetensors files with our names and shapes


@dataclasses.dataclass(frozen=True)
class WeightSet:
    """Tensors that were found to be those of a model."""

    tensors: Tensors
    convert: Callable[
        [Mapping, Callable], dict
    ]  # (tensors, what to do with each finished array) -> parameters
    where: str

    def read(self, place: Callable[[np.ndarray], jax.Array] | None = None) -> dict:
        """The parameters, by default as JAX arrays in the host's memory.

        Raises:
            SourceError: a value is not finite.
        """
        place = place or to_host

        def checked(value: np.ndarray) -> jax.Array:
            if not np.isfinite(value).all():
                raise SourceError(
                    f"{self.where} holds values that are not finite: it is of a run that failed, "
                    "or damaged."
                )
            return place(value)

        params = self.convert(self.tensors, checked)
        self.tensors.close()
        return params


def to_host(value: np.ndarray) -> jax.Array:
    """A JAX array in the host's memory, which Orbax writes without copying."""
    return jax.block_until_ready(jax.device_put(value, sharding.host_device()))


def fit(
    tensors: Tensors,
    metadata: Mapping,
    abstract: dict,
    where: str,
    model: ModelConfig | None = None,
) -> WeightSet:
    """Check the names and shapes of tensors against a model's parameters.

    Args:
        tensors: tensors of a file.
        metadata: the file's; says whether names and shapes are ours.
        abstract: shapes of our parameters.
        where: names the file in messages.
        model: with it, a message says what the file's tensors look like.

    Raises:
        MismatchError: a table of everything that does not fit.
    """
    if all(metadata.get(key) == value for key, value in LAYOUT.items()):
        expected = traverse_util.flatten_dict(abstract, sep="/")
        check_shapes(tensors.shapes, {path: leaf.shape for path, leaf in expected.items()}, where)
        return WeightSet(tensors, _from_ours, where)
    tensors = _unwrapped(tensors)
    check_shapes(tensors.shapes, official_shapes(abstract), where, model)
    return WeightSet(tensors, lambda tensors, place: from_official(tensors, abstract, place), where)


def _from_ours(tensors: Mapping, place: Callable) -> dict:
    return traverse_util.unflatten_dict({path: place(tensors[path]) for path in tensors}, sep="/")


def _unwrapped(tensors: Tensors) -> Tensors:
    for prefix in (*WRAPPERS, *WRAPPERS):  # one may be in the other, either way
        if all(name.startswith(prefix) for name in tensors):
            tensors = tensors.renamed({name.removeprefix(prefix): name for name in tensors})
    return tensors


def read_params(path: pathlib.Path, abstract: dict) -> dict:
    """The parameters in a safetensors file, placed as `abstract` says.

    Raises:
        SourceError, MismatchError: the file is damaged, or of another model.
    """
    file = open_tensors(path)
    (tensors,) = file.weights.values()
    params = fit(tensors, file.metadata, abstract, f'"{path}"').read()
    return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), params, abstract)
