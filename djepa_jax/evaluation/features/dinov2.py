"""DINOv2's ViT-S/14, B/14 and L/14 (Oquab et al. 2023, arXiv 2304.07193) without registers.

Distances on features of L/14 at 224 pixels are the FD-DINOv2 of Stein et al. 2023 (arXiv
2306.04675). Weights: https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth
and its like, in the names that they have there.
"""

import itertools
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.checkpoints.convert.tensor_files import open_tensors
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.evaluation.features.base import (
    BATCH_SIZE,
    FeatureError,
    Network,
    check_names,
    convolve,
    resize_bicubic,
)

DEPTHS = {384: ("s", 12), 768: ("b", 12), 1024: ("l", 24)}  # width -> size, number of blocks
SIZE, PATCH, HEAD = 224, 14, 64  # pixels, pixels, channels of a head
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
EPSILON = 1e-6  # of layer norms
OFFSET, CUBIC = 0.1, -0.75  # of the authors' bicubic resizing of positions
# Tensors before and after the blocks, and of a block.
ENDS = "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias"
BLOCK = (
    "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias "
    "ls1.gamma norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias "
    "ls2.gamma"
)


class DINOv2(Network):
    """As "pool", the class token after the last norm: 384 (S), 768 (B) or 1024 (L) values."""

    @classmethod
    def from_file(cls, path: str | os.PathLike, batch_size: int = BATCH_SIZE) -> "DINOv2":
        """With the weights of a `.pth` (read by PyTorch) or `.safetensors` file.

        Raises:
            SourceError: it cannot be read.
            FeatureError: it is of another network.
        """
        where = f'DINOv2 weights "{path}"'
        file = open_tensors(pathlib.Path(path), "DINOv2 weights")
        tensors = file.groups[file.average]
        width = tensors["norm.weight"].shape[0] if "norm.weight" in tensors else 0
        if width not in DEPTHS:
            raise FeatureError(f"{where} are not of ViT-S/14, B/14 or L/14; name such a file.")
        size, depth = DEPTHS[width]
        params = from_tensors(tensors, depth, where)
        return cls(f"dinov2_vit{size}14", file_sha256(file.files[0]), params, extract, batch_size)


def from_tensors(tensors: Mapping, depth: int, where: str) -> dict:
    """Parameters from the tensors of a file, which `where` names; blocks on a leading axis."""
    names = {name: [f"blocks.{n}.{name}" for n in range(depth)] for name in BLOCK.split()}
    found = tensors.keys() - {"mask_token"}  # for training alone
    check_names(found, itertools.chain(ENDS.split(), *names.values()), where)
    params = {name: np.asarray(tensors[name]) for name in ENDS.split()}
    params["pos_embed"] = resize_positions(params["pos_embed"][0], SIZE // PATCH)
    params["patches"] = {
        "kernel": params.pop("patch_embed.proj.weight").transpose(2, 3, 1, 0),
        "bias": params.pop("patch_embed.proj.bias"),
    }
    params["blocks"] = {
        name: np.stack([np.asarray(tensors[stored]) for stored in all_stored])
        for name, all_stored in names.items()
    }
    return params


def resize_positions(positions: np.ndarray, size: int) -> np.ndarray:
    """Positions `[1 + S S, D]` for `size` x `size` patches, `[1 + size size, D]`.

    Bicubic without antialiasing; the scale has an offset, as in the authors' code.
    """
    stored = round(len(positions[1:]) ** 0.5)
    if stored == size:
        return positions
    places = (np.arange(size) + 0.5) * stored / (size + OFFSET) - 0.5
    taps = np.floor(places)[:, None] + np.arange(-1, 3)  # [size, 4]
    x, a = np.abs(places[:, None] - taps), CUBIC
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    matrix = np.zeros((size, stored))
    columns = np.clip(taps, 0, stored - 1).astype(int)
    np.add.at(matrix, (np.arange(size)[:, None], columns), np.where(x <= 1, near, far))
    grid = positions[1:].reshape(stored, stored, -1)
    grid = np.einsum("is,jt,std->ijd", matrix, matrix, grid, optimize=True)
    return np.float32(np.concatenate([positions[:1], grid.reshape(size * size, -1)]))


def extract(params: dict, images: jax.Array) -> dict[str, jax.Array]:
    """The features of uint8 pictures `[B, H, W, 3]`, resized to 224 x 224 as a whole."""
    pixels = (resize_bicubic(images, SIZE) / 255 - jnp.array(MEAN)) / jnp.array(STD)
    patches = convolve(params["patches"], pixels, PATCH, "VALID")
    patches = patches.reshape(len(images), -1, patches.shape[-1])  # [B, 256, D]
    first = jnp.broadcast_to(params["cls_token"], (len(images), 1, patches.shape[-1]))
    x = jnp.concatenate([first, patches], 1) + params["pos_embed"]
    x, _ = jax.lax.scan(lambda x, block: (_block(block, x), None), x, params["blocks"])
    return {"pool": _norm(params, "norm", x[:, 0])}


def _block(params: dict, x: jax.Array) -> jax.Array:
    """Attention and a perceptron, each behind a norm and scaled."""
    qkv = _dense(params, "attn.qkv", _norm(params, "norm1", x))
    q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, -1, HEAD), 2, 0)  # [B, S, H, 64]
    attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    x = x + _dense(params, "attn.proj", attended) * params["ls1.gamma"]
    hidden = jax.nn.gelu(_dense(params, "mlp.fc1", _norm(params, "norm2", x)), approximate=False)
    return x + _dense(params, "mlp.fc2", hidden) * params["ls2.gamma"]


def _dense(params: dict, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _norm(params: dict, name: str, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]
