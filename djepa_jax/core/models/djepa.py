"""D-JEPA: context encoder, feature predictor, JEPA head and denoiser (arXiv 2410.03755).

Everything works in *order coordinates*: the tokens of an image are permuted once by its random
order, so that visible tokens are a prefix and masked ones a suffix. Position enters only through
added tables, hence the networks commute with the permutation, and no boolean indexing is needed.
The target encoder is `encode_all` run with the moving average of the parameters.

Shape letters, used throughout: B batch, N tokens, V visible (padded), M masked, P prefix, D width,
H heads, C token channels, L layers, T autoregressive steps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx

from djepa_jax.core.models.conditioning import Condition, Conditioner
from djepa_jax.core.models.denoiser import Denoiser
from djepa_jax.core.models.vit import (
    LayerNorm,
    Linear,
    Stack,
    normal_init,
    torch_linear_init,
    zeros_init,
)

# Published scales: width, depth of encoder and of predictor, heads, denoiser depth and width.
SIZES = {
    "B": dict(
        width=768,
        encoder_depth=12,
        predictor_depth=12,
        num_heads=12,
        denoiser_depth=6,
        denoiser_width=1024,
    ),
    "L": dict(
        width=1024,
        encoder_depth=24,
        predictor_depth=24,
        num_heads=16,
        denoiser_depth=8,
        denoiser_width=1280,
    ),
    "H": dict(
        width=1280,
        encoder_depth=32,
        predictor_depth=32,
        num_heads=16,
        denoiser_depth=12,
        denoiser_width=1536,
    ),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the networks. `denoiser_out` is C for flow matching and 2C for
    diffusion.

    `grid` is the number of positions along each axis of an example, N in all. Without
    `factorised_positions` every token has a position vector of its own; with it, vectors of its
    places along the axes are summed.
    """

    grid: tuple[int, ...]
    token_dim: int
    conditioner: Conditioner
    width: int
    encoder_depth: int
    predictor_depth: int
    num_heads: int
    denoiser_depth: int
    denoiser_width: int
    denoiser_out: int
    mlp_ratio: float = 4.0
    num_prefix_tokens: int = 64
    qk_norm: bool = True
    jepa_head: bool = True
    attention_dropout: float = 0.1
    dropout: float = 0.1
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    factorised_positions: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of an example (N)."""
        return math.prod(self.grid)

    @property
    def position_axes(self) -> tuple[int, ...]:
        """Sizes of the tables of position vectors."""
        return self.grid if self.factorised_positions else (self.num_tokens,)


class JepaHead(nnx.Module):
    """Linear D -> 4D, exact GELU, LayerNorm, linear 4D -> D; PyTorch's default initialisation."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        def linear(fan_in, fan_out):
            def bias_init(key, shape):
                return torch_linear_init(key, shape, fan_in=fan_in)

            return Linear(
                fan_in,
                fan_out,
                rngs=rngs,
                dtype=dtype,
                kernel_init=torch_linear_init,
                bias_init=bias_init,
            )

        self.up, self.norm, self.down = (
            linear(width, 4 * width),
            LayerNorm(4 * width, dtype=dtype),
            linear(4 * width, width),
        )

    def __call__(self, cond: jax.Array) -> jax.Array:
        """Predict target features from predictor features: `[..., D]` -> `[..., D]`."""
        return self.down(self.norm(jax.nn.gelu(self.up(cond), approximate=False)))


