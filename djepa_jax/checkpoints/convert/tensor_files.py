"""Files of tensors, read one tensor at a time: safetensors, and PyTorch checkpoints without running
their code.
"""

import argparse
import dataclasses
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from djepa_jax.runtime.errors import UserError

MAPPED_BYTES = (
    2**25
)  # read through one mapping of the file before it is dropped, with the memory behind it
WEIGHT_SETS = ("model_ema", "model")
LIGHTNING_SET = "state_dict"
COUNTER = ".num_batches_tracked"  # whole numbers that PyTorch's batch norms keep; they do no harm
BARE = "weights"
SAFE_TORCH = (2, 6)
INSTALL_TORCH = (
    'pip install "torch>=2.6" (or the extra: pip install -e ".[import]"), or convert the file to '
    ".safetensors"
)


class SourceError(UserError, ValueError):
    """A file that cannot be imported; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


class Tensors(Mapping):
    """A set of tensors in a file, as float32 arrays by name, each read when it is asked for.

    The file is opened anew every `MAPPED_BYTES`, because pages of a mapped file count as memory
    until it is closed.
    """

    def __init__(self, infos: dict[str, TensorInfo], reopen):
        self.infos, self._reopen = infos, reopen
        self._stored = self._mapped = None

    def __len__(self) -> int:
        return len(self.infos)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __getitem__(self, name: str) -> np.ndarray:
        if self._stored is None or self._mapped > MAPPED_BYTES:
            self._stored, self._mapped = None, 0  # the old mapping goes before a new one comes
            self._stored = self._reopen()
        value = np.array(self._stored(name), np.float32)  # a copy, free of the mapping
        self._mapped += value.nbytes
        return value

    def close(self) -> None:
        """Drop the mapping; reading goes on with a new one."""
        self._stored = None

    def renamed(self, stored_names: Mapping[str, str]) -> "Tensors":
        """Some of the tensors under other names: `stored_names` maps the new names to the stored
        ones.
        """

        def reopen():
            get = self._reopen()
            return lambda name: get(stored_names[name])

        return Tensors({new: self.infos[old] for new, old in stored_names.items()}, reopen)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: info.shape for name, info in self.infos.items()}

    @property
    def converted(self) -> dict[str, int]:
        """How many tensors are stored in another type than float32, by type."""
        dtypes = [info.dtype for info in self.infos.values() if info.dtype != "float32"]
        return {dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """What a file holds: sets of weights by name, and what else its writer kept."""

    path: pathlib.Path
    weights: dict[str, Tensors]  # "model_ema" and "model", or "weights"
    metadata: dict[str, Any]  # of a safetensors file; epoch of a PyTorch one
    moments: "AdamMoments | None" = None


@dataclasses.dataclass(frozen=True)
class AdamMoments:
    """State of a PyTorch Adam optimiser, whose parameters are numbered through its groups."""

    groups: tuple[tuple[int, ...], ...]
    step: int
    tensors: Tensors  # "NUMBER/exp_avg" and "NUMBER/exp_avg_sq"


def open_tensors(path: pathlib.Path, flag: str = "--source") -> SourceFile:
    """Open a `.safetensors`, `.pth` or `.pt` file, which `flag` names.

    Raises:
        SourceError: it is missing, a folder, cut short, of another kind, or holds code.
    """
    try:
        return _open(path)
    except SourceError as error:
        raise SourceError(f"{flag} {error}") from error


def _open(path: pathlib.Path) -> SourceFile:
    if path.is_dir():
        files = sorted(
            p.name for p in path.iterdir() if p.suffix in (".pth", ".pt", ".safetensors")
        )
        advice = (
            f"name a file in it: {', '.join(files)}"
            if files
            else "name a .pth or .safetensors file"
        )
        raise SourceError(f'"{path}" is a folder; {advice}.')
    if not path.is_file():
        raise SourceError(f'"{path}" does not exist; name a .pth or .safetensors file.')
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _open_torch(path)
    raise SourceError(f'"{path}" is of an unknown kind; it must end in .safetensors, .pth or .pt.')


def _unreadable(path: pathlib.Path, error: BaseException) -> SourceError:
    details = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    return SourceError(
        f'"{path}" cannot be read ({details}); it has {path.stat().st_size:,} bytes and is '
        "damaged, cut short or of "
        f"another kind than {path.suffix}. Copy or download it again."
    )


def _open_safetensors(path: pathlib.Path) -> SourceFile:
    import ml_dtypes  # noqa: F401 (JAX's; gives numpy the type bfloat16, which safetensors looks up by name)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            infos = {
                n: TensorInfo(tuple(s.get_shape()), _dtype_name(s.get_dtype()))
                for n, s in slices.items()
            }
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return SourceFile(
        path,
        {BARE: Tensors(_check_floats(path, infos), lambda: safe_open(path, "np").get_tensor)},
        metadata,
    )


def _dtype_name(name: str) -> str:
    """numpy's name of a safetensors type."""
    bits = "".join(filter(str.isdigit, name))
    return {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}.get(
        name.rstrip("0123456789"), name.lower()
    ) + bits


