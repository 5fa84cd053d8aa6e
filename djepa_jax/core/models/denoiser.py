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
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.vit import LayerNorm, Linear, product, remat_layer, zeros_init
from djepa_jax.core.sharding import keep_batch_split

if TYPE_CHECKING:
    from djepa_jax.core.models.djepa import ModelConfig


class DenoiserBlock(nnx.Module):
    """x + gate * MLP(LN(x) (1 + scale) + shift), with (shift, scale, gate) = linear(silu(y)).

    The linear map starts at zero: adaLN-Zero (Peebles and Xie 2023, section 3.2).
    """

    def __init__(self, width: int, *, dtype, rngs: Keys):
        self.norm = LayerNorm(width, dtype=dtype)
        self.up = Linear(width, width, rngs=rngs, dtype=dtype)
        self.down = Linear(width, width, rngs=rngs, dtype=dtype)
        self.modulation = Linear(width, (3, width), rngs=rngs, dtype=dtype, kernel_init=zeros_init)

    def __call__(self, x: jax.Array, activated: jax.Array) -> jax.Array:
        """Map rows `[R, w]`, with silu(y) `[R, w]`, to `[R, w]`."""
        return self.modulated(x, *self.modulation.apart(activated))

    def modulated(self, x: jax.Array, shift, scale, gate) -> jax.Array:
        """The same with the three `[R, w]` given."""
        hidden = self.norm(x) * (1 + scale) + shift
        return x + gate * self.down(jax.nn.silu(self.up(hidden)))


class Denoiser(nnx.Module):
    """Noisy token `[..., C]`, time and condition -> `[..., out]` in float32."""

    # Set in training, where rows are many and their first axis is the batch's. Sampling has so few
    # that gathering kernels split over `fsdp` may cost more than splitting the rows' width.
    many_rows = False

    def __init__(self, config: "ModelConfig", *, rngs: Keys):
        width, dtype = config.denoiser_width, config.dtype
        self.dtype, self.remat, self.depth = dtype, config.remat, config.denoiser_depth
        linear = functools.partial(Linear, rngs=rngs, dtype=dtype)
        self.time_embedding = TimeEmbedding(width, rngs=rngs)
        self.cond_proj = linear(config.width, width)
        self.input_proj = linear(config.token_dim, width)
        make_block = nnx.vmap(lambda key: DenoiserBlock(width, dtype=dtype, rngs=Keys(key)))
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
        x, activated, shape = self.rows(xt, time, condition)
        keep = keep_batch_split if self.many_rows else lambda x: x
        graph, params = nnx.split(self.blocks)

        def body(x, block_params):
            return keep(nnx.merge(graph, block_params)(keep(x), activated)), None

        # Unrolled, so that what is kept for the backward pass is not copied together
        x, _ = jax.lax.scan(remat_layer(body, self.remat), x, params, unroll=True)
        return self.finish(x, *self.final_modulation.apart(activated), shape)

    def rows(self, xt, time, condition) -> tuple[jax.Array, jax.Array, tuple]:
        """Embedded tokens and silu(time + condition), `[R, w]` each, and the shape `[..., w]`."""
        activated = jax.nn.silu(time + condition).astype(self.dtype)  # [..., w]
        x = self.input_proj(xt)
        shape = jnp.broadcast_shapes(x.shape, activated.shape)
        # Rows on one axis throughout: CPUs are slow on others, and copy between them
        x, activated = (jnp.broadcast_to(y, shape).reshape(-1, shape[-1]) for y in (x, activated))
        return x, activated, shape

    def finish(self, x: jax.Array, shift, scale, shape: tuple) -> jax.Array:
        """The last layer, of `[R, w]` to `[..., out]` in float32."""
        out = self.out(self.final_norm(x) * (1 + scale) + shift).astype(jnp.float32)
        return out.reshape(*shape[:-1], -1)


class LoopDenoiser:
    """A `Denoiser` with its weights as products take them, for loops over calls of few rows.

    Made outside of the loop, it leaves nothing there to cut out of stacks of layers; modulations of
    all blocks are one product.
    """

    def __init__(self, denoiser: Denoiser):
        self._network = denoiser
        graph, params = nnx.split(denoiser.blocks)
        layers = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(denoiser.depth)]
        self._blocks = [nnx.merge(graph, layer) for layer in layers]
        modulations = [*(block.modulation for block in self._blocks), denoiser.final_modulation]
        join = functools.partial(jnp.concatenate, axis=1)
        self._kernel = join([m.kernel[...].astype(denoiser.dtype) for m in modulations])
        self._bias = jnp.concatenate([m.bias[...].astype(denoiser.dtype) for m in modulations])
        self.time, self.condition = denoiser.time, denoiser.condition

    def __call__(self, xt: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """As `Denoiser`."""
        x, activated, shape = self._network.rows(xt, time, condition)
        flat = product(activated, self._kernel.reshape(len(self._kernel), -1))  # [R, (3 L + 2) w]
        parts = jnp.split(flat + self._bias.reshape(-1), len(self._bias), 1)  # [R, w] each
        for i, block in enumerate(self._blocks):
            x = block.modulated(x, *parts[3 * i : 3 * i + 3])
        return self._network.finish(x, *parts[-2:], shape)
