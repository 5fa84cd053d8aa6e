"""D-JEPA: context encoder, feature predictor, JEPA head and denoiser (arXiv 2410.03755).

Everything works in *order coordinates*: the tokens of an image are permuted once by its random
order, so that visible tokens are a prefix and masked ones a suffix. Position enters only through
added tables, hence the networks commute with the permutation, and no boolean indexing is needed.
The target encoder is `encode_all` run with the moving average of the parameters, as in I-JEPA
(Assran et al. 2023).

Shape letters, used throughout: B batch, N tokens, V visible (padded), M masked, P prefix, D width,
H heads, C token channels, L layers, T autoregressive steps.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from flax import nnx

from djepa_jax.core.models import vit
from djepa_jax.core.models.conditioning import Condition, Conditioner
from djepa_jax.core.models.denoiser import Denoiser
from djepa_jax.core.models.embedding import look_up
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.ragged import Ragged
from djepa_jax.core.schedules import Grid, num_places, parts_of
from djepa_jax.core.sharding import path_name

# What `cast_linear` casts, but for what is computed in float32
CAST = re.compile(r"/(kernel|bias)$")
EXACT = re.compile(r"/time_embedding/|norm/bias$")
SIZED = "width", "encoder_depth", "predictor_depth", "num_heads", "denoiser_depth", "denoiser_width"
SIZES = {  # the published scales
    "B": dict(zip(SIZED, (768, 12, 12, 12, 6, 1024), strict=True)),
    "L": dict(zip(SIZED, (1024, 24, 24, 16, 8, 1280), strict=True)),
    "H": dict(zip(SIZED, (1280, 32, 32, 16, 12, 1536), strict=True)),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the networks."""

    grid: Grid  # positions along each axis of an example, N in all
    token_dim: int  # C
    conditioner: Conditioner
    width: int
    encoder_depth: int
    predictor_depth: int
    num_heads: int
    denoiser_depth: int
    denoiser_width: int
    denoiser_out: int  # C for flow matching, 2C for diffusion
    mlp_ratio: float = 4.0
    num_prefix_tokens: int = 64
    qk_norm: bool = True
    jepa_head: bool = True
    attention_dropout: float = 0.1
    attention: str = "auto"  # which implementation of it
    dropout: float = 0.1
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    factorised_positions: bool = False  # a position vector per axis, summed, not one per token

    def __post_init__(self):
        own = getattr(self.conditioner, "num_prefix_tokens", self.num_prefix_tokens)
        if own != self.num_prefix_tokens:
            raise ValueError(
                f"model.num_prefix_tokens is {self.num_prefix_tokens}, and num_prefix_tokens in "
                f"model.condition_options {own}; set them to the same."
            )

    @property
    def dtype(self) -> jnp.dtype:
        """The type of matrix products."""
        return jnp.dtype(self.compute_dtype)

    @property
    def num_tokens(self) -> int:
        """Tokens of an example (N)."""
        return num_places(self.grid)

    @property
    def position_axes(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the tables of position vectors, for each part of an example.

        Where a part has fewer axes than another, all its tokens share a further vector.
        """
        if not self.factorised_positions:
            return ((self.num_tokens,),)
        parts = parts_of(self.grid)
        most = max(map(len, parts))
        return tuple((1,) * (most - len(part)) + part for part in parts)

    def init_positions(self, key: jax.Array) -> jax.Array:
        """A fresh table of position vectors; factorised ones are as large as embedded tokens."""
        init = vit.unit_init if self.factorised_positions else vit.normal_init
        return init(key, (sum(map(sum, self.position_axes)), self.width))


class JepaHead(nnx.Module):
    """Linear D -> 4D, exact GELU, LayerNorm, linear 4D -> D; PyTorch's default initialisation."""

    def __init__(self, config: ModelConfig, *, rngs: Keys):
        def linear(fan_in, fan_out):
            init = functools.partial(vit.torch_linear_init, fan_in=fan_in)
            how = {"rngs": rngs, "dtype": config.dtype, "kernel_init": init, "bias_init": init}
            return vit.Linear(fan_in, fan_out, **how)

        self.up = linear(config.width, 4 * config.width)
        self.norm = vit.LayerNorm(4 * config.width, dtype=config.dtype)
        self.down = linear(4 * config.width, config.width)

    def __call__(self, cond: jax.Array) -> jax.Array:
        """Predict target features from predictor features: `[..., D]` -> `[..., D]`."""
        return self.down(self.norm(vit.gelu(self.up(cond))))


class ContextEncoder(nnx.Module):
    """ViT over prefix and visible tokens: embed, add positions, LayerNorm, blocks, LayerNorm."""

    def __init__(self, config: ModelConfig, *, rngs: Keys):
        width = config.width
        self.position_axes = config.position_axes
        self.conditioner = config.conditioner
        embedding = config.conditioner.make_embedding(width, rngs=rngs)
        setattr(self, config.conditioner.param_name, embedding)
        # Norms of rows that are all zero, which nothing else fills, would let gradients explode
        init = vit.zeros_init if embedding is not None else vit.normal_init
        self.prefix_table = nnx.Param(init(rngs.params(), (config.num_prefix_tokens, width)))
        self.input_proj = vit.Linear(config.token_dim, width, rngs=rngs, dtype=config.dtype)
        self.positions = nnx.Param(config.init_positions(rngs.params()))
        self.input_norm = vit.LayerNorm(width, dtype=config.dtype)
        self.stack = vit.Stack(config, config.encoder_depth, rngs=rngs)

    def embed_condition(self, raw) -> Condition:
        """Raw conditions, leading axis B -> the prefix tokens `[B, P, D]` that tell them."""
        embedding = getattr(self, self.conditioner.param_name)
        added = self.conditioner.embed(embedding, raw)
        return Condition(self.prefix_table[...] + added.prefix, added.mask)

    def __call__(
        self,
        tokens,
        order,
        condition: Condition,
        *,
        num_visible=None,
        num_unseen=None,
        keys=None,
        lengths=(),
    ):
        """Prefix and tokens `[B, V, C]`, whose raster places are `order` `[B, V]`: `[B, P + V, D]`.

        The first `num_visible` `[B]` are real, None if all are, and of these the first `num_unseen`
        `[B]` are not seen; `keys` `[B]` turn dropout on. Where examples are sorted as
        `MaskingConfig.lengths` says, less is computed for padding.
        """
        x = self.input_proj(tokens)  # [B, V, D]
        x = x + position_vectors(self.positions[...], order, self.position_axes, x.dtype)
        prefix = condition.prefix.astype(x.dtype)  # [B, P, D]
        key_mask = join_masks(condition.mask, num_visible, prefix.shape[1], order.shape, num_unseen)
        x = jnp.concatenate([prefix, x], axis=1)  # [B, P + V, D]
        parts = tuple((count, prefix.shape[1] + most) for count, most in lengths)
        ragged = Ragged(parts) if parts else None
        return self.stack(self.input_norm(x), key_mask=key_mask, keys=keys, ragged=ragged)


class Predictor(nnx.Module):
    """ViT over prefix, visible features and mask tokens; its output conditions the denoiser."""

    def __init__(self, config: ModelConfig, *, rngs: Keys):
        width = config.width
        self.position_axes = config.position_axes
        self.num_prefix_tokens = config.num_prefix_tokens
        self.input_proj = vit.Linear(width, width, rngs=rngs, dtype=config.dtype)
        self.mask_token = nnx.Param(vit.normal_init(rngs.params(), (width,)))
        self.positions = nnx.Param(config.init_positions(rngs.params()))
        self.stack = vit.Stack(config, config.predictor_depth, rngs=rngs)

    def __call__(
        self,
        encoded,
        order,
        num_visible,
        prefix_mask=None,
        *,
        num_unseen=None,
        keys=None,
        query_ids=None,
    ):
        """cond at every place, `[B, N, D]`, or at the places `query_ids` `[Q]` only, `[B, Q, D]`.

        Places are in order coordinates, `order` is `[B, N]`. Of the V tokens in `encoded`
        `[B, P + V, D]` the first `num_visible` `[B]` are real, and of these the first `num_unseen`
        `[B]` are hidden. `prefix_mask` `[B, P]` is False at prefix tokens that must not be seen,
        None for nowhere; `keys` `[B]` turn dropout on.
        """
        x = self.input_proj(encoded)  # [B, P + V, D]
        prefix, seen = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, num_tokens = order.shape
        mask_token = self.mask_token[...].astype(x.dtype)
        is_visible = between(num_unseen, num_visible, seen.shape[1])  # [B, V]
        seen = jnp.where(is_visible[..., None], seen, mask_token)
        hidden = repeat(mask_token, "d -> b m d", b=batch, m=num_tokens - seen.shape[1])
        positions = position_vectors(self.positions[...], order, self.position_axes, x.dtype)
        places = jnp.concatenate([seen, hidden], axis=1) + positions.astype(x.dtype)  # [B, N, D]
        x = jnp.concatenate([prefix, places], axis=1)  # [B, P + N, D]
        key_mask = join_masks(prefix_mask, None, prefix.shape[1], order.shape)
        if query_ids is not None:
            queries = query_ids + self.num_prefix_tokens
            return self.stack(x, key_mask=key_mask, keys=keys, queries=queries)
        return self.stack(x, key_mask=key_mask, keys=keys)[:, self.num_prefix_tokens :]


def position_vectors(table: jax.Array, order: jax.Array, parts, dtype=None) -> jax.Array:
    """Position vectors of places `[B, V]`: `[B, V, D]`, summed over the axes of a part's grid.

    `table` `[sum of all axes, D]` holds the vectors of one axis after the other, part after part;
    `dtype` is that of `look_up`.
    """
    ids, start = [], 0
    for axes in parts:
        starts = start + np.cumsum((0, *axes[:-1]))
        ids.append(np.indices(axes).reshape(len(axes), -1) + starts[:, None])  # [axes, n]
        start += sum(axes)
    if len(ids[0]) == 1:
        return look_up(table, order, dtype)
    rows = jnp.asarray(np.concatenate(ids, axis=1))  # [axes, N]
    return sum(look_up(table, along[order], dtype) for along in rows)


def join_masks(
    prefix_mask, num_visible, num_prefix: int, shape, num_unseen=None
) -> jax.Array | None:
    """Which of prefix and tokens, of the shape `[B, V]`, are real, as `attend` takes it.

    A mask of the prefix `[B, P]` and a number of tokens `[B]`, either None where all are real; and
    how many of these, from the first, are not seen, `[B]`, None where all are.
    """
    if prefix_mask is None and num_unseen is None:
        return None if num_visible is None else num_prefix + num_visible
    num_visible = jnp.full(shape[0], shape[1]) if num_visible is None else num_visible
    if prefix_mask is None:
        prefix_mask = jnp.ones((shape[0], num_prefix), bool)
    return jnp.concatenate([prefix_mask, between(num_unseen, num_visible, shape[1])], axis=1)


def between(first, stop, length: int) -> jax.Array:
    """Which of so many places are from `first` `[B]` on (None: from 0), below `stop` `[B]`."""
    places = jnp.arange(length)
    is_below = places < stop[:, None]  # [B, length]
    return is_below if first is None else is_below & (places >= first[:, None])


class DJepa(nnx.Module):
    """The whole model; split it once (`split_model`) and use plain JAX on its parameters."""

    def __init__(self, config: ModelConfig, *, rngs: Keys):
        self.num_prefix_tokens = config.num_prefix_tokens
        self.context_encoder = ContextEncoder(config, rngs=rngs)
        self.predictor = Predictor(config, rngs=rngs)
        self.jepa_head = JepaHead(config, rngs=rngs) if config.jepa_head else None
        self.denoiser = Denoiser(config, rngs=rngs)

    def embed_condition(self, raw) -> Condition:
        """Raw conditions, leading axis B -> prefix tokens `[B, P, D]`."""
        return self.context_encoder.embed_condition(raw)

    def encode_all(self, tokens: jax.Array, order: jax.Array, condition: Condition) -> jax.Array:
        """Features of all tokens, nothing masked, no dropout: `[B, N, C]` -> `[B, N, D]`."""
        return self.context_encoder(tokens, order, condition)[:, self.num_prefix_tokens :]


@functools.lru_cache(maxsize=32)  # building all modules takes long
def split_model(config: ModelConfig):
    """Graph definition and shapes of the parameters (a nested dict); allocates nothing."""
    graph, state = nnx.split(nnx.eval_shape(lambda: DJepa(config, rngs=Keys(0))))
    return graph, nnx.to_pure_dict(state)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters as a nested dict; call it inside `jax.jit` with output shardings."""
    return nnx.to_pure_dict(nnx.state(DJepa(config, rngs=Keys(key))))


def cast_linear(params: dict, dtype: jnp.dtype) -> dict:
    """Parameters of which linear maps' have the type of products: cast once, not in every step."""

    def cast(path, x):
        is_linear = CAST.search(path_name(path)) and not EXACT.search(path_name(path))
        return x.astype(dtype) if is_linear else x

    return jax.tree_util.tree_map_with_path(cast, params)
