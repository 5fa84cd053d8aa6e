"""The per-token denoiser: an MLP with adaptive LayerNorm, conditioned on predictor features and
time.

It is three calls, so that a sampler can hoist what does not depend on the noisy token: `time(t)`,
`condition(cond)`, and the network itself. All leading axes broadcast, which lets guidance pairs and
several noise draws share work.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from djepa_jax.core.models.embedding import TimeEmbedding
from djepa_jax.core.models.vit import LayerNorm, Linear, remat_layer, zeros_init
from djepa_jax.core.sharding import keep_batch_split


class DenoiserBlock(nnx.Module):
    """x + gate * MLP(LN(x) (1 + scale) + shift), with (shift, scale, gate) = linear(silu(y))."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, dtype=dtype)
        self.up = Linear(width, width, rngs=rngs, dtype=dtype)
        self.down = Linear(width, width, rngs=rngs, dtype=dtype)
        self.modulation = Linear(width, (3, width), rngs=rngs, dtype=dtype, kernel_init=zeros_init)

    def __call__(self, x: jax.Array, activated: jax.Array) -> jax.Array:
        """Map `[..., w]`, with silu(y) `[..., w]`, to `[..., w]`."""
        shift, scale, gate = jnp.moveaxis(self.modulation(activated), -2, 0)  # [..., w] each
        hidden = self.norm(x) * (1 + scale) + shift
        return x + gate * self.down(jax.nn.silu(self.up(hidden)))


class Denoiser(nnx.Module):
    """adaLN MLP: noisy token `[..., C]`, time and condition -> `[..., out]` in float32.

    Attributes:
        keep_batch_split: set in training, where rows are many and their first axis is the batch's.
            Sampling has so few that gathering kernels split over `fsdp` may cost more than
            splitting the rows' width.
    """

    keep_batch_split = False

    def __init__(
        self,
        token_dim: int,
        out_dim: int,
        cond_dim: int,
        width: int,
        depth: int,
        *,
        remat="none",
        unroll=1,
        dtype,
        rngs,
    ):
        self.dtype, self.remat, self.unroll = dtype, remat, unroll
        self.time_embedding = TimeEmbedding(width, rngs=rngs)
        self.cond_proj = Linear(cond_dim, width, rngs=rngs, dtype=dtype)
        self.input_proj = Linear(token_dim, width, rngs=rngs, dtype=dtype)

        def make_block(key):
            """One layer, with parameters of its own."""
            return DenoiserBlock(width, dtype=dtype, rngs=nnx.Rngs(key))

        self.blocks = nnx.vmap(make_block)(jax.random.split(rngs.params(), depth))
        self.final_norm = LayerNorm(width, dtype=dtype, affine=False)
        self.final_modulation = Linear(
            width, (2, width), rngs=rngs, dtype=dtype, kernel_init=zeros_init
        )
        self.out = Linear(width, out_dim, rngs=rngs, dtype=dtype, kernel_init=zeros_init)

    def time(self, t: jax.Array) -> jax.Array:
        """Embed times `[...]` (integers of the diffusion schedule, or flow times in 0..1): `[...,
        w]`.
        """
        return self.time_embedding(t)

    def condition(self, cond: jax.Array) -> jax.Array:
        """Project predictor features `[..., D]` to the denoiser's width: `[..., w]`."""
        return self.cond_proj(cond).astype(jnp.float32)

    def __call__(self, xt: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """Run the network on noisy tokens.

        Args:
            xt: `[..., C]`.
            time: result of `time`, broadcastable to the rows.
            condition: result of `condition`, broadcastable to the rows.

        Returns:
            `[..., out]` float32 over the broadcast leading axes.
        """
        activated = jax.nn.silu(time + condition).astype(self.dtype)  # [..., w]
        x = self.input_proj(xt)
        x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, activated.shape))
        activated = jnp.broadcast_to(activated, x.shape)
        x = self._scan(x, activated)
        shift, scale = jnp.moveaxis(self.final_modulation(activated), -2, 0)
        return self.out(self.final_norm(x) * (1 + scale) + shift).astype(jnp.float32)

    def _scan(self, x: jax.Array, activated: jax.Array) -> jax.Array:
        """All blocks on `[..., w]`."""
        keep = keep_batch_split if self.keep_batch_split else lambda x: x
        graph, params = nnx.split(self.blocks)

        def body(x, block_params):
            return keep(nnx.merge(graph, block_params)(keep(x), activated)), None

        return jax.lax.scan(remat_layer(body, self.remat), x, params, unroll=self.unroll)[0]
