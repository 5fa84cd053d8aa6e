"""Files of tensors, read one by one: mappings that are dropped in time, and the memory that an
import takes.
"""

import pathlib
import shlex
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from official_files import as_torch, training_file
from safetensors.numpy import load_file, save_file
from tiny import CONFIG

from djepa_jax.checkpoints.convert import tensor_files
from djepa_jax.checkpoints.convert.official import official_shapes
from djepa_jax.checkpoints.convert.tensor_files import (
    TensorInfo,
    Tensors,
    open_tensors,
    save_tensors,
)
from djepa_jax.config import experiment as configuration
from djepa_jax.core.models.djepa import split_model
from djepa_jax.main import parse

MB = 10**6
SHARE = 1.3  # of the size of the file: what an import may take beside what the process had before
BUFFERS = (
    100 * MB
)  # more than that where files are small: threads that write keep some tens of MB whatever the size


class Shelf:
    """Something to read tensors from, which counts how often it was opened."""

    def __init__(self):
        self.opened, self.read = 0, []
        self.values = {
            name: np.full(250, number, np.float64) for number, name in enumerate("abcdefgh")
        }

    def tensors(self) -> Tensors:
        infos = {name: TensorInfo(value.shape, "float64") for name, value in self.values.items()}
        return Tensors(infos, self._open)

    def _open(self):
        self.opened += 1
        return self._get

    def _get(self, name: str) -> np.ndarray:
        self.read.append(name)
        return self.values[name]


def test_nothing_is_opened_or_read_before_it_is_needed():
    shelf = Shelf()
    tensors = shelf.tensors()
    assert list(tensors) == list("abcdefgh") and len(tensors) == 8 and "c" in tensors.shapes
    assert tensors.shapes["c"] == (250,) and tensors.converted == {"float64": 8}
    renamed = tensors.renamed({"x": "c"})
    assert shelf.opened == 0 and shelf.read == []
    assert list(renamed) == ["x"] and (renamed["x"] == 2).all()
    assert shelf.opened == 1 and shelf.read == ["c"]


def test_values_are_float32_and_free_of_the_file():
    shelf = Shelf()
    value = shelf.tensors()["b"]
    assert value.dtype == np.float32 and not np.shares_memory(value, shelf.values["b"])
    value[...] = 7
    assert (shelf.values["b"] == 1).all()


def test_file_is_opened_anew_before_too_much_of_it_is_mapped(monkeypatch):
    monkeypatch.setattr(
        tensor_files, "MAPPED_BYTES", 2000
    )  # two tensors of 1000 bytes, and the one that goes beyond
    shelf = Shelf()
    tensors = shelf.tensors()
    assert [float(tensors[name][0]) for name in tensors] == list(range(8)) and shelf.opened == 3
    tensors.close()
    assert (tensors["h"] == 7).all() and shelf.opened == 4, "reading goes on after closing"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_type_and_shape_is_read_as_it_was_written(suffix, tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "empty": (0, 3), "row": (5,), "cube": (2, 3, 4)}
    dtypes = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)
    arrays = {
        f"{n}_{np.dtype(t).name}": rng.standard_normal(s).astype(t)
        for n, s in shapes.items()
        for t in dtypes
    }
    if suffix == ".pth":
        content = {
            name: torch.tensor(value.astype(np.float64)).to(_torch_type(value))
            for name, value in arrays.items()
        }
        content["turned_float32"] = content["cube_float32"].permute(
            2, 0, 1
        )  # a view that is not contiguous
        torch.save(content, tmp_path / "a.pth")
        arrays["turned_float32"] = np.transpose(arrays["cube_float32"], (2, 0, 1))
    else:
        save_file(arrays, tmp_path / "a.safetensors")
    tensors = open_tensors(tmp_path / f"a{suffix}").weights["weights"]
    assert tensors.shapes == {name: value.shape for name, value in arrays.items()}
    assert tensors.converted == {"bfloat16": 4, "float16": 4, "float64": 4}
    for name, value in arrays.items():
        np.testing.assert_array_equal(tensors[name], value.astype(np.float32))


def _torch_type(value: np.ndarray) -> torch.dtype:
    return getattr(torch, value.dtype.name)


