"""Files of tensors: safetensors, and PyTorch checkpoints, of which no code is ever run."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (gives numpy the type bfloat16, by which safetensors asks for it)
import numpy as np

from djepa_jax.runtime.errors import UserError

# Groups of tensors in a file, by a word of their names.
AVERAGE = re.compile(r"(?<![a-z])(ema|swa|shadow|avg|averaged?)(?![a-z])", re.IGNORECASE)
TRAINED = re.compile(r"(?<![a-z])(model|state_dict|params|net|network)(?![a-z])", re.IGNORECASE)
WHOLE = "weights"  # the group of a file that has no others
OPTIMIZER = {"state", "param_groups"}  # keys of an optimiser's state
MOMENTS = ("exp_avg", "exp_avg_sq")
SAFETENSORS, INDEX = ".safetensors", ".index.json"
SUFFIXES = (SAFETENSORS, INDEX, ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")
KINDS = "a .safetensors, .pth or .pt file, or the .index.json of a sharded one"
# Plain values that may lie beside the tensors; nothing is built in their place.
VALUES = re.compile(
    r"(argparse|collections|datetime|ml_collections|numpy|omegaconf|pathlib|types|typing)\..+"
    "|bool|bytes|dict|float|frozenset|int|list|range|set|slice|str|tuple"
    r"|torch\.torch_version\.TorchVersion"
)
MAX_ENTRIES, MAX_DEPTH = 10**6, 8  # of the containers in a file
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
COUNTER = ".num_batches_tracked"  # whole numbers of PyTorch's batch norms; they do no harm


class SourceError(UserError, ValueError):
    """A file that cannot be imported; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `np.asarray` reads it, as float32."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.read(), np.float32)  # a copy, which needs the file no more


Tensors = Mapping[str, StoredTensor]


