"""The memory that an import takes beside what the process had before."""

import pathlib
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from official_files import as_torch, training_file
from safetensors.numpy import save_file
from tiny import CONFIG

from djepa_jax.checkpoints.convert.official import official_shapes
from djepa_jax.core.models.djepa import split_model
from djepa_jax.main import parse

MB = 10**6
SHARE = 1.5  # of the size of the file: what an import may take
BUFFERS = 60 * MB  # of the threads that write, whatever the size of the file
SMALL = (64, 1)  # width and depth of a model
# Imports a small file, so that everything is loaded, then a large one; lines of (workdir, source,
# flags). Prints how far the resident memory rose, and how much of it is not the mapped file, whose
# pages the system takes back when it needs them.
MEASURE = """
import pathlib, shlex, sys, torch
from djepa_jax.checkpoints.convert.import_weights import run_import
from djepa_jax.main import parse

def memory(field):  # of this process, not of the one that it was forked from
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def run(workdir, source, *flags):
    return run_import(parse(["djepa_jax", f"--workdir={workdir}", *flags])[1], workdir, source)

small, large = (shlex.split(line) for line in sys.stdin.read().splitlines())
run(*small)
before = memory("VmRSS")
report = run(*large)
taken = memory("VmHWM") - before
print(taken - pathlib.Path(large[1]).stat().st_size, *report, sep="\\n")
"""


def flags_of(width: int, depth: int) -> list[str]:
    sizes = {
        "width": width,
        "encoder_depth": depth,
        "predictor_depth": depth,
        "denoiser_width": width,
    }
    return [f"--config={CONFIG}", *(f"--config.model.{k}={value}" for k, value in sizes.items())]


def write(path: pathlib.Path, width: int, depth: int) -> None:
    """A model's tensors under the authors' names; a training file has them four times."""
    experiment = parse(["djepa_jax", "--workdir=unused", *flags_of(width, depth)])[1]
    shapes = official_shapes(split_model(experiment.network)[1])
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if path.name == "bare.safetensors":
        save_file(tensors, path)
    elif path.name == "bare.pth":
        torch.save(as_torch(tensors), path)
    else:
        state = {
            number: {"step": torch.tensor(3.0), "exp_avg": value, "exp_avg_sq": value.clone()}
            for number, value in enumerate(as_torch(tensors).values())
        }
        optimizer = {"state": state, "param_groups": [{"lr": 1e-3, "params": list(state)}]}
        torch.save(training_file(as_torch(tensors), as_torch(tensors), optimizer=optimizer), path)


def measure(name: str, size: tuple[int, int], folder: pathlib.Path) -> tuple[int, int]:
    """Bytes of a file of a model of `size`, and of the memory of its own that its import took."""
    lines = []
    for label, shape in (("small", SMALL), ("large", size)):
        (folder / label).mkdir()
        write(folder / label / name, *shape)
        paths = [str(folder / label / "run"), str(folder / label / name)]
        lines.append(shlex.join([*paths, *flags_of(*shape)]))
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
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
    ("name", "size"), [("bare.safetensors", (512, 4)), ("training.pth", (256, 4))]
)
def test_import_keeps_no_second_copy_in_memory(name, size, tmp_path):
    in_file, taken = measure(name, size, tmp_path)
    assert in_file > 125 * MB and SHARE * in_file + BUFFERS < 2 * in_file
    assert taken <= SHARE * in_file + BUFFERS, f"{taken / MB:.0f} of {in_file / MB:.0f} MB"


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [("bare.safetensors", (1024, 8)), ("bare.pth", (1024, 8)), ("training.pth", (512, 8))],
)
def test_import_of_a_large_file_takes_little_more_memory_than_its_size(name, size, tmp_path):
    in_file, taken = measure(name, size, tmp_path)
    assert in_file > 800 * MB and taken <= SHARE * in_file, f"{taken / MB:.0f} MB"
