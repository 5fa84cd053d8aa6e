"""The whole way once: the archive of ImageNet -> latents -> training -> pictures.

With an autoencoder of the real one's levels, narrow and with one block in each; `slow`, with the
real one's shape.
"""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from photos import NAMES, crop, encode, write_ilsvrc
from PIL import Image
from processes import run_command
from safetensors.numpy import save_file
from small_autoencoder import shapes_of
from tiny import CONFIGS

from djepa_jax.config.class_names import imagenet
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS
from djepa_jax.data.latent_cache import LatentCache
from djepa_jax.sampling.grids import label_grid

CLASSES = ("n01440764", "n01443537")
PER_CLASS, SIDE, LATENTS, STEPS = 3, 32, 2, 8
FLAGS = f"""
    --config.data.image_size={LATENTS} --config.data.random_flip=True
    --config.prepare.image_size={SIDE} --config.prepare.shard_size=4
    --config.autoencoder.batch_size=2 --config.autoencoder.dtype=float32
    --config.compute_dtype=float32 --config.batch_size=8 --config.num_steps={STEPS}
    --config.log_every=4 --config.optimizer.warmup_steps=2 --config.model.size=custom
    --config.model.width=32 --config.model.encoder_depth=1 --config.model.predictor_depth=1
    --config.model.num_heads=2 --config.model.remat=none --config.model.denoiser_depth=1
    --config.model.denoiser_width=32 --config.sample.labels=0,1 --config.sample.count=2
    --config.sample.batch_size=2 --config.sample.num_ar_steps=2
    --config.sample.num_denoise_steps=4 --config.loss.options.clip_x0=3.0
    --config.sample.num_segments=1
""".split()
FLAGS.insert(0, f"--config={CONFIGS / 'djepa_b.py'}")  # not above, for its path may have spaces


@pytest.fixture(params=["narrow", pytest.param("real", marks=pytest.mark.slow)])
def kl16(request):
    """The autoencoder's shape."""
    real = AUTOENCODERS["kl16"]
    narrow = dataclasses.replace(real, channels=32, num_blocks=1)
    return narrow if request.param == "narrow" else real


@pytest.fixture
def weights(kl16, tmp_path):
    """A file of its weights, all of one short piece of noise; the real one's 266 MB are not
    kept.
    """
    path, noise = tmp_path / "kl16.safetensors", np.random.default_rng(0).standard_normal(99_991)
    tensors = {
        name: np.resize(noise / np.sqrt(np.prod(shape[1:]) / 2), shape).astype(np.float32)
        if len(shape) > 1
        else np.full(shape, name.endswith("weight"), np.float32)
        for name, shape in shapes_of(kl16).items()
    }
    save_file(tensors, path)
    yield path
    path.unlink()


@pytest.fixture
def run(kl16, tmp_path):
    """Runs a command in a process of its own, as people do."""

    def command(mode: str, workdir: pathlib.Path, *flags: str) -> None:
        arguments = f"--mode={mode}", f"--workdir={workdir}", *FLAGS, *flags
        assert run_command(str(tmp_path / "compiled"), *arguments, kl16=kl16) == 0

    return command


def test_from_the_archive_to_pictures(run, weights, tmp_path):
    images = {
        wnid: {
            f"{wnid}_{i}.JPEG": encode(crop(NAMES[number], 10 * number + i))
            for i in range(PER_CLASS)
        }
        for number, wnid in enumerate(CLASSES)
    }
    archive = write_ilsvrc(tmp_path / "archive", images)
    weight_flag, cache = f"--config.autoencoder.path={weights}", tmp_path / "latents"
    prepared = ("--config.prepare.source=ilsvrc", f"--config.prepare.path={archive}")
    run("prepare", cache, weight_flag, *prepared, "--measure-scale")
    found, names = LatentCache(cache), [name for _, name in imagenet()]
    assert len(found) == 2 * PER_CLASS and found.labels.tolist() == [0, 1]
    assert found[0]["example"].shape == (LATENTS, LATENTS, 32)
    assert found.class_names == tuple(names)

    scale = f"--config.data.latent_scale={found.metadata.scale!r}"
    shift = f"--config.data.latent_shift={found.metadata.shift!r}"
    settings = (weight_flag, f"--config.data.path={cache}", scale, shift)
    run("train", tmp_path / "run", *settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == STEPS
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)
    assert (tmp_path / "run" / "samples" / f"step_{STEPS:08d}.png").exists(), "of the last step"

    run("sample", tmp_path / "run", *settings, f"--out={tmp_path}/pictures")
    with np.load(tmp_path / "pictures.npz") as arrays:
        latents, pictures, labels = arrays["latents"], arrays["arr_0"], arrays["arr_1"]
    assert latents.shape == (2, LATENTS, LATENTS, 16) and latents.dtype == np.float32
    assert np.isfinite(latents).all()
    assert pictures.shape == (2, SIDE, SIDE, 3) and pictures.dtype == np.uint8
    assert (pictures.std(axis=(1, 2, 3)) > 1).all()
    with Image.open(tmp_path / "pictures.png") as grid:
        shown = np.asarray(grid.convert("RGB"))
    np.testing.assert_array_equal(shown, label_grid(pictures, [names[label] for label in labels]))
