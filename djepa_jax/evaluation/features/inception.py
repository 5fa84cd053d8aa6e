"""Inception v3 as TensorFlow published it in 2015, the network of FID, sFID and Inception Score.

The layers and their names are those of the file of weights that pytorch-fid and torch-fidelity use,
https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth
It differs from torchvision's network: averages leave padding out, and Mixed_7c pools by maxima.
"""

import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from djepa_jax.checkpoints.convert.tensor_files import COUNTER, open_tensors
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.evaluation.features.base import (
    BATCH_NORM,
    BATCH_SIZE,
    FeatureError,
    Network,
    Params,
    check_names,
    convolve,
    without_batch_norm,
)

PUBLISHED = "6726825d"  # what the sha256 of the public file starts with
SIZE = 299  # of the pictures that the network sees
NUM_VALUES = 23_885_392  # in all tensors, running statistics included
# Layers that follow one another: convolutions by name, "mean" and "max" pools of 3 x 3. The stride
# is 1, with padding; "/2" and "/1" are strides without padding.
TO_64 = "Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 max/2"
TO_192 = "Conv2d_3b_1x1 Conv2d_4a_3x3/1 max/2"
# The branches of blocks, whose channels are joined.
A = (
    "branch1x1",
    "branch5x5_1 branch5x5_2",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "mean branch_pool",
)
B = ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max/2")
C = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "mean branch_pool",
)
D = (
    "branch3x3_1 branch3x3_2/2",
    "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2",
    "max/2",
)
E = (  # XLA computes once what two branches begin with
    "branch1x1",
    "branch3x3_1 branch3x3_2a",
    "branch3x3_1 branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
)
BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), A),
    "Mixed_6a": B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), C),
    "Mixed_7a": D,
    "Mixed_7b": (*E, "mean branch_pool"),
    "Mixed_7c": (*E, "max branch_pool"),
}


class Inception(Network):
    """FID's network: "pool" 2048, "spatial" 2023 (sFID's), "logits" 1008 without their bias.

    Also "64", "192", "768" (means of earlier layers), and "logits_with_bias".
    """

    @classmethod
    def from_file(cls, path: str | os.PathLike, batch_size: int = BATCH_SIZE) -> "Inception":
        """With the weights of a `.pth` (read by PyTorch) or `.safetensors` file.

        Raises:
            SourceError: it cannot be read.
            FeatureError: it is of another network.
        """
        file = open_tensors(pathlib.Path(path), "Inception weights")
        params = from_tensors(file.groups[file.average], f'Inception weights "{path}"')
        return cls("inception", file_sha256(file.files[0]), params, extract, batch_size)

    @property
    def is_the_published(self) -> bool:
        """Whether the weights are the public file, to the bit."""
        return self.sha256.startswith(PUBLISHED)


def from_tensors(tensors: Mapping, where: str) -> Params:
    """Parameters from the tensors of a file, which `where` names."""
    tensors = {name: value for name, value in tensors.items() if not name.endswith(COUNTER)}
    layers = _convolutions()
    parts = ["conv.weight", *(f"bn.{part}" for part in BATCH_NORM)]
    expected = [f"{layer}.{part}" for layer in layers for part in parts]
    check_names(tensors, [*expected, "fc.weight", "fc.bias"], where)
    count = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    if count != NUM_VALUES:
        raise FeatureError(
            f"{where} holds {count:,} values, FID's Inception {NUM_VALUES:,}; name that file."
        )
    params = {name: without_batch_norm(tensors, f"{name}.conv", f"{name}.bn") for name in layers}
    kernel, bias = (np.asarray(tensors[f"fc.{part}"]) for part in ("weight", "bias"))
    return params | {"fc": {"kernel": kernel.T, "bias": bias}}


def _convolutions() -> set[str]:
    """Names of all convolutions."""
    blocks = [f"{block}.{step}" for block in BLOCKS for step in " ".join(BLOCKS[block]).split()]
    names = {step.partition("/")[0] for step in [*TO_64.split(), *TO_192.split(), *blocks]}
    return {name for name in names if name.rpartition(".")[2] not in ("mean", "max")}


def extract(params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """All taps of uint8 pictures `[B, H, W, 3]`, of which the network sees 299 x 299."""
    x = (resize(images.astype(jnp.float32), SIZE) - 128) / 128
    taps = {}
    x = _chain(params, "", TO_64, x)  # [B, 73, 73, 64]
    taps["64"] = x.mean((1, 2))
    x = _chain(params, "", TO_192, x)  # [B, 35, 35, 192]
    taps["192"] = x.mean((1, 2))
    for block, branches in BLOCKS.items():
        if block == "Mixed_6d":  # mixed_6/conv of the 2015 graph
            spatial = _chain(params, f"{block}.", "branch1x1", x)[..., :7]  # [B, 17, 17, 7]
            taps["spatial"] = spatial.reshape(len(x), -1)
        x = jnp.concatenate([_chain(params, f"{block}.", steps, x) for steps in branches], -1)
        if block == "Mixed_6e":
            taps["768"] = x.mean((1, 2))
    taps["pool"] = x.mean((1, 2))  # [B, 2048], of 8 x 8 places
    taps["logits"] = taps["pool"] @ params["fc"]["kernel"]
    taps["logits_with_bias"] = taps["logits"] + params["fc"]["bias"]
    return taps


def _chain(params: Params, prefix: str, steps: str, x: jax.Array) -> jax.Array:
    """Layers that follow one another, in the notation of the tables above."""
    for step in steps.split():
        name, _, stride = step.partition("/")
        stride, padding = (int(stride), "VALID") if stride else (1, "SAME")
        if name == "max":
            x = nnx.max_pool(x, (3, 3), (stride, stride), padding)
        elif name == "mean":
            x = nnx.avg_pool(x, (3, 3), padding=padding, count_include_pad=False)
        else:
            x = nnx.relu(convolve(params[prefix + name], x, stride, padding))
    return x


def resize(images: jax.Array, size: int) -> jax.Array:
    """Bilinear as in TensorFlow 1: output i lies at input i * in / out, without antialiasing."""
    for axis in (1, 2):
        length = images.shape[axis]
        places = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = places.astype(int)
        shape = [size if dimension == axis else 1 for dimension in range(4)]
        weight = (places - low).reshape(shape)
        first, second = (images.take(np.minimum(i, length - 1), axis) for i in (low, low + 1))
        images = first + (second - first) * weight
    return images
