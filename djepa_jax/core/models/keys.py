"""Keys for fresh parameters."""

import jax
import jax.numpy as jnp

AHEAD = 16  # keys that are made at once


class Keys:
    """Gives one key after another: the n-th is that of `flax.nnx.Rngs`, `fold_in(key, n)`.

    It counts in Python, and folds in many numbers at once. To count in an array, as flax does, took
    half of the time that building a model takes, and a key at a time a quarter of that in which its
    program compiles; layers that need flax's own take `nnx.Rngs(rngs.params())`.
    """

    def __init__(self, key: jax.Array | int):
        self._key = jax.random.key(key) if isinstance(key, int) else key
        self._given = 0

    def params(self) -> jax.Array:
        """The next key."""
        place = self._given % AHEAD
        if place == 0:
            numbers = jnp.arange(self._given, self._given + AHEAD)
            self._made = jax.vmap(jax.random.fold_in, (None, 0))(self._key, numbers)  # [AHEAD]
        self._given += 1
        return self._made[place]
