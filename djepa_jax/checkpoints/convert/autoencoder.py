"""Names of autoencoder tensors in the latent-diffusion layout (`kl16.ckpt`) and in the diffusers
layout.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np
from einops import rearrange
from flax import traverse_util

from djepa_jax.checkpoints.convert.mismatch import check_shapes
from djepa_jax.core.models.autoencoder_kl import AutoencoderConfig, split_autoencoder

LATENT_DIFFUSION, DIFFUSERS = "latent diffusion", "diffusers"
# Parts of our paths -> parts of their names, applied in this order.
RULES = {
    LATENT_DIFFUSION: (
        (r"encoder/level_(\d+)", r"encoder.down.\1"),
        (r"decoder/level_(\d+)", r"decoder.up.\1"),
        (r"middle/block_0", "mid.block_1"),
        (r"middle/block_1", "mid.block_2"),
        (r"middle/attention", "mid.attn_1"),
        (r"/block_(\d+)", r".block.\1"),
        (r"/attention_(\d+)", r".attn.\1"),
        (r"/shortcut", ".nin_shortcut"),
        (r"(down\.\d+)/resample", r"\1.downsample.conv"),
        (r"(up\.\d+)/resample", r"\1.upsample.conv"),
        (r"(attn\S*)/out/", r"\1/proj_out/"),
    ),
    DIFFUSERS: (
        (r"encoder/level_(\d+)", r"encoder.down_blocks.\1"),
        (
            r"decoder/level_(\d+)",
            r"decoder.up_blocks.\1",
        ),  # counted from the other end, see `_turned`
        (r"middle/block_(\d+)", r"mid_block.resnets.\1"),
        (r"middle/attention", "mid_block.attentions.0"),
        (r"/block_(\d+)", r".resnets.\1"),
        (r"/attention_(\d+)", r".attentions.\1"),
        (r"/shortcut", ".conv_shortcut"),
        (r"(down_blocks\.\d+)/resample", r"\1.downsamplers.0.conv"),
        (r"(up_blocks\.\d+)/resample", r"\1.upsamplers.0.conv"),
        (r"(attentions\.\d+)/norm", r"\1.group_norm"),
        (r"(attentions\.\d+)/([qkv])/", r"\1.to_\2/"),
        (r"(attentions\.\d+)/out/", r"\1.to_out.0/"),
        (r"norm_out", "conv_norm_out"),
    ),
}
OLDER_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def names_of(config: AutoencoderConfig, layout: str) -> dict[str, str]:
    """Our parameter paths -> names in one of the two layouts."""
    _, abstract = split_autoencoder(config)
    return {
        path: _name(path, layout, len(config.multipliers))
        for path in traverse_util.flatten_dict(abstract, sep="/")
    }


def _name(path: str, layout: str, num_levels: int) -> str:
    if layout == DIFFUSERS and path.startswith("decoder/"):
        path = re.sub(
            r"level_(\d+)", lambda match: f"level_{num_levels - 1 - int(match[1])}", path
        )  # theirs run upwards
    for pattern, name in RULES[layout]:
        path = re.sub(pattern, name, path)
    return re.sub(r"(kernel|scale)$", "weight", path).replace("/", ".")


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    config: AutoencoderConfig,
    where: str,
    place: Callable = np.asarray,
) -> dict:
    """Autoencoder parameters from tensors in either layout.

    Args:
        tensors: arrays by name; the training losses of an original checkpoint (`loss.*`) are passed
            over.
        config: the autoencoder that they must be of.
        where: names the file in messages.
        place: applied to every finished array.

    Raises:
        MismatchError: a table of everything that does not fit.
    """
    stored = {_modern(name): name for name in tensors if not name.startswith("loss.")}
    layout = (
        DIFFUSERS
        if any(name.startswith("encoder.down_blocks.") for name in stored)
        else LATENT_DIFFUSION
    )
    names = names_of(config, layout)
    _, abstract = split_autoencoder(config)
    leaves = traverse_util.flatten_dict(abstract, sep="/")
    arrays = {name: tensors[old] for name, old in stored.items()}
    expected = {
        names[path]: _their_shape(leaf.shape, arrays.get(names[path]))
        for path, leaf in leaves.items()
    }
    check_shapes({name: array.shape for name, array in arrays.items()}, expected, where)
    params = {path: place(_ours(arrays[names[path]], leaf.shape)) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(params, sep="/")


def _modern(name: str) -> str:
    """Early diffusers files call the projections of attention otherwise."""
    if ".attentions." not in name:
        return name
    return re.sub(
        r"\.(query|key|value|proj_attn)\.", lambda match: f".{OLDER_DIFFUSERS[match[1]]}.", name
    )


def _their_shape(shape: tuple[int, ...], found: np.ndarray | None) -> tuple[int, ...]:
    """Shape of a kernel `[k, k, in, out]` in their files: `[out, in, k, k]`, or `[out, in]` where
    it is a linear layer.
    """
    if len(shape) != 4:
        return shape
    turned = (shape[3], shape[2], *shape[:2])
    return turned[:2] if found is not None and found.ndim == 2 and shape[:2] == (1, 1) else turned


def _ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) != 4:
        return array
    return rearrange(array.reshape(shape[3], shape[2], *shape[:2]), "o i h w -> h w i o")
