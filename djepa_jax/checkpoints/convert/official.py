"""Names and layouts of the authors' PyTorch parameters, as one table used in both directions.

PyTorch linears are `[out, in]`, ours `[in, out]`; the authors number their blocks, we stack them on
a leading layer axis; the qkv projection is `[3 D, D]` there and `[D, 3, D]` here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util

LAYER = "{i}"


class Layout(NamedTuple):
    """The axes of an array as the authors keep it, and as we do; `sizes` of some of them."""

    theirs: str
    ours: str
    sizes: tuple[tuple[str, int], ...] = ()

    def from_official(self, x: np.ndarray) -> np.ndarray:
        """Theirs -> ours."""
        return rearrange(x, f"{self.theirs} -> {self.ours}", **dict(self.sizes))

    def to_official(self, x: np.ndarray) -> np.ndarray:
        """Ours -> theirs."""
        return rearrange(x, f"{self.ours} -> {self.theirs}", **dict(self.sizes))


SAME, LINEAR = Layout("...", "..."), Layout("o i", "i o")
TOKEN, TOKENS = Layout("1 1 d", "d"), Layout("1 n d", "n d")


def _linear(ours: str, theirs: str) -> dict:
    return {
        f"{ours}/kernel": (f"{theirs}.weight", LINEAR),
        f"{ours}/bias": (f"{theirs}.bias", SAME),
    }


def _split(ours: str, theirs: str, parts: int) -> dict:
    """A linear whose output is `parts` vectors."""
    sizes = (("p", parts),)
    return {
        f"{ours}/kernel": (f"{theirs}.weight", Layout("(p o) i", "i p o", sizes)),
        f"{ours}/bias": (f"{theirs}.bias", Layout("(p o)", "p o", sizes)),
    }


def _norm(ours: str, theirs: str) -> dict:
    return {f"{ours}/scale": (f"{theirs}.weight", SAME), f"{ours}/bias": (f"{theirs}.bias", SAME)}


def _stack(ours: str, blocks: str, norm: str) -> dict:
    """The blocks of one ViT and the norm behind them."""
    inner, theirs = f"{ours}/stack/blocks", f"{blocks}.{LAYER}"
    return {
        **_norm(f"{inner}/attention_norm", f"{theirs}.norm1"),
        **_split(f"{inner}/attention/qkv", f"{theirs}.attn.qkv", 3),
        f"{inner}/attention/q_norm/scale": (f"{theirs}.attn.q_norm.weight", SAME),
        f"{inner}/attention/k_norm/scale": (f"{theirs}.attn.k_norm.weight", SAME),
        **_linear(f"{inner}/attention/out", f"{theirs}.attn.proj"),
        **_norm(f"{inner}/mlp_norm", f"{theirs}.norm2"),
        **_linear(f"{inner}/mlp/up", f"{theirs}.mlp.fc1"),
        **_linear(f"{inner}/mlp/down", f"{theirs}.mlp.fc2"),
        **_norm(f"{ours}/stack/norm", norm),
    }


# Our parameter path -> (the authors' name, layout). A name with {i} stands for one array per layer.
OFFICIAL_NAMES: Mapping[str, tuple[str, Layout]] = {
    "context_encoder/class_embedding/table": ("class_emb.weight", SAME),
    "context_encoder/class_embedding/null": ("fake_latent", SAME),
    "context_encoder/prefix_table": ("buffer", TOKENS),
    **_linear("context_encoder/input_proj", "z_proj"),
    "context_encoder/positions": ("encoder_pos_embed_learned", TOKENS),
    **_norm("context_encoder/input_norm", "z_proj_ln"),
    **_stack("context_encoder", "encoder_blocks", "encoder_norm"),
    **_linear("predictor/input_proj", "decoder_embed"),
    "predictor/mask_token": ("mask_token", TOKEN),
    "predictor/positions": ("decoder_pos_embed_learned", TOKENS),
    **_stack("predictor", "decoder_blocks", "decoder_norm"),
    **_linear("jepa_head/up", "jepaloss.net.fc1"),
    **_norm("jepa_head/norm", "jepaloss.net.norm"),
    **_linear("jepa_head/down", "jepaloss.net.fc2"),
    **_linear("denoiser/time_embedding/up", "diffloss.net.time_embed.mlp.0"),
    **_linear("denoiser/time_embedding/down", "diffloss.net.time_embed.mlp.2"),
    **_linear("denoiser/cond_proj", "diffloss.net.cond_embed"),
    **_linear("denoiser/input_proj", "diffloss.net.input_proj"),
    **_norm("denoiser/blocks/norm", f"diffloss.net.res_blocks.{LAYER}.in_ln"),
    **_linear("denoiser/blocks/up", f"diffloss.net.res_blocks.{LAYER}.mlp.0"),
    **_linear("denoiser/blocks/down", f"diffloss.net.res_blocks.{LAYER}.mlp.2"),
    **_split(
        "denoiser/blocks/modulation", f"diffloss.net.res_blocks.{LAYER}.adaLN_modulation.1", 3
    ),
    **_split("denoiser/final_modulation", "diffloss.net.final_layer.adaLN_modulation.1", 2),
    **_linear("denoiser/out", "diffloss.net.final_layer.linear"),
}


def to_official(params: dict) -> dict[str, np.ndarray]:
    """Our parameters (a nested dict) under the authors' names."""
    tensors = {}
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        name, layout = OFFICIAL_NAMES[path]
        value = np.asarray(value)
        for layer, part in enumerate(value if LAYER in name else [value]):
            tensors[name.replace(LAYER, str(layer))] = layout.to_official(part)
    return tensors


def official_shapes(abstract: dict) -> dict[str, tuple[int, ...]]:
    """The authors' names and shapes of a model's tensors, from the shapes of our parameters."""
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
    return {name: value.shape for name, value in to_official(hollow).items()}


def from_official(tensors: Mapping, abstract: dict, place: Callable = np.asarray) -> dict:
    """The authors' tensors, exactly those of `official_shapes(abstract)`, as our parameters.

    Each is read when it is needed, and goes through `place` before the next one, the largest first.
    """
    leaves = traverse_util.flatten_dict(abstract, sep="/")
    params = {}
    for path, leaf in sorted(leaves.items(), key=lambda item: -item[1].size):
        name, layout = OFFICIAL_NAMES[path]
        if LAYER in name:
            value = np.empty(leaf.shape, leaf.dtype)
            for layer in range(leaf.shape[0]):
                stored = tensors[name.replace(LAYER, str(layer))]
                value[layer] = layout.from_official(np.asarray(stored))
        else:
            value = layout.from_official(np.asarray(tensors[name]))
        params[path] = place(value)
    return traverse_util.unflatten_dict(params, sep="/")
