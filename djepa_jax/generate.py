"""From a trained model to pictures on disk: batches of samples, grids, npz files."""

import dataclasses
import json
import pathlib
import shlex
import sys
import zipfile

import jax
import numpy as np
from tqdm import tqdm

from djepa_jax import config as configuration
from djepa_jax import sharding
from djepa_jax.checkpoint import CheckpointError, Checkpoints, check_writable
from djepa_jax.config import ConfigError, Experiment
from djepa_jax.logs import label_grid, save_png
from djepa_jax.models.djepa import split_model
from djepa_jax.sample import make_sampler

MAX_GRID = 100


class Generator:
    """The jitted sampler on a mesh; one compilation serves every call, whatever the count."""

    def __init__(self, config, experiment: Experiment, mesh):
        self.config, self.experiment, self.mesh = config, experiment, mesh
        divisor = sharding.batch_divisor(mesh)
        self.batch_size = -(-config.sample.batch_size // divisor) * divisor
        self._sampler = jax.jit(make_sampler(experiment.sample), out_shardings=sharding.replicated(mesh))

    def __call__(self, params, labels, seed: int, progress: bool = False) -> np.ndarray:
        """Sample one token map per label: `[n, N, C]` float32.

        Sample i depends on (seed, i) alone, so the last, padded batch changes nothing.
        """
        sample, count = self.config.sample, len(labels)
        scales = configuration.step_scales(self.config, self.experiment.modality.num_tokens)
        place = sharding.batch_sharding(self.mesh)
        batches = []
        for start in tqdm(range(0, count, self.batch_size), "sampling", unit="batch", disable=None if progress else True):
            ids = np.arange(start, start + self.batch_size, dtype=np.int32)
            wanted = np.asarray(labels, np.int32)[ids % count]
            ids, wanted = jax.device_put((ids, wanted), place)
            batches.append(np.asarray(self._sampler(params, wanted, ids, seed, scales, sample.temperature)))
        return np.concatenate(batches)[:count]

    def images(self, params, labels, seed: int, progress: bool = False) -> dict[str, np.ndarray]:
        """Sampled examples as the modality exports them."""
        return self.experiment.modality.export(self(params, labels, seed, progress))


def load_ema(config, experiment: Experiment, workdir, mesh):
    """Moving-average parameters of the latest checkpoint, placed on the mesh, and their step.

    Raises:
        CheckpointError: nothing to load, or it is damaged.
        ConfigError: the checkpoint is of another model than the config describes.
    """
    checkpoints = Checkpoints(workdir)
    try:
        meta = checkpoints.read_meta()
        check_same_model(meta.config, config)
        _, abstract = split_model(experiment.train.model)
        shardings = sharding.state_shardings(abstract, mesh)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        return checkpoints.restore_ema(abstract, meta.step), meta.step
    finally:
        checkpoints.close()


def check_same_model(stored: dict, config) -> None:
    """Raise ConfigError, with every difference, unless a checkpoint's model is the one the config describes."""
    changed = configuration.differences(stored, configuration.resolved(config), configuration.MODEL_KEYS)
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"the checkpoint is of another model (stored -> config):\n  {lines}\nUse its config, or another --workdir."
        )


def command_line(*extra: str) -> str:
    """The command that is running, with `extra` flags, ready to be pasted from the folder it was started in."""
    python = sys.executable
    if pathlib.Path(python).is_relative_to(pathlib.Path.cwd()):
        python = str(pathlib.Path(python).relative_to(pathlib.Path.cwd()))
    return shlex.join([python, "-m", "djepa_jax.main", *sys.argv[1:], *extra])


def output_paths(out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The grid's and the arrays' file for a name given with either ending, or with none."""
    base = out.with_suffix("") if out.suffix in (".png", ".npz") else out
    return base.with_name(base.name + ".png"), base.with_name(base.name + ".npz")


def make_grid(images: np.ndarray, labels) -> np.ndarray:
    """A labelled grid of the first pictures: uint8 `[H', W', 3]`."""
    return label_grid(images[:MAX_GRID], [str(label) for label in labels[:MAX_GRID]])


def save_samples(out: pathlib.Path, arrays: dict, labels, settings: dict) -> list[pathlib.Path]:
    """Write `OUT.npz` with everything and, where there are pictures, a labelled grid `OUT.png`; return the paths."""
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings)
    png, npz = output_paths(out)
    np.savez(npz, **arrays, labels=np.asarray(labels, np.int32), settings=text)
    if "images" not in arrays:
        return [npz]
    save_png(png, make_grid(arrays["images"], labels), {"command": command_line(), "settings": text})
    return [png, npz]


def stored_settings(npz: pathlib.Path) -> dict | None:
    """The settings in a file that `save_samples` wrote; None if there is none or it cannot be read."""
    try:
        with np.load(npz, allow_pickle=False) as arrays:
            return json.loads(str(arrays["settings"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def run_sample(config, workdir: str, out: str) -> list[pathlib.Path]:
    """The `--mode=sample` command: sample the moving average of the latest checkpoint into files."""
    experiment = configuration.build(config)
    mesh = sharding.make_mesh(config.mesh)
    params, step = load_ema(config, experiment, workdir, mesh)
    target = pathlib.Path(out) if out else pathlib.Path(workdir) / "samples" / "sample.png"
    if any(path.is_dir() for path in (target, *output_paths(target))):
        raise CheckpointError(f'--out "{out}" is a folder; name a file in it, such as {target / "sample.png"}.')
    check_writable(target.parent, "--out")
    labels = experiment.sample_labels
    arrays = Generator(config, experiment, mesh).images(params, labels, config.sample.seed, progress=True)
    settings = {"step": step, "model": dataclasses.asdict(experiment.train.model), "sample": config.sample.to_dict()}
    return save_samples(target, arrays, labels, settings)
