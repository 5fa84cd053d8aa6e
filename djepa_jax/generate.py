"""From a trained model to pictures on disk: batches of samples, grids, npz files."""

import dataclasses
import functools
import json
import pathlib
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from etils import epath

from djepa_jax import config as configuration
from djepa_jax import hosts, sharding
from djepa_jax.checkpoint import Checkpoints
from djepa_jax.config import ConfigError, Experiment
from djepa_jax.decoder import Autoencoder
from djepa_jax.models.djepa import split_model
from djepa_jax.orbax_io import CheckpointError
from djepa_jax.paths import as_path, check_writable, write_npz
from djepa_jax.pictures import label_grid, save_png
from djepa_jax.sample import SampleSpec, Segment, make_sampler, make_step, plan_segments

MAX_GRID = 100
# Flags, with underscores for all hyphens, that belong to one start and not to the run.
OF_ONE_START = tuple(
    f"__{flag}=" for flag in ("distributed", "coordinator", "num_processes", "process_id", "heartbeat_timeout", "restore_from")
)
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in what XLA says then


@functools.lru_cache(maxsize=8)
def jitted_sampler(spec: SampleSpec, mesh) -> Callable:
    """The sampler as one program per batch size; calls with equal settings share it."""
    return jax.jit(make_sampler(spec), out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def jitted_step(spec: SampleSpec, segment: Segment) -> Callable:
    """One autoregressive step of the sampler, padded to the shapes of `segment`."""
    return jax.jit(make_step(spec, segment))


class Generator:
    """The jitted sampler on a mesh; one compilation serves every call, whatever the count."""

    def __init__(self, config, experiment: Experiment, mesh, autoencoder: Autoencoder | None = None):
        self.config, self.experiment, self.mesh = config, experiment, mesh
        divisor = sharding.batch_divisor(mesh)
        self.batch_size = -(-config.sample.batch_size // divisor) * divisor
        self._autoencoder = autoencoder
        self.scales = configuration.step_scales(config, experiment.modality.num_tokens)  # [T]

    def __call__(self, params, labels, seed: int, progress: bool = False) -> np.ndarray:
        """Sample one token map per label: `[n, N, C]` float32.

        Sample i depends on (seed, i) alone, so the last, padded batch changes nothing.
        """
        sampler = jitted_sampler(self.experiment.sample, self.mesh)
        temperature, batches = self.config.sample.temperature, []
        try:
            for wanted, ids in progress_bar(self._batches(labels), progress):
                batches.append(np.asarray(sampler(params, wanted, ids, seed, self.scales, temperature)))
        except jax.errors.JaxRuntimeError as error:  # processes would have to halve together
            if OUT_OF_MEMORY not in str(error) or jax.process_count() > 1 or not self._halve():
                raise
            return self(params, labels, seed, progress)
        return np.concatenate(batches)[: len(labels)]

    def _halve(self) -> bool:
        """Make batches half as large after running out of memory; False where they cannot be. It changes no sample."""
        divisor = sharding.batch_divisor(self.mesh)
        half = self.batch_size // 2 // divisor * divisor
        if half == 0:
            return False
        print(f"WARNING: not enough memory for {self.batch_size} samples at a time; going on with {half}", flush=True)
        self.batch_size = half
        return True

    def _batches(self, labels) -> list[tuple[jax.Array, jax.Array]]:
        """Labels and sample numbers on the devices, batch by batch; the last one is padded."""
        labels, place, batches = np.asarray(labels, np.int32), sharding.batch_sharding(self.mesh), []
        for start in range(0, len(labels), self.batch_size):
            ids = np.arange(start, start + self.batch_size, dtype=np.int32)
            batches.append(jax.device_put((labels[ids % len(labels)], ids), place))
        return batches

    def images(self, params, labels, seed: int, progress: bool = False) -> dict[str, np.ndarray]:
        """Sampled examples as `export` gives them."""
        return self.export(self(params, labels, seed, progress))

    def export(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """What the modality makes of tokens `[n, N, C]`; latents with their pictures, if there is an autoencoder."""
        arrays = {name: np.asarray(array) for name, array in self.experiment.modality.export(tokens).items()}
        if "latents" not in arrays or not self.config.autoencoder.path:
            return arrays
        return arrays | {"images": self.autoencoder.decode(arrays["latents"])}

    @property
    def autoencoder(self) -> Autoencoder:
        """The configured autoencoder, read when it is first needed."""
        if self._autoencoder is None:
            self._autoencoder = Autoencoder(self.config.autoencoder, self.mesh)
        return self._autoencoder

    def stream(self, params, labels, seed: int) -> Iterator[np.ndarray]:
        """The tokens `[n, N, C]` after each autoregressive step, zero where not yet revealed.

        The last ones are what a call gives. All samples are held at once.
        """
        spec = self.experiment.sample
        batches = self._batches(labels)
        states = [spec.start(len(ids)) for _, ids in batches]
        for segment in plan_segments(spec):
            for number in range(segment.start, segment.stop):
                tokens = []
                for index, (wanted, ids) in enumerate(batches):
                    states[index], raster = jitted_step(spec, segment)(
                        params, states[index], wanted, ids, seed, number, self.scales[number], self.config.sample.temperature
                    )
                    tokens.append(np.asarray(raster))
                yield np.concatenate(tokens)[: len(labels)]


def progress_bar(batches: list, show: bool) -> Iterable:
    """The batches, with a bar where a terminal is watching."""
    if not show:
        return batches
    from tqdm import tqdm  # the command line's dependency, not the Python interface's

    return tqdm(batches, "sampling", unit="batch", disable=None)


def load_ema(config, experiment: Experiment, workdir, mesh):
    """Moving-average parameters of the latest checkpoint, placed on the mesh, and their step.

    Raises:
        CheckpointError: nothing to load, or it is damaged.
        ConfigError: the checkpoint is of another model than the config describes.
    """
    checkpoints = Checkpoints(workdir)
    meta = checkpoints.read_meta()
    check_same_model(meta.config, config)
    return checkpoints.restore_ema(placed_params(experiment, mesh), meta.step), meta.step


def placed_params(experiment: Experiment, mesh) -> dict:
    """Shapes, dtypes and shardings of the parameters on a mesh."""
    _, abstract = split_model(experiment.train.model)
    shardings = sharding.state_shardings(abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def check_same_model(stored: dict, config) -> None:
    """Raise ConfigError, with every difference, unless a checkpoint's model is the one the config describes."""
    stored = configuration.upgraded(stored)
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
    flags = [word for word in sys.argv[1:] if not word.replace("-", "_").startswith(OF_ONE_START)]
    return shlex.join([python, "-m", "djepa_jax.main", *flags, *extra])


def output_paths(out: epath.Path) -> tuple[epath.Path, epath.Path]:
    """The grid's and the arrays' file for a name given with either ending, or with none."""
    base = out.with_suffix("") if out.suffix in (".png", ".npz") else out
    return base.with_name(base.name + ".png"), base.with_name(base.name + ".npz")


def make_grid(images: np.ndarray, labels, names) -> np.ndarray:
    """A grid of the first pictures, each under its class name: uint8 `[H', W', 3]`."""
    return label_grid(images[:MAX_GRID], [names[label] for label in labels[:MAX_GRID]])


def save_samples(out: epath.Path, arrays: dict, labels, names, settings: dict) -> list[epath.Path]:
    """Write `OUT.npz` and, where there are pictures, a labelled grid `OUT.png`; return the paths.

    The arrays are called as in ADM's files, `arr_0` the images and `arr_1` the labels; settings and the rest stand beside.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings)
    png, npz = output_paths(out)
    images = {"arr_0": arrays["images"]} if "images" in arrays else {}
    others = {name: array for name, array in arrays.items() if name != "images"}
    write_npz(npz, images | {"arr_1": np.asarray(labels, np.int32), "settings": np.asarray(text)} | others)
    if "images" not in arrays:
        return [npz]
    save_png(png, make_grid(arrays["images"], labels, names), {"command": command_line(), "settings": text})
    return [png, npz]


def stored_settings(npz: epath.Path) -> dict | None:
    """The settings in a file that `save_samples` wrote; None if there is none or it cannot be read."""
    try:
        with npz.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return json.loads(str(arrays["settings"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def run_sample(config, workdir: str, out: str) -> list[epath.Path]:
    """The `--mode=sample` command: sample the moving average of the latest checkpoint into files."""
    experiment = configuration.build(config)
    mesh = sharding.make_mesh(config.mesh)
    params, step = load_ema(config, experiment, workdir, mesh)
    target = as_path(out or as_path(workdir) / "samples" / "sample.png")
    if any(path.is_dir() for path in (target, *output_paths(target))):
        raise CheckpointError(f'--out "{out}" is a folder; name a file in it, such as {target / "sample.png"}.')
    hosts.on_main(lambda: check_writable(target.parent, "--out"))
    labels = experiment.sample_labels
    arrays = Generator(config, experiment, mesh).images(params, labels, config.sample.seed, progress=True)
    if not hosts.is_main():
        return []
    settings = {"step": step, "model": dataclasses.asdict(experiment.train.model), "sample": config.sample.to_dict()}
    return save_samples(target, arrays, labels, experiment.class_names, settings)