def test_written_files_are_readable_by_everybody(tmp_path):
    save_tensors(
        tmp_path / "a.safetensors", {"a": np.arange(6.0).reshape(2, 3).T}, {"layout": "djepa_jax"}
    )
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    np.testing.assert_array_equal(
        load_file(tmp_path / "a.safetensors")["a"], [[0, 3], [1, 4], [2, 5]]
    )
    assert open_tensors(tmp_path / "a.safetensors").metadata == {"layout": "djepa_jax"}


# A process that imports a small file, so that everything is loaded, then a large one; lines of
# (workdir, source, flags).
MEASURE = """
import pathlib, shlex, sys, torch
from djepa_jax.checkpoints.convert.importing import run_import
from djepa_jax.main import parse

def memory(field):  # of this process, not of the one that it was forked from
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def run(workdir, source, *flags):
    return run_import(parse(["djepa_jax", f"--workdir={workdir}", *flags]).config, workdir, source)

small, large = (shlex.split(line) for line in sys.stdin.read().splitlines())
run(*small)
before = memory("VmRSS")
lines = run(*large)
print(memory("VmHWM") - before, *lines, sep="\\n")
"""
SMALL = (64, 1)  # width and depth of a model


def flags_of(width: int, depth: int) -> list[str]:
    sizes = {
        "width": width,
        "encoder_depth": depth,
        "predictor_depth": depth,
        "denoiser_width": width,
    }
    return [
        f"--config={CONFIG}",
        *(f"--config.model.{key}={value}" for key, value in sizes.items()),
    ]


def random_tensors(width: int, depth: int) -> dict[str, np.ndarray]:
    """A model's tensors under the authors' names."""
    config = parse(["djepa_jax", "--workdir=unused", *flags_of(width, depth)]).config
    shapes = official_shapes(split_model(configuration.build(config).train.model)[1])
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_bare_safetensors(path: pathlib.Path, tensors: dict) -> None:
    save_file(tensors, path)


def write_bare_pth(path: pathlib.Path, tensors: dict) -> None:
    torch.save(as_torch(tensors), path)


def write_training_file(path: pathlib.Path, tensors: dict) -> None:
    """Four sets of the same size: the model, its average, and both moments."""
    moments = [as_torch(tensors).values() for _ in range(2)]
    state = {
        number: {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second}
        for number, (first, second) in enumerate(zip(*moments, strict=True))
    }
    optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "params": list(state)}]}
    torch.save(training_file(as_torch(tensors), as_torch(tensors), optimizer=optimizer), path)


WRITERS = {
    "bare.safetensors": write_bare_safetensors,
    "bare.pth": write_bare_pth,
    "training.pth": write_training_file,
}


def measure(name: str, size: tuple[int, int], folder: pathlib.Path) -> tuple[int, int]:
    """Bytes of a file of a model of `size`, and the most memory that its import took beside what
    was there.
    """
    lines = []
    for label, shape in (("small", SMALL), ("large", size)):
        (folder / label).mkdir()
        WRITERS[name](folder / label / name, random_tensors(*shape))
        lines.append(
            shlex.join([str(folder / label / "run"), str(folder / label / name), *flags_of(*shape)])
        )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input="\n".join(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("optimiser: its moments" in done.stdout) == (name == "training.pth")
    in_file = (folder / "large" / name).stat().st_size
    shutil.rmtree(folder / "large")  # pytest would keep it for days
    return in_file, int(done.stdout.splitlines()[0])


linux = pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="memory is read from /proc"
)


@linux
@pytest.mark.parametrize(
    ("name", "size"), [("bare.safetensors", (512, 6)), ("training.pth", (256, 6))]
)
def test_import_keeps_no_second_copy_in_memory(name, size, tmp_path):
    in_file, taken = measure(name, size, tmp_path)
    assert in_file > 150 * MB and SHARE * in_file + BUFFERS < 2 * in_file
    assert taken <= SHARE * in_file + BUFFERS, (
        f"{taken / MB:.0f} MB for a file of {in_file / MB:.0f} MB"
    )


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("bare.safetensors", (1024, 8)), ("bare.pth", (1024, 8)), ("training.pth", (512, 8))],
)
def test_import_of_a_large_file_takes_little_more_memory_than_its_size(name, size, tmp_path):
    in_file, taken = measure(name, size, tmp_path)
    assert in_file > 800 * MB
    assert taken <= SHARE * in_file, f"{taken / MB:.0f} MB for a file of {in_file / MB:.0f} MB"