class ContextEncoder(nnx.Module):
    """ViT over prefix and visible tokens: embed, add positions, LayerNorm, blocks, LayerNorm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.compute_dtype)
        self.conditioner = config.conditioner
        embedding = config.conditioner.make_embedding(config.width, rngs=rngs)
        setattr(self, config.conditioner.param_name, embedding)
        self.prefix_table = nnx.Param(
            zeros_init(rngs.params(), (config.num_prefix_tokens, config.width))
        )
        self.input_proj = Linear(config.token_dim, config.width, rngs=rngs, dtype=dtype)
        self.position_axes = config.position_axes
        self.positions = nnx.Param(
            normal_init(rngs.params(), (sum(config.position_axes), config.width))
        )
        self.input_norm = LayerNorm(config.width, dtype=dtype)
        self.stack = _make_stack(config, config.encoder_depth, rngs)

    def embed_condition(self, raw) -> Condition:
        """Raw conditions, leading axis B -> the prefix tokens `[B, P, D]` that tell them."""
        embedding = getattr(self, self.conditioner.param_name)
        added = self.conditioner.embed(embedding, raw)
        return Condition(self.prefix_table[...] + added.prefix, added.mask)

    def __call__(self, tokens, order, condition: Condition, *, visible=None, keys=None):
        """Encode tokens that are already in order coordinates.

        Args:
            tokens: `[B, V, C]`.
            order: `[B, V]`, the raster place of each token.
            condition: from `embed_condition`, prefix `[B, P, D]`.
            visible: `[B, V]`, False at padding; None when all are real.
            keys: `[B]`, turn dropout on.

        Returns:
            `[B, P + V, D]`, prefix first.
        """
        positions = position_vectors(self.positions[...], order, self.position_axes)  # [B, V, D]
        x = self.input_proj(tokens) + positions  # [B, V, D]
        prefix = condition.prefix.astype(x.dtype)  # [B, P, D]
        key_mask = join_masks(condition.mask, visible, prefix.shape[:2], order.shape)
        x = jnp.concatenate([prefix, x], axis=1)  # [B, P + V, D]
        return self.stack(self.input_norm(x), key_mask=key_mask, keys=keys)


class Predictor(nnx.Module):
    """ViT over prefix, visible features and mask tokens; its output conditions the denoiser."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_prefix_tokens = config.num_prefix_tokens
        self.input_proj = Linear(
            config.width, config.width, rngs=rngs, dtype=jnp.dtype(config.compute_dtype)
        )
        self.mask_token = nnx.Param(normal_init(rngs.params(), (config.width,)))
        self.position_axes = config.position_axes
        self.positions = nnx.Param(
            normal_init(rngs.params(), (sum(config.position_axes), config.width))
        )
        self.stack = _make_stack(config, config.predictor_depth, rngs)

    def __call__(self, encoded, order, num_visible, prefix_mask=None, *, keys=None, query_ids=None):
        """Predict features at every place.

        Args:
            encoded: context encoder output `[B, P + V, D]`.
            order: `[B, N]`.
            num_visible: `[B]`; of the V encoded tokens the first that many are real.
            prefix_mask: `[B, P]`, False where a prefix token must not be seen; None for nowhere.
            keys: `[B]`, turn dropout on.
            query_ids: `[Q]`, the places (order coordinates) that are wanted; None for all.

        Returns:
            cond `[B, N, D]`, or `[B, Q, D]` with `query_ids`.
        """
        x = self.input_proj(encoded)  # [B, P + V, D]
        prefix, seen = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, num_tokens = order.shape
        mask_token = self.mask_token[...].astype(x.dtype)
        is_visible = jnp.arange(seen.shape[1]) < num_visible[:, None]  # [B, V]
        seen = jnp.where(is_visible[..., None], seen, mask_token)
        hidden = repeat(mask_token, "d -> b m d", b=batch, m=num_tokens - seen.shape[1])
        positions = position_vectors(self.positions[...], order, self.position_axes)  # [B, N, D]
        places = jnp.concatenate([seen, hidden], axis=1) + positions.astype(x.dtype)  # [B, N, D]
        x = jnp.concatenate([prefix, places], axis=1)  # [B, P + N, D]
        key_mask = join_masks(prefix_mask, None, prefix.shape[:2], order.shape)
        if query_ids is not None:
            queries = query_ids + self.num_prefix_tokens
            return self.stack(x, key_mask=key_mask, keys=keys, queries=queries)
        return self.stack(x, key_mask=key_mask, keys=keys)[:, self.num_prefix_tokens :]


def position_vectors(table: jax.Array, order: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Position vectors of places `[B, V]`: `[B, V, D]`, summed over the axes of a grid.

    `table` `[sum of axes, D]` holds the vectors of one axis after the other.
    """
    starts = [sum(axes[:axis]) for axis in range(len(axes))]
    along = jnp.unravel_index(order, axes) if len(axes) > 1 else (order,)
    return sum(
        jnp.take(table, ids + start, axis=0) for ids, start in zip(along, starts, strict=True)
    )


def join_masks(prefix_mask, token_mask, prefix_shape, token_shape) -> jax.Array | None:
    """Masks `[B, P]` and `[B, V]`, either None where all are real -> `[B, P + V]` or None."""
    if prefix_mask is None and token_mask is None:
        return None
    prefix_mask = jnp.ones(prefix_shape, bool) if prefix_mask is None else prefix_mask
    token_mask = jnp.ones(token_shape, bool) if token_mask is None else token_mask
    return jnp.concatenate([prefix_mask, token_mask], axis=1)


def _make_stack(config: ModelConfig, depth: int, rngs: nnx.Rngs) -> Stack:
    return Stack(
        config.width,
        depth,
        config.num_heads,
        mlp_ratio=config.mlp_ratio,
        qk_norm=config.qk_norm,
        attention_dropout=config.attention_dropout,
        dropout_rate=config.dropout,
        remat=config.remat,
        unroll=config.scan_unroll,
        dtype=jnp.dtype(config.compute_dtype),
        rngs=rngs,
    )


class DJepa(nnx.Module):
    """The whole model. Split it once (`split_model`) and use plain JAX transforms on its
    parameters.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.num_prefix_tokens = config.num_prefix_tokens
        self.context_encoder = ContextEncoder(config, rngs=rngs)
        self.predictor = Predictor(config, rngs=rngs)
        dtype = jnp.dtype(config.compute_dtype)
        self.jepa_head = (
            JepaHead(config.width, dtype=dtype, rngs=rngs) if config.jepa_head else None
        )
        self.denoiser = Denoiser(
            config.token_dim,
            config.denoiser_out,
            config.width,
            config.denoiser_width,
            config.denoiser_depth,
            remat=config.remat,
            unroll=config.scan_unroll,
            dtype=dtype,
            rngs=rngs,
        )

    def embed_condition(self, raw) -> Condition:
        """Raw conditions, leading axis B -> prefix tokens `[B, P, D]`."""
        return self.context_encoder.embed_condition(raw)

    def encode_all(self, tokens: jax.Array, order: jax.Array, condition: Condition) -> jax.Array:
        """Features of all tokens, nothing masked, no dropout: `[B, N, C]` -> `[B, N, D]`.

        With the moving average of the parameters this is the target encoder.
        """
        return self.context_encoder(tokens, order, condition)[:, self.num_prefix_tokens :]


def split_model(config: ModelConfig):
    """Graph definition and abstract parameters (a nested dict of shapes) of a model; allocates
    nothing.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: DJepa(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Fresh float32 parameters as a nested dict; call it inside `jax.jit` with output shardings."""
    return nnx.to_pure_dict(nnx.state(DJepa(config, rngs=nnx.Rngs(params=key))))
