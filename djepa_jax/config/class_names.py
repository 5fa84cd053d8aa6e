"""Names of classes, and finding a class by index, name or part of a name."""

import difflib
import functools
import importlib.resources
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

IMAGENET = "imagenet"
MAX_LISTED = 12
MAX_BYTES = 2**24  # of a file of names


@functools.cache
def imagenet() -> tuple[tuple[str, str], ...]:
    """The 1000 ImageNet classes in the order of their index: (WordNet id, name)."""
    text = (
        importlib.resources.files("djepa_jax.config")
        .joinpath("assets/imagenet_classes.txt")
        .read_text("utf-8")
    )
    return tuple((wnid, name) for wnid, name in (line.split(" ", 1) for line in text.splitlines()))


def resolve(spec: str | Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names of all classes.

    Args:
        spec: "" for the numbers themselves (until the data say their names), "imagenet", the path
            of a text file with one name per line, or the names, as a checkpoint stores them.
        num_classes: how many there must be; 0 for any number.

    Raises:
        ValueError: no such file, or another number of names.
    """
    if spec == "":
        return tuple(str(index) for index in range(num_classes))
    names = _read(spec) if isinstance(spec, str) else tuple(spec)
    if num_classes and len(names) != num_classes:
        shown = f'"{spec}"' if isinstance(spec, str) else "a list"
        raise ValueError(
            f"data.class_names is {shown} with {len(names)} names, data.num_classes is "
            f"{num_classes}; correct either, "
            'or write "" for the names that the data have.'
        )
    return names


def _read(path: str) -> tuple[str, ...]:
    if path == IMAGENET:
        return tuple(name for _, name in imagenet())
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        lines = data.decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f'data.class_names is "{path}", which is neither "{IMAGENET}" nor a text file that '
            f"can be read ({error})."
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def as_number(name: str) -> int | None:
    """The whole number that a name is; None for others."""
    return int(name) if name.strip().removeprefix("-").isdecimal() else None


def called_by_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers, and others than the indices."""
    numbers = [as_number(name) for name in names]
    return None not in numbers and numbers != list(range(len(names)))


def in_order(names: Iterable[str]) -> list[str]:
    """Names as they are counted: sorted, as numbers if all of them are whole ones."""
    names = sorted(names)
    return names if None in map(as_number, names) else sorted(names, key=as_number)


def misplaced(names: Sequence[str], others: Sequence[str]) -> str | None:
    """A name that stands for one class here and for another there."""
    known = [_normal(name) for name in others]
    pairs = zip(names, known, strict=True)
    return next((name for name, other in pairs if _normal(name) in {*known} - {other}), None)


def split_regions(text: str) -> list[tuple[str, str]]:
    """Names and the words for their places, of a text such as "cat@left,dog@right".

    Raises:
        ValueError: a part without a name or a place.
    """
    parts = [part.rpartition("@") for part in text.split(",")]
    if not all(name and place for name, _, place in parts):
        raise ValueError("write CLASS@PLACE for each, such as 3@left,8@right.")
    return [(name, place) for name, _, place in parts]


def find_mixture(text: str, find: Callable[[str], Any]) -> tuple[np.ndarray, np.ndarray]:
    """What `find` makes of each part of a text such as "cat:0.5,dog:0.5" and their weights, which
    sum to one: `[K, ...]`, `[K]`.

    Raises:
        ValueError: there is no such class, or a weight that is not above 0.
    """
    found, weights = [], []
    for part in text.split(","):
        name, _, number = part.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and 0 < weight < math.inf):
            raise ValueError(f'"{part}" is not CLASS:WEIGHT with a weight above 0, such as 3:0.5.')
        found.append(find(name))
        weights.append(weight)
    return np.stack(found), np.asarray(weights, np.float32) / sum(weights)


def find_class(wanted: int | str, names: Sequence[str]) -> int:
    """The index of a class given as a name, a part that only one name has, or an index; case does
    not matter.

    A whole name wins over a part, and over the index that it would be: text "2" means the class
    called 2, where there is one, the number 2 always the index. With the ImageNet names a WordNet
    id such as n02099601 will do as well.

    Raises:
        ValueError: no such class, or several; the candidates are listed.
    """
    number = as_number(wanted) if isinstance(wanted, str) else None
    numbers = [as_number(name) for name in names]
    by_name = number is None or number in numbers or called_by_numbers(names)
    if not isinstance(wanted, str) or not by_name:
        return _by_index(wanted, names)
    word = _normal(wanted)
    if not word:
        raise ValueError("a class name is empty; give an index, a name or a part of one.")
    plain = [_normal(name) for name in names]
    for matches in (
        [i for i, name in enumerate(names) if name == wanted.strip()],
        [i for i, name in enumerate(plain) if name == word],
        [i for i, other in enumerate(numbers) if other == number is not None],
        _by_wordnet_id(word, names),
        [i for i, name in enumerate(plain) if word in name and number is None],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(
                f'"{wanted}" may be any of {listed(matches, names)}; write the index or more of '
                "the name."
            )
    similar = difflib.get_close_matches(word, dict.fromkeys(plain), n=5, cutoff=0.5)
    close = [i for name in similar for i, other in enumerate(plain) if other == name]
    hint = (
        f"the closest are {listed(close, names)}"
        if close
        else f"there are {listed(range(len(names)), names)}"
    )
    raise ValueError(f'"{wanted}" is not a class; {hint}.')


def _by_index(wanted: int | str, names: Sequence[str]) -> int:
    try:
        index = int(wanted) if isinstance(wanted, str) else operator.index(wanted)
    except TypeError:
        index = None
    if index is None or isinstance(wanted, bool):
        raise ValueError(f"{wanted!r} is not a class; give an index or a name.")
    if not 0 <= index < len(names):
        raise ValueError(f'"{wanted}" is not a class; classes are 0 to {len(names) - 1}.')
    return index


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _by_wordnet_id(word: str, names: Sequence[str]) -> list[int]:
    ids = imagenet()
    return [
        i
        for i, (wnid, name) in enumerate(ids)
        if wnid == word and len(names) == len(ids) and names[i] == name
    ]


def listed(indices: Sequence[int], names: Sequence[str]) -> str:
    """Some classes by index and name; a long list is cut."""
    shown = []
    for index in indices[:MAX_LISTED]:
        name = f'"{names[index]}"' if as_number(names[index]) is not None else names[index]
        shown.append(f"{index} {name}" if names[index] != str(index) else name.strip('"'))
    shown = ", ".join(shown)
    rest = len(indices) - MAX_LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
