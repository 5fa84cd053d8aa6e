"""The `--mode=sample` command: samples of the latest checkpoint into an npz file, and a labelled
grid beside it.

Every batch is exported, decoded and written when it is drawn, so that memory does not grow with the
number of samples and a process that was killed goes on with its next batch.
"""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import optax
from etils import epath

from djepa_jax import __version__
from djepa_jax.checkpoints.autoencoder import (
    has_autoencoder,
    makes_latents,
    stored_sha256,
    with_autoencoder,
)
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config import experiment as configuration
from djepa_jax.config.experiment import ConfigError
from djepa_jax.core import sharding
from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import as_path, check_writable
from djepa_jax.sampling.generator import (
    Generator,
    npz_members,
    output_paths,
    save_grid,
)
from djepa_jax.sampling.parts import Parts, write_large_npz

OF_ONE_RUN = {"batch_size"}  # keys of config.sample that change no sample


def run_sample(config, workdir: str, out: str, latents_only: bool = False) -> list[epath.Path]:
    """Sample the moving average of the latest checkpoint into files; returns their paths, in
    process 0.

    Args:
        config: an ml-collections config.
        workdir: of the checkpoint.
        out: the npz or png file to write; empty for a place in the workdir.
        latents_only: write latents and no pictures.

    Raises:
        ConfigError: the config cannot work, is of another model, or names no autoencoder, or not
            that of the latents.
        CheckpointError: there is nothing to sample, or `out` is a folder.
        PathError: `out` cannot be written, or another process does so.
    """
    experiment = configuration.build(config)
    check_pictures(config, out, latents_only)
    model = latest_model(config, workdir)
    config = with_autoencoder(config, stored_sha256(model.config))
    target = check_target(out, workdir)
    mesh = sharding.make_mesh(config.mesh)
    generator = Generator(config, experiment, mesh, decode=not latents_only)
    if generator.decodes:
        generator.autoencoder  # noqa: B018 (read now, so that one that cannot be used is refused before the work)
    params = model.restore(placed_params(experiment, mesh))
    distributed.on_main(lambda: check_writable(target.parent, "--out"))
    settings = {
        "step": model.step,
        "model": dataclasses.asdict(experiment.train.model),
        "sample": config.sample.to_dict(),
    }
    if generator.decodes:
        settings["autoencoder"] = generator.autoencoder_sha256
    return write_samples(target, generator, params, settings)


def check_pictures(config, out: str, latents_only: bool) -> None:
    """Make sure that what is asked for can be made.

    Raises:
        ConfigError: pictures of latents without an autoencoder, latents of a model that has none,
            or latents as a picture.
    """
    if latents_only and not makes_latents(config):
        raise ConfigError(
            "--latents_only is for models of latents, and this one makes pictures; leave it out."
        )
    if latents_only and out.endswith(".png"):
        raise ConfigError(
            f'--out "{out}" with --latents_only: latents are no picture; let the name end in .npz.'
        )
    if makes_latents(config) and not latents_only and not has_autoencoder(config):
        raise ConfigError(
            "config.autoencoder.path is empty, and this model makes latents: name the weights "
            "that turn them into pictures "
            "(--config.autoencoder.path=kl16.ckpt), or add --latents_only to write the latents "
            "alone."
        )


def check_target(out: str, workdir: str) -> epath.Path:
    """Where the samples go.

    Raises:
        CheckpointError: there is a folder.
    """
    target = as_path(out or as_path(workdir) / "samples" / "sample.png")
    if any(path.is_dir() for path in (target, *output_paths(target))):
        raise CheckpointError(
            f'--out "{out}" is a folder; name a file in it, such as {target / "sample.png"}.'
        )
    return target


def write_samples(
    target: epath.Path, generator: Generator, params, settings: dict
) -> list[epath.Path]:
    """Draw the samples that a generator's config asks for, those that are not there yet, and put
    them into files.
    """
    experiment, seed = generator.experiment, generator.config.sample.seed
    labels = experiment.sample_labels
    png, npz = output_paths(target)
    parts = Parts(npz, identity_of(generator, params, settings), len(labels))
    with distributed.held_by_main(parts.held()):
        first = distributed.on_main(parts.begin)
        for arrays in generator.batches(
            params, labels, seed, first, progress=distributed.is_main()
        ):
            if distributed.is_main():
                parts.add(arrays)
        if not distributed.is_main():
            return []
        text, arrays = json.dumps(settings), parts.arrays()
        write_large_npz(npz, npz_members(arrays, labels, text), parts.folder)
        written = [npz]
        if "images" in arrays:
            save_grid(png, arrays["images"], labels, experiment.class_names, text)
            written = [png, npz]
        parts.remove()
        return written


def identity_of(generator: Generator, params, settings: dict) -> dict:
    """Everything that samples depend on: equal values mean equal samples, up to rounding."""
    sample = {key: value for key, value in settings["sample"].items() if key not in OF_ONE_RUN}
    config = generator.config
    return settings | {
        "sample": sample,
        "labels": hashlib.sha256(
            np.asarray(generator.experiment.sample_labels, np.int32).tobytes()
        ).hexdigest(),
        "weights": float(jax.jit(optax.tree.norm)(params)),
        "modality": dataclasses.asdict(generator.experiment.modality),
        "decoded": config.autoencoder.dtype if generator.decodes else "",
        "djepa_jax": __version__,
    }
