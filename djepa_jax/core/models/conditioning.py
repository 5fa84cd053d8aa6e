"""What is asked for, as prefix tokens in front of the sequence, which both ViTs attend to.

A conditioner turns raw conditions (labels, several of them, nothing) into a `Condition`. Guidance
and dropping act on raw conditions; the networks see the prefix alone and do not know what was said.
The official code calls the prefix a buffer of 64 tokens and adds the class vector to each of them.

Shape letters: B batch, P prefix, D width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from djepa_jax.core.models.embedding import ClassEmbedding, Condition
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.text import Embeddings, Text


class Conditioner(Protocol):
    """One kind of condition; implementations are frozen dataclasses.

    Raw conditions are arrays with the leading axis B, or a tuple of such arrays.
    """

    param_name: str  # of the embedding's parameters inside the context encoder

    period: int  # after how many conditions `in_turn` begins anew

    def null(self, batch_size: int) -> Any:
        """Raw conditions that say nothing."""

    def drop(self, key: jax.Array, raw: Any, probability: float) -> Any:
        """Raw conditions of which each example's is replaced by the null one with a probability."""

    def in_turn(self, count: int) -> Any:
        """Raw conditions that take all there are in turn, for sampling without a wish."""

    def make_embedding(self, width: int, *, rngs: Keys) -> nnx.Module | None:
        """The module with the parameters; None if there are none."""

    def embed(self, embedding: nnx.Module | None, raw: Any) -> Condition:
        """What is added to the learned prefix tokens: `[B, P, D]`, or `[B, 1, D]` for all alike."""


