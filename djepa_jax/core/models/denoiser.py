"""The per-token denoiser (Li et al. 2024, section 3): an MLP conditioned on features and time.

It is three calls, so that a sampler can hoist what does not depend on the noisy token: `time(t)`,
`condition(cond)`, and the network itself. All leading axes broadcast, which lets guidance pairs and
several noise draws share work.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from djepa_jax.core.models.embedding import TimeEmbedding
from djepa_jax.core.models.vit import LayerNorm, Linear, remat_layer, zeros_init
from djepa_jax.core.sharding import keep_batch_split

if TYPE_CHECKING:
    from djepa_jax.core.models.djepa import ModelConfig


class DenoiserBlock(nnx.Module):
    """x + gate * MLP(LN(x) (1 + scale) + shift), with (shift, scale, gate) = linear(silu(y)).

    The linear map starts at zero: adaLN-Zero (Peebles and Xie 2023, section 3.2).
    """

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, dtype=dtype)
        self.up = Linear(width, width, rngs=rngs, dtype=dtype)
        self.down = Linear(width, width, rngs=rngs, dtype=dtype)
        self.modulation = Linear(width, (3, width), rngs=rngs, dtype=dtype, kernel_init=zeros_init)

    def __call__(self, x: jax.Array, activated: jax.Array) -> jax.Array:
        """Map rows `[R, w]`, with silu(y) `[R, w]`, to `[R, w]`."""
        shift, scale, gate = self.modulation.apart(activated)  # [R, w] each
        hidden = self.norm(x) * (1 + scale) + shift
        return x + gate * self.down(jax.nn.silu(self.up(hidden)))


class Denoiser(nnx.Module):
    """Noisy token `[..., C]`, time and condition -> `[..., out]` in float32."""

    # Set in training, where rows are many and their first axis is the batch's. Sampling has so few
    # that gathering kernels split over `fsdp` may cost more than splitting the rows' width.
    many_rows = False

    def __init__(self, config: "ModelConfig", *, rngs: nnx.Rngs):
        width, dtype = config.denoiser_width, config.dtype
        self.dtype, self.remat, self.unroll = dtype, config.remat, config.scan_unroll
        linear = functools.partial(Linear, rngs=rngs, dtype=dtype)
        self.time_embedding = TimeEmbedding(width, rngs=rngs)
        self.cond_proj = linear(config.width, width)
        self.input_proj = linear(config.token_dim, width)
        make_block = nnx.vmap(lambda key: DenoiserBlock(width, dtype=dtype, rngs=nnx.Rngs(key)))
        self.blocks = make_block(jax.random.split(rngs.params(), config.denoiser_depth))
        self.final_norm = LayerNorm(width, dtype=dtype, affine=False)
        self.final_modulation = linear(width, (2, width), kernel_init=zeros_init)
        self.out = linear(width, config.denoiser_out, kernel_init=zeros_init)

    def time(self, t: jax.Array) -> jax.Array:
        """Embed times `[...]` (diffusion steps, or flow times in 0..1): `[..., w]`."""
        return self.time_embedding(t)

    def condition(self, cond: jax.Array) -> jax.Array:
        """Project predictor features `[..., D]` to the denoiser's width: `[..., w]`."""
        return self.cond_proj(cond).astype(jnp.float32)

    def __call__(self, xt: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """Run the network on `xt` `[..., C]` with results of `time` and `condition`."""
        activated = jax.nn.silu(time + condition).astype(self.dtype)  # [..., w]
        x = self.input_proj(xt)
        shape = jnp.broadcast_shapes(x.shape, activated.shape)
        # Rows on one axis throughout: CPUs are slow on others, and copy between them
        x, activated = (jnp.broadcast_to(y, shape).reshape(-1, shape[-1]) for y in (x, activated))
        keep = keep_batch_split if self.many_rows else lambda x: x
        graph, params = nnx.split(self.blocks)

        def body(x, block_params):
            return keep(nnx.merge(graph, block_params)(keep(x), activated)), None

        x, _ = jax.lax.scan(remat_layer(body, self.remat), x, params, unroll=self.unroll)
        shift, scale = self.final_modulation.apart(activated)
        out = self.out(self.final_norm(x) * (1 + scale) + shift).astype(jnp.float32)
        return out.reshape(*shape[:-1], -1)