def _check_floats(path: pathlib.Path, infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    floats = ("float32", "float16", "bfloat16", "float64")
    odd = {
        n: i.dtype for n, i in infos.items() if i.dtype not in floats and not n.endswith(COUNTER)
    }
    if odd:
        listed = ", ".join(f"{name} ({dtype})" for name, dtype in list(odd.items())[:5])
        raise SourceError(
            f'"{path}" holds {len(odd)} tensors that are not floating-point numbers: {listed}.'
        )
    return infos


def _open_torch(path: pathlib.Path) -> SourceFile:
    content = _load_torch(path)
    if not isinstance(content, Mapping):
        raise SourceError(
            f'"{path}" holds a {type(content).__name__}; a dict of tensors is needed.'
        )
    sets = [name for name in WEIGHT_SETS if isinstance(content.get(name), Mapping)]
    weights = {name: _torch_set(path, content, name) for name in sets}
    if not sets:
        weights = {
            BARE: _torch_set(
                path,
                content,
                LIGHTNING_SET if isinstance(content.get(LIGHTNING_SET), Mapping) else None,
            )
        }
    epoch = content.get("epoch") if sets else None
    return SourceFile(
        path,
        weights,
        {"epoch": epoch} if isinstance(epoch, int) else {},
        _torch_moments(path, content),
    )


def _load_torch(path: pathlib.Path) -> Any:
    """The pickle's content, opened by torch's loader that builds tensors and plain containers and
    runs nothing.
    """
    try:
        import torch
    except ImportError as error:
        raise SourceError(
            f'"{path}" is a PyTorch file, and PyTorch is not installed: {INSTALL_TORCH}.'
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise SourceError(
            f'"{path}" is a PyTorch file, and the loader of PyTorch {torch.__version__} can be '
            "made to run code "
            f"(CVE-2025-32434): {INSTALL_TORCH}."
        )
    try:
        _check_unpacked(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:
        reason = (
            error.__context__ or error
        )  # what torch's advice, to load the file with its code, is wrapped around
        refused = re.search(r"GLOBAL ([\w.]+)", str(reason))
        if refused:
            raise SourceError(
                f'"{path}" asks for {refused[1]}, which a file of tensors does not need; it was '
                "refused, and "
                "nothing in it was run. Do not open this file with other tools unless you trust "
                "who made it."
            ) from error
        raise _unreadable(path, reason) from error


def _check_unpacked(path: pathlib.Path) -> None:
    """Raise ValueError for a zip of more bytes than it has itself: PyTorch compresses nothing, a
    bomb does.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")


def _torch_set(path: pathlib.Path, loaded: Mapping, name: str | None) -> Tensors:
    content = loaded if name is None else loaded[name]
    odd = [
        key
        for key, value in content.items()
        if not (isinstance(key, str) and _is_dense(value, path))
    ]
    if odd or not content:
        found = f"{odd[0]} is not a dense tensor" if odd else "it is empty"
        raise SourceError(
            f'"{path}" is not a checkpoint: {found}; a dict with "model" and perhaps "model_ema", '
            "or a plain "
            "dict of tensors, is needed."
        )
    infos = {
        key: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in content.items()
    }

    def reopen():
        whole = (
            _load_torch(path) if zipfile.is_zipfile(path) else loaded
        )  # files of old PyTorch cannot be mapped
        stored = whole if name is None else whole[name]
        return lambda key: stored[key].detach().float().numpy()

    return Tensors(_check_floats(path, infos), reopen)


def _is_dense(value: object, path: pathlib.Path) -> bool:
    """Whether a value is a tensor that has its numbers with it, and no more of them than fit into
    its file.
    """
    if not (
        hasattr(value, "untyped_storage")
        and str(value.layout) == "torch.strided"
        and value.device.type == "cpu"
    ):
        return False
    return value.nbytes <= path.stat().st_size  # one number can be made to stand for terabytes


def _torch_moments(path: pathlib.Path, content: Mapping) -> AdamMoments | None:
    """The optimiser's state, if the file has one in the form that PyTorch's Adam writes."""
    try:
        groups = tuple(tuple(group["params"]) for group in content["optimizer"]["param_groups"])
        state = {int(number): moments for number, moments in content["optimizer"]["state"].items()}
        steps = {int(moments["step"]) for moments in state.values()}
        (step,) = steps
        stored = _moment_tensors(state).items()
        if not (
            0 <= step < 2**31
            and all(_is_dense(value, path) and value.dtype.is_floating_point for _, value in stored)
        ):
            return None
        infos = {
            name: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for name, value in stored
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None

    def reopen():
        whole = _load_torch(path) if zipfile.is_zipfile(path) else content
        again = _moment_tensors(whole["optimizer"]["state"])
        return lambda name: again[name].detach().float().numpy()

    return AdamMoments(groups, step, Tensors(infos, reopen))


def _moment_tensors(state: Mapping) -> dict:
    return {
        f"{number}/{moment}": values[moment]
        for number, values in state.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def save_tensors(
    path: pathlib.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Write a safetensors file."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, metadata)
    path.chmod(0o644)  # safetensors makes files for their owner alone
