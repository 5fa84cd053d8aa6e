"""Files of tensors: safetensors, and PyTorch checkpoints, of which no code is ever run."""

import argparse
import dataclasses
import functools
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (gives numpy the type bfloat16, by which safetensors asks for it)
import numpy as np

from djepa_jax.runtime.errors import UserError

# Groups of tensors in a PyTorch checkpoint, the likelier names first.
TRAINED = ("model", "state_dict")
AVERAGES = ("model_ema", "ema", "state_dict_ema")
OPTIMIZERS = ("optimizer", "opt")
MOMENTS = ("exp_avg", "exp_avg_sq")
WHOLE = "weights"  # the group of a file that has no others
WRAPPERS = ("module.", "_orig_mod.")  # in front of every name when a wrapped model was saved
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
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


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """What a file holds: groups of named tensors, and which of them is what."""

    groups: dict[str, Tensors]  # of the average, and of what training goes on with
    average: str = WHOLE  # or the only weights there are
    trained: str | None = None
    moments: Tensors | None = None  # "N/exp_avg", "N/exp_avg_sq" of the Nth parameter
    step: int = 0  # of the optimiser that has these moments
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()  # names of everything else


def open_tensors(path: pathlib.Path, flag: str = "--source") -> SourceFile:
    """Open the `.safetensors`, `.pth` or `.pt` file that `flag` names; no tensor is read yet."""
    where = f'{flag} "{path}"'
    if not path.is_file() or path.suffix not in SUFFIXES:
        found = "is a folder" if path.is_dir() else "does not exist"
        kind = "is of an unknown kind" if path.is_file() else found
        raise SourceError(f"{where} {kind}; name a .safetensors, .pth or .pt file.")
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
    except SourceError as error:
        raise SourceError(f"{where} {error}") from error
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of torch, of safetensors, of the system
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise SourceError(
            f"{where} cannot be read ({reason}); it has {path.stat().st_size:,} bytes and is "
            f"damaged, cut short or of another kind than {path.suffix}. Copy or download it again."
        ) from error


def _open_safetensors(path: pathlib.Path) -> SourceFile:
    from safetensors import safe_open

    file = safe_open(path, "np")
    tensors = {}
    for name in file.keys():  # noqa: SIM118 (not a mapping)
        stored = file.get_slice(name)
        dtype = FLOATS.get(stored.get_dtype(), stored.get_dtype())
        read = functools.partial(file.get_tensor, name)
        tensors[name] = StoredTensor(tuple(stored.get_shape()), dtype, read)
    return SourceFile({WHOLE: _checked(tensors)}, metadata=dict(file.metadata() or {}))


def _checked(tensors: Tensors) -> Tensors:
    """Floating-point tensors, without the prefixes that a wrapped model gives to all of them."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values() and not name.endswith(COUNTER):
            raise SourceError(
                f"holds {name!r} of type {tensor.dtype}, not floating-point; name other weights."
            )
    for prefix in WRAPPERS * 2:  # one may be in the other, either way
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _open_torch(path: pathlib.Path) -> SourceFile:
    content = _load_torch(path)
    size = path.stat().st_size
    if not isinstance(content, Mapping):
        raise SourceError(f"holds a {type(content).__name__}; a dict of tensors is needed.")
    filled = [name for name, value in content.items() if isinstance(value, Mapping) and value]
    trained = next((name for name in TRAINED if name in filled), None)
    average = next((name for name in AVERAGES if name in filled), trained)
    if average is None:
        return SourceFile({WHOLE: _torch_tensors(content, size)})
    names = dict.fromkeys(name for name in (average, trained) if name)
    groups = {name: _torch_tensors(content[name], size) for name in names}
    optimizer = next((name for name in OPTIMIZERS if trained and name in filled), None)
    moments, step = _torch_moments(content.get(optimizer), size)
    metadata = {"epoch": content["epoch"]} if isinstance(content.get("epoch"), int) else {}
    used = {*groups, *metadata, optimizer if moments else None}
    unread = tuple(repr(name)[:60] for name in content if name not in used)
    return SourceFile(groups, average, trained, moments, step, metadata, unread)


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
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        reason = error.__context__ or error  # without torch's advice to run the code as well
        refused = re.search(r"GLOBAL ([\w.]+)", str(reason))
        if refused:
            raise SourceError(
                f"asks for {refused[1]}, which a file of tensors does not need; nothing in it was "
                "run. Do not open it with other tools unless you trust who made it."
            ) from error
        raise reason from None


def _torch_tensors(content: Mapping, size: int) -> Tensors:
    """Tensors of a file of `size` bytes, of which none may claim more, as one number could."""
    tensors = {}
    for name, value in content.items():
        dense = hasattr(value, "untyped_storage") and str(value.layout) == "torch.strided"
        dense = dense and value.device.type == "cpu" and value.nbytes <= size
        if not (dense and isinstance(name, str)):
            raise SourceError(
                f"is not a checkpoint: {name!r} is not a dense tensor; a dict of tensors is "
                f"needed, or one with {' or '.join(TRAINED)} and perhaps {' or '.join(AVERAGES)}."
            )
        dtype = str(value.dtype).removeprefix("torch.")
        read = functools.partial(lambda tensor: tensor.detach().float().numpy(), value)
        tensors[name] = StoredTensor(tuple(value.shape), dtype, read)
    return _checked(tensors)


def _torch_moments(optimizer: Mapping | None, size: int) -> tuple[Tensors | None, int]:
    """The moments and the step in an optimiser's state, if PyTorch's Adam wrote it."""
    try:
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        states = dict(enumerate(optimizer["state"][number] for number in numbers))
        moments = {f"{n}/{name}": state[name] for n, state in states.items() for name in MOMENTS}
        (step,) = {int(state["step"]) for state in states.values()}
        return (_torch_tensors(moments, size), step) if 0 <= step < 2**31 else (None, 0)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None, 0


def save_tensors(path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict) -> None:
    """Write a safetensors file."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, metadata)
    path.chmod(0o644)  # safetensors makes files for their owner alone
