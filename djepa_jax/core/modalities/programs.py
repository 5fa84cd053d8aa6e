"""What a modality makes of a batch, as one program each, which equal modalities share.

Operation by operation, every one is compiled and launched alone: dozens for one batch.
"""

import functools

import jax

from djepa_jax.core.modalities.base import Modality


@functools.partial(jax.jit, static_argnums=0)
def tokenized(modality: Modality, examples: jax.Array) -> jax.Array:
    """Tokens `[B, N, C]` of examples `[B, ...]`, the mean of those that are drawn."""
    return modality.tokenize(examples)


@functools.partial(jax.jit, static_argnums=0)
def exported(modality: Modality, tokens: jax.Array) -> dict[str, jax.Array]:
    """What the modality exports of tokens `[B, N, C]`."""
    return modality.export(tokens)


@functools.partial(jax.jit, static_argnums=0)
def exported_unheard(modality: Modality, tokens: jax.Array) -> dict[str, jax.Array]:
    """What the modality exports of tokens `[B, N, C]`, but for sound, which takes long."""
    return {name: x for name, x in modality.export(tokens).items() if name != "sound"}


@functools.partial(jax.jit, static_argnums=0)
def shown(modality: Modality, examples: jax.Array) -> dict[str, jax.Array]:
    """What is exported of the tokens of examples `[B, ...]`, but for sound."""
    return exported_unheard(modality, modality.tokenize(examples))


@functools.partial(jax.jit, static_argnums=0)
def heard(modality: Modality, examples: jax.Array) -> jax.Array:
    """The sound `[B, S]` of the tokens of examples `[B, ...]`."""
    return modality.export(modality.tokenize(examples))["sound"]