class LeftOut:
    """In the place of a value beside the tensors: it takes what it is given, and does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """What a source holds: groups of named tensors, and which of them is what."""

    files: tuple[pathlib.Path, ...]
    groups: dict[str, Tensors]  # of the average, and of what training goes on with
    average: str = WHOLE  # or what stands in for it
    trained: str | None = None
    moments: Tensors | None = None  # "N/exp_avg", "N/exp_avg_sq" of the Nth parameter
    step: int = 0  # of the optimiser that has these moments
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()  # names of everything else


def open_tensors(path: pathlib.Path, flag: str = "--source") -> SourceFile:
    """Open the file of tensors, or the folder of one, that `flag` names; no tensor is read yet.

    With `PATH@GROUP`, that group of tensors in the file is the average.
    """
    name, at, group = str(path).rpartition("@")
    if not at or path.exists():
        name, group = str(path), ""
    try:
        files, content, metadata = _read(pathlib.Path(name))
        return _sort_out(files, content, metadata, group)
    except SourceError as error:
        raise SourceError(f'{flag} "{path}" {error}') from error


def _read(path: pathlib.Path) -> tuple[tuple[pathlib.Path, ...], Any, dict]:
    """The files of a source, what is in them, and the metadata of a single one."""
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if _has(file, *SUFFIXES))
        found = [file for file in inside if _has(file, INDEX)] or inside
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "no weights"
            raise SourceError(f"is a folder with {names} in it; name {KINDS}.")
        path = found[0]
    if not path.is_file() or not _has(path, *SUFFIXES):
        found = "is of an unknown kind" if path.is_file() else "does not exist"
        raise SourceError(f"{found}; name {KINDS}.")
    if not _has(path, INDEX):
        return (path,), *_read_file(path)
    with _readable(path):
        places = json.loads(path.read_text("utf-8"))["weight_map"]  # name of a tensor -> file
        files = tuple(path.with_name(name) for name in sorted(set(places.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SourceError(f"needs {', '.join(missing)} beside it; copy or download all files.")
    contents = {file.name: _read_file(file)[0] for file in files}
    with _readable(path):
        return files, {name: contents[file][name] for name, file in places.items()}, {}


def _has(path: pathlib.Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Raise what torch, safetensors or the system say of a file as one line."""
    try:
        yield
    except (SourceError, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise SourceError(
            f"cannot be read ({reason}); {path.name} has {path.stat().st_size:,} bytes and is "
            "damaged, cut short or of another kind than it is called. Copy or download it again."
        ) from error


def _read_file(path: pathlib.Path) -> tuple[Any, dict]:
    """What is in a file, and its metadata."""
    with _readable(path):
        if not _has(path, SAFETENSORS):
            return _load_torch(path), {}
        from safetensors import safe_open

        file, tensors = safe_open(path, "np"), {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            stored = file.get_slice(name)
            dtype = FLOATS.get(stored.get_dtype(), stored.get_dtype())
            read = functools.partial(file.get_tensor, name)
            tensors[name] = StoredTensor(tuple(stored.get_shape()), dtype, read)
        return tensors, dict(file.metadata() or {})


def _load_torch(path: pathlib.Path) -> Any:
    """What a PyTorch file holds: tensors, mapped and not read yet, in plain containers.

    From PyTorch 2.6 on the loader builds nothing else and runs nothing (CVE-2025-32434).
    """
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise SourceError(
            "needs PyTorch 2.6 or later, whose loader runs no code: "
            'pip install "torch>=2.6" (or -e ".[import]"), or convert the file to .safetensors.'
        )
    mapped = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 are not
    if mapped:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("it is compressed, which PyTorch never does")  # a bomb may be
    values: dict[str, type] = {}
    while True:  # once more for every kind of value
        try:
            with torch.serialization.safe_globals([*values.values()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            reason = error.__context__ or error  # without torch's advice to run the code as well
            refused = re.search(r"(GLOBAL |got <class ')([\w.]+)", str(reason))
            name = refused[2] if refused else ""
            if VALUES.fullmatch(name) and name not in values:
                module, _, kind = name.rpartition(".")
                values[name] = type(kind, (LeftOut,), {"__module__": module or "builtins"})
            elif name:
                raise SourceError(
                    f"asks for {name}, which a file of tensors does not need; nothing in it was "
                    "run. If you trust who made it: save the state_dict() of the model alone, "
                    "where it was made, and import that."
                ) from error
            else:
                raise reason from None


def _sort_out(files: tuple, content: Any, metadata: dict, asked: str) -> SourceFile:
    """Find out which tensors are the average and the trained weights, and name what is left."""
    size = sum(file.stat().st_size for file in files)
    groups, optimizers, objects = _collect(content, size)
    average, trained = _choose(groups, asked, objects)
    used = {name: _checked(groups[name]) for name in dict.fromkeys((average, trained)) if name}
    if trained and [*used[average]] == [str(n) for n in range(len(used[trained]))]:  # a list
        used[average] = dict(zip(used[trained], used[average].values(), strict=True))
    optimizer, state = next(iter(optimizers.items()), ("", {}))
    moments, step = _torch_moments(state, size) if trained else (None, 0)
    top = content if isinstance(content, Mapping) else {}
    if isinstance(top.get("epoch"), int):
        metadata = metadata | {"epoch": top["epoch"]}
    told = [f"{name}." for name in (*groups, *metadata, optimizer if moments else "")]
    unread = [
        ascii(name)[:60]
        for name, value in top.items()
        if not (_stored(value, size) or any(known.startswith(f"{name}.") for known in told))
    ]
    unread += [f"'{name}' (@{name} makes it the average)" for name in groups if name not in used]
    return SourceFile(files, used, average, trained, moments, step, metadata, tuple(unread))


def _collect(content: Any, size: int) -> tuple[dict[str, dict], dict[str, Mapping], list[str]]:
    """Groups of tensors, optimisers' states and objects called averages, by where they are."""
    groups: dict[str, dict[str, StoredTensor]] = {}
    optimizers, objects = {}, []
    for count, (path, value) in enumerate(_walk(content)):
        if count > MAX_ENTRIES:
            raise SourceError(f"holds more than {MAX_ENTRIES:,} entries; name other weights.")
        place = ".".join(path)
        if isinstance(value, Mapping) and value.keys() >= OPTIMIZER:
            optimizers[place] = value
        elif isinstance(value, LeftOut) and AVERAGE.search(place):
            objects.append(place)
        elif path and (tensor := _stored(value, size)):
            *parents, name = path
            first, _, rest = name.partition(".")
            if rest and AVERAGE.search(first):  # an average among the tensors of its model
                parents, name = [*parents, first], rest
            groups.setdefault(".".join(parents) or WHOLE, {})[name] = tensor
    weights = {
        group: tensors
        for group, tensors in groups.items()
        if any(tensor.shape and tensor.dtype in FLOATS.values() for tensor in tensors.values())
    }
    return weights, optimizers, objects


def _walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in nested containers, with the keys that lead to it; no optimiser's insides."""
    yield path, value
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and not value.keys() >= OPTIMIZER and len(path) < MAX_DEPTH:
        for key, inner in value.items():
            yield from _walk(inner, (*path, str(key)))


def _choose(groups: dict[str, dict], asked: str, objects: list[str]) -> tuple[str, str | None]:
    """The names of the average, or of what stands in for it, and of the trained weights."""
    if not groups or (asked and asked not in groups):
        raise SourceError(
            f"holds no group of dense floating-point tensors{asked and f' called {asked}'}; groups "
            f"that there are: {', '.join(groups) or 'none'}."
        )
    largest_first = sorted(groups, key=lambda name: -len(groups[name]))
    others = [name for name in largest_first if not AVERAGE.search(name)]
    averages = [asked] if asked else [name for name in largest_first if name not in others]
    if objects and not averages:
        raise SourceError(
            f"keeps '{objects[0]}' as an object, of which no code is run; save its state_dict() "
            f"where it was made, or add @{others[0]} to make that the average."
        )
    trained = [name for name in others if TRAINED.search(name) or name == WHOLE]
    trained += others if not averages else []
    return (averages or trained)[0], trained[0] if trained else None


def _stored(value: Any, size: int) -> StoredTensor | None:
    """A tensor of a file of `size` bytes, of which none may claim more, as one number could."""
    if isinstance(value, StoredTensor):
        return value
    if not hasattr(value, "untyped_storage"):
        return None
    dense = str(value.layout) == "torch.strided" and value.device.type == "cpu"
    dtype = str(value.dtype).removeprefix("torch.")
    if not dense or value.nbytes > size:
        dtype = f"{value.layout} {dtype} on {value.device}"
    read = functools.partial(lambda tensor: tensor.detach().float().numpy(), value)
    return StoredTensor(tuple(value.shape), dtype, read)


def _checked(tensors: Tensors) -> Tensors:
    """Dense floating-point tensors, without the prefixes that all of them have in common."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values() and not name.endswith(COUNTER):
            raise SourceError(
                f"holds {name!r} of type {tensor.dtype}, where dense floating-point tensors are "
                "needed; name other weights."
            )
    while len({name.partition(".")[0] for name in tensors}) == 1 and all("." in n for n in tensors):
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors


def _torch_moments(optimizer: Mapping, size: int) -> tuple[Tensors | None, int]:
    """The moments and the step in an optimiser's state, if PyTorch's Adam wrote it."""
    try:
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        states = dict(enumerate(optimizer["state"][number] for number in numbers))
        moments = {
            f"{n}/{name}": _stored(state[name], size)
            for n, state in states.items()
            for name in MOMENTS
        }
        (step,) = {int(state["step"]) for state in states.values()}
        return (_checked(moments), step) if 0 <= step < 2**31 else (None, 0)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None, 0


def save_tensors(path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a safetensors file."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, metadata)
    path.chmod(0o644)  # safetensors makes files for their owner alone
