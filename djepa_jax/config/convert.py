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


LIKELY = 0.7  # likeness from which on a name is suggested
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    tuple: "a list, such as 8,1,1",
    dict: "an object of keys",
}


BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True)
BOOLEANS |= dict.fromkeys(("false", "0", "no", "off"), False)
SYNONYMS = {  # keys, and what else people call them
    "num_steps": "steps max_steps train_steps num_train_steps epochs num_epochs iterations iters",
    "batch_size": "bs",
    "compute_dtype": "dtype precision",
    "optimizer.learning_rate": "lr",
    "optimizer.warmup_steps": "warmup",
    "optimizer.weight_decay": "wd",
    "optimizer.ema_decay": "ema ema_rate",
    "optimizer.clip_norm": "grad_clip max_grad_norm",
    "model.width": "dim hidden_size embed_dim",
    "model.encoder_depth": "depth num_layers",
    "model.num_heads": "heads",
    "data.path": "dir data data_dir data_path dataset",
    "data.image_size": "resolution",
    "data.num_classes": "classes",
    "data.num_threads": "workers num_workers",
    "sample.count": "n num num_samples",
    "sample.cfg_scale": "cfg guidance guidance_scale",
    "sample.num_denoise_steps": "sample.steps sampling_steps",
    "sample.temperature": "temp tau",
}


def is_group(kind) -> bool:
    """Whether an annotated type is that of a group of keys."""
    return dataclasses.is_dataclass(kind)


def check_options(key: str, options: Mapping, known: set[str], owner: str) -> None:
    """Raise ConfigError for a keyword that the owner of some options does not take."""
    for name in options.keys() - known:
        there = f"it has {', '.join(sorted(known))}" if known else "it has none"
        raise ConfigError(f"config.{key}.{name} is not an option of {owner}; {there}.")


def closest(name: str, known: Collection[str]) -> str | None:
    """The key that a word of the field or a misspelt name stands for, if there is a likely one."""
    name = name[:100].lower().replace("-", "_")
    group, _, last = name.rpartition(".")
    inside = [key for key in known if group and key.rpartition(".")[0] == group]
    for word in (name, last):
        for key, words in SYNONYMS.items():
            if word in words.split() and key in (inside or known):
                return key

    def likeness(other: str) -> float:
        pairs = (name, other), (last, other.rpartition(".")[2])
        alike = max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return alike - other.count(".") / 100  # of several equals the one that is not in a group

    best = max(sorted(inside or known), key=likeness)
    return best if likeness(best) > LIKELY else None


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """Nested dicts as one dict with dotted names; options stay as they are."""
    flat = {}
    for key, value in tree.items():
        is_options = key.endswith("options")
        nested = isinstance(value, Mapping) and not is_options
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def keys_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """The dotted names of all keys below a group and their types; the top alone has `num_steps`."""
    keys = {}
    for name, inner in field_types(kind).items():
        if is_group(inner):
            keys |= keys_of(inner, f"{prefix}{name}.")
        elif not (prefix and name == "num_steps"):
            keys[f"{prefix}{name}"] = inner
    return keys


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
    inside = [key for key in known if key.startswith(f"{name}.")]
    if inside:
        return ConfigError(f"config.{name} is a group of keys, such as config.{inside[0]}.")
    likely = closest(name, known)
    remedy = f"did you mean {likely}?" if likely else "djepa --help=keys shows all keys."
    return ConfigError(f"unknown config key {name}; {remedy}")


def from_word(word: str, kind: Any, name: str) -> Any:
    """A value of this type as it is typed: 1e3 is a whole number, and yes is true.

    Raises:
        ConfigError: it is of another type.
    """
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(kind) is tuple:
        parts = word.strip("()[] ").split(",") if word.strip("()[] ") else []
        return tuple(from_word(part.strip(), get_args(kind)[0], name) for part in parts)
    kind = get_origin(kind) or kind
    try:
        if kind is bool:
            return BOOLEANS[word.lower()]
        if kind is float:
            return float(word)
        if kind is int and float(word).is_integer():
            return int(float(word))
    except (KeyError, ValueError):
        pass  # said below
    if kind in (str, types.UnionType):
        return word
    raise ConfigError(f'config.{name} is "{word}"; it must be {WORDS.get(kind, kind.__name__)}.')


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
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(convert(each, get_args(kind)[0], name) for each in value)
    kind = get_origin(kind) or kind
    if kind is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"config.{name} is {value!r:.80}; it must be {WORDS[kind]}.")
