"""Bounds of settings, written as types: a field `count: Positive` is a whole number from 1 on."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Collection
from typing import Annotated, Any

MAX_SEED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a value must be, as a function and in words that follow "it must be"."""

    accepts: Callable[[Any], bool]
    text: str


class OneOf:
    """A bound: the value is a key of a table, which may grow later."""

    def __init__(self, table: Collection[str]):
        self.table = table

    def accepts(self, value: str) -> bool:
        """Whether the table has the value."""
        return value in self.table

    @property
    def text(self) -> str:
        """The keys."""
        return f"one of {', '.join(sorted(self.table))}"


Positive = Annotated[int, Bound(lambda x: x >= 1, "at least 1")]
Natural = Annotated[int, Bound(lambda x: x >= 0, "at least 0")]
Seed = Annotated[int, Bound(lambda x: 0 <= x <= MAX_SEED, f"between 0 and {MAX_SEED}")]
Finite = Annotated[float, Bound(math.isfinite, "a finite number")]
AboveZero = Annotated[float, Bound(lambda x: 0 < x < math.inf, "above 0")]
AtLeastZero = Annotated[float, Bound(lambda x: 0 <= x < math.inf, "a finite number from 0 on")]
Moderate = Annotated[float, Bound(lambda x: 0 <= x <= 1e6, "from 0 to a million")]
Share = Annotated[float, Bound(lambda x: 0 <= x < 1, "at least 0 and below 1")]
Fraction = Annotated[float, Bound(lambda x: 0 <= x <= 1, "from 0 to 1")]
Ratio = Annotated[float, Bound(lambda x: 0 < x <= 1, "above 0 and at most 1")]


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """The annotated type of every field of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_bounds(settings) -> None:
    """Raise ValueError, with name and value, unless all fields of a dataclass are within bounds."""
    for name, kind in field_types(type(settings)).items():
        value = getattr(settings, name)
        for bound in getattr(kind, "__metadata__", ()):
            if not bound.accepts(value):
                raise ValueError(f"{name} is {value!r}; it must be {bound.text}.")
