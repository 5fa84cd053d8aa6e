"""A configuration as data: `--config_json=FILE`, a JSON object laid over the keys of
`configs/default.py`.

Nothing in the file is executed. It names any of the keys, in groups as there or with dotted names;
the others keep their defaults. The `config.json` of a workdir and that of an export will do as they
are.
"""

import difflib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from absl import flags

from djepa_jax.config.experiment import LATER_KEYS, ConfigError, flatten
from djepa_jax.core.models.djepa import SIZES
from djepa_jax.runtime.storage import as_path

MAX_BYTES = 2**20
MAX_WHOLE = 2**63
MAX_KEY = 100  # characters that are looked at in an unknown key
DERIVED = (
    "loss.jepa_weight above 0"  # only a configuration that was stored has it; see `config.resolved`
)
NAMES = "data.class_names"  # text, or in a stored configuration the names themselves
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text in quotes",
    tuple: "a list of whole numbers",
}


def find(argv: Sequence[str]) -> str | None:
    """The file that --config_json names on a command line; None without the flag.

    Raises:
        ConfigError: there is a --config too, or no file after the flag.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # the words of flags unknown here do not end the search
    for name in ("config", "config_json"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    try:
        values(argv, known_only=True)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if None not in (values.config, values.config_json):
        raise ConfigError("--config and --config_json are both given; leave out one of them.")
    return values.config_json


def read(path: str, replaced: Collection[str] = ()) -> dict:
    """All keys of the configuration, nested: those in the file checked, the others as in
    `configs/default.py`.

    Args:
        path: the file.
        replaced: dotted names that the command line sets. They keep their defaults here, whose
            types its values take.

    Raises:
        ConfigError: the file cannot be read, or it has an unknown key or a value of the wrong type.
    """
    values = defaults()
    known = flatten(values)
    try:
        given = _restored(_checked(_named(_unpacked(_parsed(path))), known))
    except RecursionError:
        raise ConfigError(f'--config_json "{path}": it is nested too deeply.') from None
    except OSError as error:
        raise ConfigError(
            f'--config_json "{path}" cannot be read: {error.strerror or error}.'
        ) from error
    except ValueError as error:
        raise ConfigError(f'--config_json "{path}": {error}') from error
    for name in given.keys() - set(replaced):
        group, _, key = name.rpartition(".")
        (values[group] if group else values)[key] = given[name]
    return values


def defaults() -> dict:
    """Every key with its default."""
    from configs import default  # our own program; only those who name no other need it

    return default.get_config().to_dict()


def closest(key: str, known: Iterable[str]) -> str:
    """The existing key most like a misspelt one, by its last part first."""
    key = key[:MAX_KEY]  # comparing takes time that grows with the product of the lengths
    name = key.rpartition(".")[2]

    def likeness(other: str) -> float:
        same_place = (other[:3] == key[:3]) + (other.count(".") == key.count(".")) / 2
        return (
            difflib.SequenceMatcher(None, name, other.rpartition(".")[2]).ratio()
            + 0.01 * same_place
        )

    return max(known, key=likeness)


def _parsed(path: str) -> Any:
    """What the file says.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or is not strict JSON.
    """
    with as_path(path).open("rb") as file:
        data = file.read(MAX_BYTES + 1)  # so much of an endless one, too
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes.")
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_without_repeats,
            parse_constant=_refuse_constant,
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not JSON ({error}).") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    """An object of a JSON file; where a key stands twice nobody knows which is meant."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{_shown(key)} is given twice.")
        values[key] = value
    return values


def _refuse_constant(word: str):
    raise ValueError(f"{word} is not a number in JSON.")


def _unpacked(values: Any) -> dict:
    """The configuration itself: the file's object, or what an export's record calls "config"."""
    if isinstance(values, dict) and {"kind", "config"} <= values.keys():
        values = values["config"]
    if not isinstance(values, dict):
        raise ConfigError(
            f'it holds {_shown(values)}; it must hold an object such as {{"seed": 1}}.'
        )
    return values


def _named(values: dict) -> Iterator[tuple[str, Any]]:
    """Dotted names and values; an empty group only names itself."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            yield key, value


def _checked(pairs: Iterable[tuple[str, Any]], known: dict) -> dict:
    """The values by dotted name, each found to be of its default's type."""
    groups, given = {name.partition(".")[0] for name in known if "." in name}, {}
    types = {DERIVED: bool} | {name: type(value) for name, value in known.items()}
    for name, value in pairs:
        if name in given:
            raise ConfigError(f"{_shown(name)} is given twice.")
        if name in groups:
            if value != {}:
                raise ConfigError(f"{name} is {_shown(value)}; it must be an object of keys.")
            continue
        if name not in types:
            raise ConfigError(
                f"unknown config key {_shown(name)}; did you mean {closest(name, known)}?"
            )
        given[name] = _converted(name, value, types[name])
    return given


def _converted(name: str, value: Any, kind: type) -> Any:
    """A value as a config holds it.

    Raises:
        ConfigError: it is of another type.
    """
    items = set(map(type, value)) if isinstance(value, list) else None
    if kind is tuple and items == {int}:
        return tuple(value)
    if name == NAMES and items == {str}:
        return value
    if type(value) is int and abs(value) < MAX_WHOLE and kind in (int, float):
        return kind(value)
    if type(value) is kind and kind is not int and (kind is not float or math.isfinite(value)):
        return value
    raise ConfigError(f"{name} is {_shown(value)}; it must be {KINDS[kind]}.")


def _restored(given: dict) -> dict:
    """The values as the config had them that was stored, if the file is such a one.

    Without this --config.model.size would change nothing, since the numbers of the old size are
    written out.
    """
    if DERIVED not in given:
        return given
    given = LATER_KEYS | given
    for key, value in SIZES.get(given.get("model.size"), {}).items():
        if given.get(f"model.{key}") == value:
            given[f"model.{key}"] = 0
    return {name: value for name, value in given.items() if name != DERIVED}


def _shown(value: Any) -> str:
    """A value for a message that stays on one line."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) < 80 else text[:75] + "..."
