"""From a trained model to arrays: batches of samples, and samples that grow step by step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from djepa_jax.checkpoints.autoencoder import Autoencoder, weights_sha256
from djepa_jax.checkpoints.restore import guide_params
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.modalities import Modality
from djepa_jax.core.modalities.base import MADE
from djepa_jax.core.modalities.programs import exported
from djepa_jax.core.models.autoguidance import Guide
from djepa_jax.core.sampler import (
    Known,
    SampleInputs,
    SamplerConfig,
    make_sampler,
    make_start,
    make_step,
)
from djepa_jax.core.segments import Segment, plan_segments
from djepa_jax.runtime import distributed
from djepa_jax.runtime.compilation_cache import without_alarms
from djepa_jax.runtime.errors import OUT_OF_MEMORY
from djepa_jax.runtime.progress import Progress, say


class Stopped(Exception):
    """Sampling was asked to stop, and has stopped after a batch."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


@functools.lru_cache(maxsize=8)
def jitted_sampler(config: SamplerConfig, mesh) -> Callable:
    """The sampler as one program per batch size; calls with equal settings share it."""
    return jax.jit(make_sampler(config), out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def jitted_step(config: SamplerConfig, segment: Segment) -> Callable:
    """One autoregressive step of the sampler, padded to the shapes of `segment`."""
    return jax.jit(make_step(config, segment))


@functools.lru_cache(maxsize=64)
def jitted_start(config: SamplerConfig) -> Callable:
    """What the steps of a sample begin with."""
    return jax.jit(make_start(config))


def grow(config: SamplerConfig, params, inputs: SampleInputs) -> Iterator[np.ndarray]:
    """The tokens `[B, N, C]` after each autoregressive step, zero where not yet revealed."""
    state = jitted_start(config)(inputs)
    for segment in plan_segments(config):
        step = jitted_step(config, segment)
        for number in range(segment.start, segment.stop):
            state, raster = step(params, state, inputs, number)
            yield np.asarray(raster)


class Generator:
    """The jitted sampler on a mesh; one compilation serves every call, whatever the count.

    Sample i depends on (seed, i) alone: neither how many there are nor where a batch begins
    changes it.

    Args:
        experiment: `sample` and `autoencoder` of it are used.
        mesh: of the devices.
        autoencoder: in place of the one that the configuration names.
        decode: whether to make pictures of latents, where there is an autoencoder.
        progress: whether to show how far it is.
        sampler: `(SamplerConfig, mesh) -> ((params, SampleInputs) -> tokens)`; tests give another.
        known: tokens that are given, sample by sample; the same number of each, and not all.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh,
        autoencoder: Autoencoder | None = None,
        decode: bool = True,
        progress: bool = False,
        sampler: Callable[[SamplerConfig, Any], Callable] = jitted_sampler,
        known: Known | None = None,
    ):
        experiment.check_attention(jax.default_backend())
        self.experiment, self.mesh = experiment, mesh
        self._make_sampler, self._autoencoder = sampler, autoencoder
        self._progress = progress
        divisor = sharding.batch_divisor(mesh)
        self.batch_size = -(-experiment.sample.batch_size // divisor) * divisor
        self.decodes = decode and experiment.has_decoder
        self.config, self._known = experiment.sampler, known
        self.guide = None
        if self.config.autoguided:
            self.guide = Guide(guide_params(experiment, mesh), experiment.sample.guide_scale)
        if known is not None:
            num_known = int(known.mask[0].sum())
            steps = min(self.config.num_ar_steps, self.config.model.num_tokens - num_known)
            guided = self.config.guided or (num_known > 0 and experiment.sample.cfg_scale != 1)
            given = {"num_known": num_known, "guided": guided}
            self.config = dataclasses.replace(self.config, num_ar_steps=steps, **given)
        sample = experiment.sample
        self.cfg_scales = self.config.guidance(sample.cfg_scale, sample.cfg_schedule)  # [T]
        self.not_finite = np.zeros(0, int)  # numbers of such samples of the last batch

    def beside(self, known: Known) -> "Generator":
        """The same one for samples of which some tokens are given."""
        how = self._autoencoder, self.decodes, self._progress, self._make_sampler
        return Generator(self.experiment, self.mesh, *how, known)

    def images(
        self, params, conditions, seed: int, should_stop: Callable[[], bool] = never
    ) -> dict[str, np.ndarray]:
        """All samples of `batches`, in memory."""
        parts = list(self.batches(params, conditions, seed, 0, should_stop))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def batches(
        self,
        params,
        conditions,
        seed: int,
        first: int = 0,
        should_stop: Callable[[], bool] = never,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Samples from number `first` on, batch by batch, as `export` gives them.

        Args:
            params: the model's parameters, on the mesh.
            conditions: raw, one for each sample from number 0 on, such as labels `[n]`.
            seed: of everything random.
            first: number of the first sample.
            should_stop: asked before every batch; several processes must be told the same.

        Raises:
            Stopped: it was asked to.
        """
        total, start = count_of(conditions), first
        quiet = not (self._progress and distributed.is_main_process())
        with contextlib.closing(Progress("sampling", "sample", total, first, quiet)) as progress:
            while start < total:
                if should_stop():
                    raise Stopped
                tokens = self._sample_batch(params, conditions, start, seed)  # [B, N, C]
                count = min(len(tokens), total - start)
                finite = np.isfinite(tokens[:count]).all(axis=(1, 2))
                self.not_finite = start + np.flatnonzero(~finite)
                yield self.export(tokens, count)
                start += count
                progress.show(start)

    def tokens(self, params, conditions, seed: int) -> np.ndarray:
        """One token map per condition: `[n, N, C]` float32."""
        starts = range(0, count_of(conditions), self.batch_size)
        parts = [self._sample_batch(params, conditions, start, seed) for start in starts]
        return np.concatenate(parts)[: count_of(conditions)]

    def _sample_batch(self, params, conditions, start: int, seed: int) -> np.ndarray:
        """The batch that begins with a sample; smaller if memory is short: it changes no sample."""
        sampler = self._make_sampler(self.config, self.mesh)
        while True:
            try:
                with without_alarms():
                    return np.asarray(sampler(params, self._inputs(conditions, start, seed)))
            except jax.errors.JaxRuntimeError as error:  # processes would have to halve together
                divisor = sharding.batch_divisor(self.mesh)
                half = self.batch_size // 2 // divisor * divisor
                if OUT_OF_MEMORY not in str(error) or jax.process_count() > 1 or not half:
                    raise
                say(
                    f"WARNING: not enough memory for {self.batch_size} samples at a time; going "
                    f"on with {half}"
                )
                self.batch_size = half

    def _inputs(self, conditions, start: int, seed: int) -> SampleInputs:
        """Inputs of the samples from `start` on, on the devices, padded to a whole batch."""
        ids = np.arange(start, start + self.batch_size, dtype=np.int32)
        rows = ids % count_of(conditions)
        chosen = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], conditions)
        known = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], self._known)
        place = sharding.batch_sharding(self.mesh)
        chosen, ids, known = jax.device_put((chosen, ids, known), place)
        temperature = self.experiment.sample.temperature
        how = seed, self.cfg_scales, temperature
        return SampleInputs(chosen, ids, *how, known, self.guide)

    def export(self, tokens: jax.Array, count: int | None = None) -> dict[str, np.ndarray]:
        """What the modality makes of the first `count` of tokens `[n, N, C]`, pictures with it."""
        made = exported(self.experiment.modality, tokens)  # of all: a padded batch compiles once
        arrays = {name: np.asarray(array)[:count] for name, array in made.items()}
        if self.decodes:
            arrays |= decoded(self.autoencoder, arrays)
        return arrays

    @property
    def autoencoder(self) -> Autoencoder:
        """The configured autoencoder, read when it is first needed."""
        if self._autoencoder is None:
            settings, staging = self.experiment.autoencoder, self.experiment.data.staging
            self._autoencoder = Autoencoder(settings, self.mesh, staging)
        return self._autoencoder

    @functools.cached_property
    def autoencoder_sha256(self) -> str:
        """Of the autoencoder that makes the pictures; empty where there is none."""
        if not self.decodes:
            return ""
        own = self._autoencoder
        return own.sha256 if own is not None else weights_sha256(self.experiment)

    def stream(self, params, conditions, seed: int) -> Iterator[np.ndarray]:
        """The tokens `[n, N, C]` after each autoregressive step, zero where not yet revealed.

        The last ones are those of `tokens`. All samples are held at once.
        """
        total = count_of(conditions)
        starts = range(0, total, self.batch_size)
        batches = [self._inputs(conditions, start, seed) for start in starts]
        growing = [grow(self.config, params, inputs) for inputs in batches]
        for tokens in zip(*growing, strict=True):
            yield np.concatenate(tokens)[:total]


def decoded(autoencoder: Autoencoder, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The pictures or clips of `latents`, by their name."""
    pictures = autoencoder.decode(np.asarray(arrays["latents"]))
    return {MADE[pictures.ndim - 1]: pictures}


def result_of(modality: Modality, arrays: dict[str, np.ndarray]) -> np.ndarray | dict | None:
    """What people want of exported arrays: pictures, clips, sounds, or both of two, `[n, ...]`."""
    found = {name: arrays[name] for name in ("images", "clips", "sound") if name in arrays}
    if len(found) > 1:
        return found
    return next(iter(found.values())) if found else modality.preview(arrays)


def count_of(arrays) -> int:
    """How many conditions or samples there are in some arrays."""
    return len(jax.tree.leaves(arrays)[0])
