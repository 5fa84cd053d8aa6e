"""Keys for fresh parameters."""

import jax


class Keys:
    """Gives one key after another: the n-th is that of `flax.nnx.Rngs`, `fold_in(key, n)`.

    It counts in Python. To count in an array, as flax does, took half of the time that building a
    model takes; layers that need flax's own take `nnx.Rngs(rngs.params())`.
    """

    def __init__(self, key: jax.Array | int):
        self._key = jax.random.key(key) if isinstance(key, int) else key
        self._given = 0

    def params(self) -> jax.Array:
        """The next key."""
        self._given += 1
        return jax.random.fold_in(self._key, self._given - 1)
