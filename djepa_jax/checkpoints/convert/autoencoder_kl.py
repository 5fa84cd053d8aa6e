"""The autoencoder's tensors as latent diffusion (`kl16.ckpt`) and as diffusers name them."""

import re
from collections.abc import Mapping

import numpy as np
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
        (r"decoder/level_(\d+)", r"decoder.up_blocks.\1"),
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
EARLY_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def names_of(config: AutoencoderConfig, layout: str) -> dict[str, str]:
    """Our parameter paths -> names in one of the two layouts."""
    _, abstract = split_autoencoder(config)
    last = len(config.multipliers) - 1
    names = {}
    for path in traverse_util.flatten_dict(abstract, sep="/"):
        name = path
        if layout == DIFFUSERS and path.startswith("decoder/"):  # its levels are counted upwards
            name = re.sub(r"level_(\d+)", lambda level: f"level_{last - int(level[1])}", name)
        for pattern, replacement in RULES[layout]:
            name = re.sub(pattern, replacement, name)
        names[path] = re.sub(r"(kernel|scale)$", "weight", name).replace("/", ".")
    return names


def from_tensors(tensors: Mapping, config: AutoencoderConfig, where: str) -> dict:
    """Parameters of the autoencoder that `config` describes, from tensors in either layout.

    The training losses of an original checkpoint (`loss.*`) are passed over; `where` names the file
    in the table of what does not fit.
    """
    stored = {_modern(name): value for name, value in tensors.items() if name[:5] != "loss."}
    diffusers = any(name.startswith("encoder.down_blocks.") for name in stored)
    names = names_of(config, DIFFUSERS if diffusers else LATENT_DIFFUSION)
    leaves = traverse_util.flatten_dict(split_autoencoder(config)[1], sep="/")
    expected = {}
    for path, leaf in leaves.items():
        shape = leaf.shape
        if len(shape) == 4:  # theirs is [out, in, k, k], of 1 x 1 perhaps [out, in]
            shape = (shape[3], shape[2], *shape[:2])
            flat = names[path] in stored and len(stored[names[path]].shape) == 2
            shape = shape[:2] if flat and shape[2:] == (1, 1) else shape
        expected[names[path]] = shape
    check_shapes({name: value.shape for name, value in stored.items()}, expected, where)
    params = {}
    for path, leaf in leaves.items():
        value = np.asarray(stored[names[path]])
        if len(leaf.shape) == 4:
            value = value.reshape(*value.shape[:2], *leaf.shape[:2]).transpose(2, 3, 1, 0)
        params[path] = value
    return traverse_util.unflatten_dict(params, sep="/")


def _modern(name: str) -> str:
    """Early diffusers files call the projections of attention otherwise."""
    part = name.split(".")[-2] if ".attentions." in name else ""
    return name.replace(f".{part}.", f".{EARLY_DIFFUSERS.get(part, part)}.") if part else name
