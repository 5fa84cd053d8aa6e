"""The context encoder as a program of its own, for features of whole examples."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from djepa_jax.core.modalities import Modality
from djepa_jax.core.models.djepa import ContextEncoder, ModelConfig
from djepa_jax.core.models.keys import Keys


@functools.lru_cache(maxsize=8)
def make_encoder(network: ModelConfig, modality: Modality):
    """The jitted encoder: (params of a context encoder, examples, conditions `[B]`) -> the prefix
    and the features `[B, P + N, D]` float32.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: ContextEncoder(network, rngs=Keys(0))))

    def encode(params, examples, conditions):
        encoder = nnx.merge(graph, params)
        tokens = modality.tokenize(examples)  # [B, N, C]
        order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
        condition = encoder.embed_condition(conditions)
        return encoder(tokens, order, condition).astype(jnp.float32)

    return jax.jit(encode)