@dataclasses.dataclass(frozen=True)
class Classes:
    """Labels `[B]`, of which `num_classes` means none."""

    num_classes: int

    param_name = "class_embedding"

    @property
    def period(self) -> int:
        """The number of classes."""
        return self.num_classes

    def null(self, batch_size: int) -> jax.Array:
        """The label of no class, `[B]`."""
        return jnp.full(batch_size, self.num_classes, jnp.int32)

    def drop(self, key: jax.Array, raw: jax.Array, probability: float) -> jax.Array:
        """Labels `[B]`, some of them replaced by the null label."""
        return jnp.where(jax.random.bernoulli(key, probability, raw.shape), self.num_classes, raw)

    def in_turn(self, count: int) -> np.ndarray:
        """0, 1, 2 and so on, from 0 again after the last class: `[count]`."""
        return np.arange(count, dtype=np.int32) % self.num_classes

    def make_embedding(self, width: int, *, rngs: Keys) -> ClassEmbedding:
        """A vector per class and one for none."""
        if self.num_classes == 0:
            raise ValueError(
                "data.num_classes is 0, as many as the data have, and no data are read here; set "
                "--config.data.num_classes to that number."
            )
        return ClassEmbedding(self.num_classes, width, rngs=rngs)

    def embed(self, embedding: ClassEmbedding, raw: jax.Array) -> Condition:
        """The class vector, the same for every prefix token: `[B, 1, D]`."""
        return Condition(embedding(raw)[:, None])


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No condition: the learned prefix alone. Raw conditions are ignored but for their length."""

    param_name = "no_embedding"
    period = 1

    def null(self, batch_size: int) -> jax.Array:
        """Zeros `[B]`."""
        return jnp.zeros(batch_size, jnp.int32)

    def drop(self, key: jax.Array, raw: jax.Array, probability: float) -> jax.Array:
        """The same; there is nothing to drop."""
        return raw

    def in_turn(self, count: int) -> np.ndarray:
        """Zeros `[count]`."""
        return np.zeros(count, np.int32)

    def make_embedding(self, width: int, *, rngs: Keys) -> None:
        """There are no parameters."""

    def embed(self, embedding: None, raw: jax.Array) -> Condition:
        """Nothing is added: zeros `[B, 1, 1]`."""
        return Condition(jnp.zeros((len(raw), 1, 1)))


@dataclasses.dataclass(frozen=True)
class Sum:
    """Two conditions whose prefixes are added, such as digit and speaker; raw is a pair."""

    first: Conditioner
    second: Conditioner

    param_name = "pair_embedding"

    @property
    def period(self) -> int:
        """The number of pairs."""
        return self.first.period * self.second.period

    def null(self, batch_size: int) -> tuple:
        """Both say nothing."""
        return self.first.null(batch_size), self.second.null(batch_size)

    def drop(self, key: jax.Array, raw: tuple, probability: float) -> tuple:
        """Both of an example are dropped together, since one key decides."""
        dropped = self.first.drop(key, raw[0], probability)
        return dropped, self.second.drop(key, raw[1], probability)

    def in_turn(self, count: int) -> tuple:
        """All pairs in turn: those of the second one's first condition, then of its next."""
        return self.pair(self.first.in_turn(count), self.first.period)

    def pair(self, first: Any, period: int) -> tuple:
        """Raw first conditions, and of the second ones, in turn, another for each `period`."""
        count = len(jax.tree.leaves(first)[0])
        rounds = np.arange(count) // period
        return first, jax.tree.map(lambda leaf: leaf[rounds], self.second.in_turn(count))

    def make_embedding(self, width: int, *, rngs: Keys) -> nnx.Dict:
        """Those of both."""
        first = self.first.make_embedding(width, rngs=rngs)
        return nnx.Dict(first=first, second=self.second.make_embedding(width, rngs=rngs))

    def embed(self, embedding: nnx.Dict, raw: tuple) -> Condition:
        """The sum of the prefixes; a place is seen if both say so."""
        one = self.first.embed(embedding.first, raw[0])
        other = self.second.embed(embedding.second, raw[1])
        masks = [condition.mask for condition in (one, other) if condition.mask is not None]
        mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]
        return Condition(one.prefix + other.prefix, mask)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """`count` conditions of one kind at once: the mean of their prefixes, with weights.

    It has the parameters of the `kind`, so that a model that was trained on one condition at a time
    takes mixtures. Raw is a pair: conditions with the leading axes B, count, and weights
    `[B, count]`.
    """

    kind: Conditioner
    count: int

    @property
    def param_name(self) -> str:
        """That of the kind."""
        return self.kind.param_name

    @property
    def period(self) -> int:
        """That of the kind."""
        return self.kind.period

    def null(self, batch_size: int) -> tuple:
        """The null condition with all of the weight."""
        nulls = jax.tree.map(self._repeated, self.kind.null(batch_size))
        return nulls, jnp.zeros((batch_size, self.count)).at[:, 0].set(1)

    def drop(self, key: jax.Array, raw: tuple, probability: float) -> tuple:
        """All conditions of an example are dropped together."""
        parts = [self.kind.drop(key, part, probability) for part in self._parts(raw[0])]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *parts), raw[1]

    def in_turn(self, count: int) -> tuple:
        """One condition after the other, unmixed."""
        raw = jax.tree.map(lambda x: np.asarray(self._repeated(x)), self.kind.in_turn(count))
        return raw, np.eye(self.count, dtype=np.float32)[np.zeros(count, int)]

    def make_embedding(self, width: int, *, rngs: Keys) -> nnx.Module | None:
        """That of the kind."""
        return self.kind.make_embedding(width, rngs=rngs)

    def embed(self, embedding: nnx.Module | None, raw: tuple) -> Condition:
        """The weighted mean of the prefixes; a place is seen if one of them says so."""
        parts = [self.kind.embed(embedding, part) for part in self._parts(raw[0])]
        weights = jnp.moveaxis(raw[1], 1, 0)[..., None, None]  # [count, B, 1, 1]
        prefix = sum(w * part.prefix for w, part in zip(weights, parts, strict=True))
        masks = [part.mask for part in parts if part.mask is not None]
        return Condition(prefix, jnp.stack(masks).any(0) if masks else None)

    def _parts(self, raw: Any) -> list:
        return [jax.tree.map(lambda x, i=i: x[:, i], raw) for i in range(self.count)]

    def _repeated(self, x: jax.Array) -> jax.Array:
        return jnp.repeat(x[:, None], self.count, axis=1)


def class_pair(num_classes: int, second_classes: int) -> Sum:
    """Two labels, such as digit and speaker."""
    if second_classes < 1:
        raise ValueError(
            f"model.condition_options.second_classes is {second_classes}; it must be at least 1."
        )
    return Sum(Classes(num_classes), Classes(second_classes))


# Makes a conditioner from the number of classes and `config.model.condition_options`.
CONDITIONERS: dict[str, Callable[..., Conditioner]] = {
    "classes": Classes,
    "nothing": lambda num_classes: Nothing(),
    "text": lambda num_classes, **options: Text(**options),
    "embeddings": lambda num_classes, **options: Embeddings(**options),
    "class_pair": class_pair,
}
