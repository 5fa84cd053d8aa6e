"""Values of a configuration and the types of their fields."""

import dataclasses
import difflib
import types
from collections.abc import Collection, Mapping
from typing import Annotated, Any, get_args, get_origin

from djepa_jax.core.bounds import field_types
from djepa_jax.runtime.errors import UserError


class ConfigError(UserError, ValueError):
    """A value that cannot work; the message names the key, the value and the remedy."""


WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    tuple: "a list of whole numbers",
    dict: "an object of keys",
}


def is_group(kind) -> bool:
    """Whether an annotated type is that of a group of keys."""
    return dataclasses.is_dataclass(kind)


def check_options(key: str, options: Mapping, known: set[str], owner: str) -> None:
    """Raise ConfigError for a keyword that the owner of some options does not take."""
    for name in options.keys() - known:
        there = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ConfigError(f"config.{key}.{name} is not an option of {owner}; {there}.")


def closest(name: str, known: Collection[str]) -> str:
    """The existing key most like a misspelt one, in its group if there is such a group."""
    group, _, last = name[:100].rpartition(".")
    inside = [key for key in known if group and key.rpartition(".")[0] == group]

    def likeness(other: str) -> float:
        same_depth = other.count(".") == name.count(".")
        other = other.rpartition(".")[2]
        is_short_for = last == "".join(word[0] for word in other.split("_"))
        return difflib.SequenceMatcher(None, last, other).ratio() + is_short_for + same_depth / 100

    return max(sorted(inside or known), key=likeness)


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """Nested dicts as one dict with dotted names; options stay as they are."""
    flat = {}
    for key, value in tree.items():
        is_options = key.endswith("options")
        nested = isinstance(value, Mapping) and not is_options
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def keys_of(kind: type, prefix: str = "") -> list[str]:
    """The dotted names of all keys below a group; `num_steps` is known to the top alone."""
    names = []
    for name, inner in field_types(kind).items():
        if is_group(inner):
            names += keys_of(inner, f"{prefix}{name}.")
        elif not (prefix and name == "num_steps"):
            names.append(f"{prefix}{name}")
    return names


def convert_group(values: Mapping, kind: type, prefix: str = "") -> dict:
    """The values of a group of keys, each converted to its field's type, groups in it too.

    Raises:
        ConfigError: a key that is unknown or missing, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.{prefix[:-1]} is {values!r:.80}; it must be an object of keys.")
    fields = field_types(kind)
    names = [name for name in fields if not (prefix and name == "num_steps")]
    unknown = next((name for name in values if name not in names), None)
    if unknown is not None:
        raise unknown_key(f"{prefix}{unknown}", [prefix + name for name in names])
    missing = next((name for name in names if name not in values), None)
    if missing is not None:
        raise ConfigError(f"config lacks the key {prefix}{missing}, which configs/default.py has.")
    return {name: convert(values[name], fields[name], f"{prefix}{name}") for name in names}


def unknown_key(name: str, known: Collection[str]) -> ConfigError:
    """The error for a key that there is not."""
    return ConfigError(f"unknown config key {name}; did you mean {closest(name, known)}?")


def convert(value: Any, kind: Any, name: str) -> Any:
    """A value as a field of this type holds it: lists as tuples, whole numbers as floats.

    Raises:
        ConfigError: it is of another type.
    """
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if is_group(kind):
        return convert_group(value, kind, f"{name}.")
    if get_origin(kind) is types.UnionType:  # text or several texts
        return value if isinstance(value, str) else tuple(map(str, value))
    kind = get_origin(kind) or kind
    if kind is tuple and isinstance(value, list | tuple) and set(map(type, value)) <= {int}:
        return tuple(value)
    if kind is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"config.{name} is {value!r:.80}; it must be {WORDS[kind]}.")
