"""From a trained model to pictures: batches of samples, grids, npz files."""

import contextlib
import functools
import json
import pathlib
import shlex
import sys
import types
import zipfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from djepa_jax.checkpoints.autoencoder import (
    Autoencoder,
    has_autoencoder,
    weights_sha256,
)
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.sampler import SampleSpec, Segment, make_sampler, make_step, plan_segments
from djepa_jax.runtime.errors import OUT_OF_MEMORY
from djepa_jax.runtime.storage import write_npz
from djepa_jax.sampling.grids import label_grid, save_png

MAX_GRID = 100
# Flags, with underscores for all hyphens, that belong to one start and not to the run.
OF_ONE_START = tuple(
    f"__{flag}"
    for flag in (
        *("distributed", "coordinator", "num_processes", "process_id"),
        *("rendezvous_timeout", "heartbeat_timeout", "restore_from"),
    )
)


class Stopped(Exception):
    """Sampling was asked to stop, and has stopped after a batch."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


@functools.lru_cache(maxsize=8)
def jitted_sampler(spec: SampleSpec, mesh) -> Callable:
    """The sampler as one program per batch size; calls with equal settings share it."""
    return jax.jit(make_sampler(spec), out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def jitted_step(spec: SampleSpec, segment: Segment) -> Callable:
    """One autoregressive step of the sampler, padded to the shapes of `segment`."""
    return jax.jit(make_step(spec, segment))


class Generator:
    """The jitted sampler on a mesh; one compilation serves every call, whatever the count.

    Sample i depends on (seed, i) alone: neither how many there are nor where a batch begins changes
    it.

    Args:
        config: `sample` and `autoencoder` of it are used.
        experiment: built from it.
        mesh: of the devices.
        autoencoder: in place of the one that the config names.
        decode: whether to make pictures of latents, where there is an autoencoder.
    """

    def __init__(
        self,
        config,
        experiment: Experiment,
        mesh,
        autoencoder: Autoencoder | None = None,
        decode: bool = True,
    ):
        self.config, self.experiment, self.mesh = config, experiment, mesh
        divisor = sharding.batch_divisor(mesh)
        self.batch_size = -(-config.sample.batch_size // divisor) * divisor
        self.decodes = decode and has_autoencoder(config)
        self._autoencoder = autoencoder
        self.scales = configuration.step_scales(config, experiment.modality.num_tokens)  # [T]

    def __call__(self, params, labels, seed: int) -> np.ndarray:
        """Sample one token map per label: `[n, N, C]` float32."""
        return np.concatenate(
            [tokens[:count] for tokens, count in self._sampled(params, labels, seed)]
        )

    def images(
        self,
        params,
        labels,
        seed: int,
        progress: bool = False,
        should_stop: Callable[[], bool] = never,
    ) -> dict[str, np.ndarray]:
        """All samples of `batches`, in memory."""
        parts = list(self.batches(params, labels, seed, 0, progress, should_stop))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def batches(
        self,
        params,
        labels,
        seed: int,
        first: int = 0,
        progress: bool = False,
        should_stop: Callable[[], bool] = never,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Samples from number `first` on, batch by batch, as `export` gives them.

        Args:
            params: the model's parameters, on the mesh.
            labels: one for each sample, from number 0 on.
            seed: of everything random.
            first: number of the first sample.
            progress: show a bar where a terminal is watching.
            should_stop: asked before every batch; with several processes all must be told the same.

        Raises:
            Stopped: it was asked to.
        """
        for tokens, count in self._sampled(params, labels, seed, first, progress, should_stop):
            yield self.export(tokens, count)

    def _sampled(
        self, params, labels, seed, first=0, progress=False, should_stop=never
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Tokens `[B, N, C]` and how many of them count, for the last batch is padded."""
        start = first
        with progress_bar(len(labels), first, progress) as bar:
            while start < len(labels):
                if should_stop():
                    raise Stopped
                tokens = self._sample_batch(params, labels, start, seed)
                count = min(len(tokens), len(labels) - start)
                yield tokens, count
                start += count
                bar.update(count)

    def _sample_batch(self, params, labels, start: int, seed: int) -> np.ndarray:
        """The batch that begins with a sample; a smaller one if memory is short, which changes no
        sample.
        """
        sampler = jitted_sampler(self.experiment.sample, self.mesh)
        while True:
            try:
                wanted, ids = self._batch(labels, start)
                return np.asarray(
                    sampler(params, wanted, ids, seed, self.scales, self.config.sample.temperature)
                )
            except jax.errors.JaxRuntimeError as error:  # processes would have to halve together
                if OUT_OF_MEMORY not in str(error) or jax.process_count() > 1 or not self._halve():
                    raise

    def _halve(self) -> bool:
        """Make batches half as large after running out of memory; False where they cannot be. It
        changes no sample.
        """
        divisor = sharding.batch_divisor(self.mesh)
        half = self.batch_size // 2 // divisor * divisor
        if half == 0:
            return False
        print(
            f"WARNING: not enough memory for {self.batch_size} samples at a time; going on with "
            f"{half}",
            flush=True,
        )
        self.batch_size = half
        return True

    def _batch(self, labels, start: int) -> tuple[jax.Array, jax.Array]:
        """Labels and numbers of the samples from `start` on, on the devices, padded to a whole
        batch.
        """
        ids = np.arange(start, start + self.batch_size, dtype=np.int32)
        wanted = np.asarray([labels[i % len(labels)] for i in ids], np.int32)
        return jax.device_put((wanted, ids), sharding.batch_sharding(self.mesh))

    def export(self, tokens: np.ndarray, count: int | None = None) -> dict[str, np.ndarray]:
        """What the modality makes of the first `count` of tokens `[n, N, C]`; latents with their
        pictures, if it `decodes`.
        """
        exported = self.experiment.modality.export(
            tokens
        )  # of all, so that a padded batch compiles nothing anew
        arrays = {name: np.asarray(array)[:count] for name, array in exported.items()}
        return arrays | (
            {"images": self.autoencoder.decode(arrays["latents"])} if self.decodes else {}
        )

    @property
    def autoencoder(self) -> Autoencoder:
        """The configured autoencoder, read when it is first needed."""
        if self._autoencoder is None:
            self._autoencoder = Autoencoder(
                self.config.autoencoder, self.mesh, self.config.data.staging
            )
        return self._autoencoder

    @functools.cached_property
    def autoencoder_sha256(self) -> str:
        """Of the autoencoder that makes the pictures; empty where there is none."""
        if not self.decodes:
            return ""
        return (
            self._autoencoder.sha256
            if self._autoencoder is not None
            else weights_sha256(self.config)
        )

    def stream(self, params, labels, seed: int) -> Iterator[np.ndarray]:
        """The tokens `[n, N, C]` after each autoregressive step, zero where not yet revealed.

        The last ones are what a call gives. All samples are held at once.
        """
        spec = self.experiment.sample
        batches = [self._batch(labels, start) for start in range(0, len(labels), self.batch_size)]
        states = [spec.start(len(ids)) for _, ids in batches]
        for segment in plan_segments(spec):
            for number in range(segment.start, segment.stop):
                tokens = []
                for index, (wanted, ids) in enumerate(batches):
                    states[index], raster = jitted_step(spec, segment)(
                        params,
                        states[index],
                        wanted,
                        ids,
                        seed,
                        number,
                        self.scales[number],
                        self.config.sample.temperature,
                    )
                    tokens.append(np.asarray(raster))
                yield np.concatenate(tokens)[: len(labels)]


@contextlib.contextmanager
def progress_bar(total: int, first: int, show: bool) -> Iterator:
    """A bar of samples, of which `first` are there already; it shows where a terminal is
    watching.
    """
    if not show:
        yield types.SimpleNamespace(update=lambda count: None)
        return
    from tqdm import tqdm  # the command line's dependency, not the Python interface's

    with tqdm(total=total, initial=first, desc="sampling", unit="sample", disable=None) as bar:
        yield bar


def command_line(*extra: str) -> str:
    """The command that is running, with `extra` flags, ready to be pasted from the folder it was
    started in.
    """
    python = sys.executable
    if pathlib.Path(python).is_relative_to(pathlib.Path.cwd()):
        python = str(pathlib.Path(python).relative_to(pathlib.Path.cwd()))
    return shlex.join([python, "-m", "djepa_jax.main", *_of_the_run(sys.argv[1:]), *extra])


def _of_the_run(words: list[str]) -> list[str]:
    """Flags without those of one start, whether written as --flag=VALUE or as --flag VALUE."""
    kept, rest = [], iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name.replace("-", "_") not in OF_ONE_START:
            kept.append(word)
        elif not equals:
            next(rest, None)
    return kept


def output_paths(out: epath.Path) -> tuple[epath.Path, epath.Path]:
    """The grid's and the arrays' file for a name given with either ending, or with none."""
    base = out.with_suffix("") if out.suffix in (".png", ".npz") else out
    return base.with_name(base.name + ".png"), base.with_name(base.name + ".npz")


def make_grid(images: np.ndarray, labels, names) -> np.ndarray:
    """A grid of the first pictures, each under its class name: uint8 `[H', W', 3]`."""
    return label_grid(images[:MAX_GRID], [names[label] for label in labels[:MAX_GRID]])


def npz_members(arrays: dict, labels, text: str) -> dict[str, np.ndarray]:
    """What goes into an npz file: `arr_0` the images, if any, and `arr_1` the labels, as in ADM's
    files; beside them the rest.
    """
    images = {"arr_0": arrays["images"]} if "images" in arrays else {}
    others = {name: array for name, array in arrays.items() if name != "images"}
    return images | {"arr_1": np.asarray(labels, np.int32), "settings": np.asarray(text)} | others


def save_grid(png: epath.Path, images: np.ndarray, labels, names, text: str) -> None:
    """Write a labelled grid of the first pictures, with the command and the settings in it."""
    save_png(png, make_grid(images, labels, names), {"command": command_line(), "settings": text})


def save_samples(out: epath.Path, arrays: dict, labels, names, settings: dict) -> list[epath.Path]:
    """Write a few samples into `OUT.npz` and, where there are pictures, a labelled grid `OUT.png`;
    return the paths.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings)
    png, npz = output_paths(out)
    write_npz(npz, npz_members(arrays, labels, text))
    if "images" not in arrays:
        return [npz]
    save_grid(png, arrays["images"], labels, names, text)
    return [png, npz]


def stored_settings(npz: epath.Path) -> dict | None:
    """The settings in a file that `save_samples` wrote; None if there is none or it cannot be
    read.
    """
    try:
        with npz.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return json.loads(str(arrays["settings"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
