"""Latents of the frames of clips: their cache, and clips that are made of them."""

import numpy as np
import pytest
from animations import FRAMES, animation, write
from dummy_sampler import PARAMS, DummySampler, make_generator
from small_autoencoder import FLAGS, PIXELS, registered, write_weights
from tiny import TINY, load_config

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.places import mask_of
from djepa_jax.core import sharding
from djepa_jax.data.latent_cache import LatentCache
from djepa_jax.data.loader import example_stream
from djepa_jax.data.prepare_latents import run_prepare
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import open_data, open_source, pictures_of
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.reference import open_pictures
from djepa_jax.sampling.edit import edit

LATENTS = (
    "--config.data.modality=video_latents",
    "--config.data.options.num_frames=4",
    "--config.data.patch_size=4",
    "--config.data.source=latents",
    "--config.prepare.dtype=float32",
    "--config.evaluation.kind=none",
)


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Settings for a cache of four clips and one that is too short, and for training on it."""
    root = tmp_path_factory.mktemp("clips")
    write(root / "images", **{"a/9.webp": animation(FRAMES[0, :3])})
    places = (
        f"--config.autoencoder.path={write_weights(root / 'small.safetensors')}",
        f"--config.prepare.path={root / 'images'}",
        f"--config.data.path={root / 'cache'}",
    )
    return load_config("moving_digits", *TINY, *FLAGS, *LATENTS, *places)


@pytest.fixture(scope="module")
def autoencoder(config) -> Autoencoder:
    return Autoencoder(config.autoencoder, sharding.make_mesh((-1, 1, 1)))


def clips_of(config) -> np.ndarray:
    """uint8 `[4, 4, H, W, 3]`."""
    source = open_source("prepare", config.prepare, config.data, pictures_of(config))
    return np.stack([source[index]["example"] for index in (0, 1, 3, 4)])


def test_a_cache_holds_the_moments_of_every_frame_and_its_mirror_image(config, autoencoder):
    folder, lines = config.data.path, []
    with pytest.raises(DataError, match="no latent cache"):
        open_data(config)
    metadata = run_prepare(config, folder, measure_scale=True, say=lines.append)
    assert metadata.count == 4 and metadata.shape == (4, 8, 8, 8)
    assert "it has 3 frames" in metadata.shards[0].skipped["a/9.webp"]
    assert "5 clips" in lines[0]
    scale = {"data.latent_scale": metadata.scale, "data.latent_shift": metadata.shift}
    source, clips = open_data(config.updated(scale)), clips_of(config)
    frames = autoencoder.encode(clips.reshape(-1, PIXELS, PIXELS, 3))  # [16, 2, h, w, 2c]
    for index in range(4):
        item, expected = source[index], frames[4 * index :][:4]
        np.testing.assert_array_equal(item["example"], expected[:, 0])
        np.testing.assert_array_equal(item["mirror"], expected[:, 1])
        assert item["condition"] == index // 2
    means, log_variances = np.split(frames.astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(metadata.measured_mean, means.mean(), rtol=1e-6)
    deviation = np.sqrt((means**2 + np.exp(log_variances)).mean() - means.mean() ** 2)
    np.testing.assert_allclose(metadata.measured_std, deviation, rtol=1e-5)
    drawn = example_stream(source, 0, random_flip=True)[0]["example"]
    assert drawn.shape == (4, 8, 8, 8)
    assert run_prepare(config, folder) == LatentCache(folder).metadata, "finished already"
    pictures = {"data.modality": "image_latents", "data.options": {}}
    with pytest.raises(DataError, match="num_frames: 4 -> 0"):
        run_prepare(config.updated(pictures), folder)
    with pytest.raises(DataError, match="data.modality='video_latents'"):
        open_data(config.updated(scale | pictures))
    with pytest.raises(DataError, match="data.options.num_frames=4"):
        open_data(config.updated(scale | {"data.options": {"num_frames": 2}}))
    with pytest.raises(MetricError, match="networks look at"):
        open_pictures(config)


def test_samples_are_decoded_frame_by_frame(config, autoencoder):
    assert config.picture_shape == (4, PIXELS, PIXELS, 3)
    generator = make_generator(DummySampler(), experiment=config, autoencoder=autoencoder)
    arrays = generator.images(PARAMS, np.arange(3), 0)
    assert arrays["latents"].shape == (3, 4, 8, 8, 4) and arrays["clips"].dtype == np.uint8
    for latents, clip in zip(arrays["latents"], arrays["clips"], strict=True):
        np.testing.assert_array_equal(autoencoder.decode(latents), clip)
    assert config.modality.preview(arrays).shape == (3, PIXELS, 4 * (PIXELS + 1) - 1, 3)


def test_clips_are_continued_and_what_stays_is_kept_to_the_bit(config, autoencoder):
    sampler, clips = DummySampler(), clips_of(config)[:2]
    mask, _ = mask_of("after:2", config.picture_shape[:-1], box=2)

    def make(known):
        return make_generator(sampler, experiment=config, autoencoder=autoencoder, known=known)

    made = edit(config, make, PARAMS, clips, mask, np.arange(2), 0, autoencoder=autoencoder)
    np.testing.assert_array_equal(made[:, :2], clips[:, :2])
    assert made.shape == clips.shape and (made[:, 2:] != clips[:, 2:]).any()
    known = sampler.inputs.known
    tokens = config.modality.tokenize(autoencoder.encode(clips)[:, 0])
    np.testing.assert_array_equal(known.tokens[:2], tokens)
    np.testing.assert_array_equal(known.mask[0], [True] * 4 + [False] * 4)


def test_a_scale_of_its_own_is_refused(config):
    with pytest.raises(ConfigError, match="scale"):
        config.updated({"data.options": {"num_frames": 4, "scale": 2.0}})
