"""Keys for fresh parameters."""

import jax


class Keys:
    """Gives one key after another: the n-th is that of `flax.nnx.Rngs`, `fold_in(key, n)`.

    It counts in Python, not in an array of the model: that takes half the time to build one.
    """

    def __init__(self, key: jax.Array | int):
        self._key = jax.random.key(key) if isinstance(key, int) else key
        self._given = 0

    def params(self) -> jax.Array:
        """The next key."""
        self._given += 1
        return jax.random.fold_in(self._key, self._given - 1)
