"""Names of classes, and finding a class by index, name or part of a name."""

import difflib
import functools
import importlib.resources
import operator
from collections.abc import Sequence

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
        spec: "" for the numbers themselves, "imagenet", the path of a text file with one name per
            line, or the names, as a checkpoint stores them.
        num_classes: how many there must be.

    Raises:
        ValueError: no such file, or another number of names.
    """
    if spec == "":
        return tuple(str(index) for index in range(num_classes))
    names = _read(spec) if isinstance(spec, str) else tuple(spec)
    if len(names) != num_classes:
        shown = f'"{spec}"' if isinstance(spec, str) else "a list"
        raise ValueError(
            f"data.class_names is {shown} with {len(names)} names, data.num_classes is "
            f"{num_classes}; correct either, "
            'or write "" to call classes by their number.'
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


def find_class(wanted: int | str, names: Sequence[str]) -> int:
    """The index of a class given as a number, a name, or a part that only one name has; case does
    not matter.

    A whole name wins over a part. With the ImageNet names a WordNet id such as n02099601 will do as
    well.

    Raises:
        ValueError: no such class, or several; the candidates are listed.
    """
    if not isinstance(wanted, str) or wanted.strip().removeprefix("-").isdecimal():
        return _by_index(wanted, names)
    word = _normal(wanted)
    if not word:
        raise ValueError("a class name is empty; give an index, a name or a part of one.")
    plain = [_normal(name) for name in names]
    for matches in (
        [i for i, name in enumerate(plain) if name == word],
        _by_wordnet_id(word, names),
        [i for i, name in enumerate(plain) if word in name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(
                f'"{wanted}" may be any of {_listed(matches, names)}; write the index or more of '
                "the name."
            )
    similar = difflib.get_close_matches(word, dict.fromkeys(plain), n=5, cutoff=0.5)
    close = [i for name in similar for i, other in enumerate(plain) if other == name]
    hint = (
        f"the closest are {_listed(close, names)}"
        if close
        else f"there are {_listed(range(len(names)), names)}"
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


def _listed(indices: Sequence[int], names: Sequence[str]) -> str:
    shown = ", ".join(
        f"{i} {names[i]}" if names[i] != str(i) else str(i) for i in list(indices)[:MAX_LISTED]
    )
    rest = len(indices) - MAX_LISTED
    return f"{shown} and {rest} more" if rest > 0 else shown
