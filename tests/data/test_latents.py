"""The latent cache: records, reading, agreement with the config, and what training makes of the
moments.
"""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import SHA, SHAPE, TOTAL, entries, write_cache
from photos import same
from tiny import load_config

from djepa_jax.config.class_names import imagenet
from djepa_jax.config.experiment import build
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.core.modalities.patches import patchify
from djepa_jax.data.latent_cache import (
    DTYPES,
    LatentCache,
    check_autoencoder,
    check_cache,
    file_sha256,
    pack,
    read_metadata,
    unpack,
)
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import open_data
from djepa_jax.training.loop import check_decoder

# What the handwritten cache needs.
FLAGS = {
    "data.image_size": 4,
    "data.channels": 3,
    "data.num_classes": 3,
    "data.latent_scale": 0.25,
    "data.latent_shift": -0.5,
}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def config_with(path="", **changes):
    flags = {"data.path": path, "data.class_names": "", "sample.num_ar_steps": 2} | FLAGS | changes
    return load_config("default", *(f"--config.{key}={value}" for key, value in flags.items()))


# records and reading


@pytest.mark.parametrize(
    "key", ["", "a", "imagenet2012#train[3]", "é/ü.jpg", "caf\udce9/\udcff.jpg", "long" * 999]
)
def test_records_come_back(dtype, key):
    moments = entries(dtype)[3][2]
    label, found, read = unpack(pack(999, key, moments), SHAPE, DTYPES[dtype])
    assert label == 999 and found == key and same(read, moments)


def test_examples_come_back_in_any_order(tmp_path, dtype):
    source = LatentCache(str(write_cache(tmp_path / "cache", dtype)))
    copy, expected = pickle.loads(pickle.dumps(source)), entries(dtype)
    assert (
        len(source) == TOTAL
        and source.labels.tolist() == [0, 1, 2]
        and source.class_names == ("a", "b", "c")
    )
    for i in np.random.default_rng(0).permutation(3 * TOTAL) % TOTAL:
        label, key, moments = expected[i]
        for reader in (source, copy):
            example = reader[int(i)]
            assert (
                example.keys() == {"example", "mirror", "condition"} and reader.key(int(i)) == key
            )
            assert same(example["example"], moments[0]) and same(example["mirror"], moments[1])
            assert example["condition"] == label and example["condition"].dtype == np.int32


@pytest.mark.parametrize("random_flip", [False, True])
def test_stream_gives_the_image_or_its_mirror_image_as_stored(tmp_path, dtype, random_flip):
    stream = example_stream(
        LatentCache(str(write_cache(tmp_path / "cache", dtype))), 3, random_flip
    )
    stored = {
        both[side].tobytes(): (label, side) for label, _, both in entries(dtype) for side in (0, 1)
    }
    batches, mirrored = row_batches(stream, 4, consumed=0), 0
    for start in range(0, 8 * TOTAL, 4):
        batch = next(batches)
        assert batch.keys() == {"example", "condition"} and batch["example"].dtype == DTYPES[dtype]
        for row in range(4):
            example, image = stream[start + row], batch["example"][row]
            label, side = stored[image.tobytes()]
            assert (
                same(example["example"], image)
                and example["condition"] == batch["condition"][row] == label
            )
            mirrored += side
    assert 30 < mirrored < 66 if random_flip else mirrored == 0  # of 96


def test_an_epoch_holds_every_image_once(tmp_path):
    stream, images = (
        example_stream(LatentCache(str(write_cache(tmp_path / "cache"))), 0),
        [e[2][0].tobytes() for e in entries()],
    )
    for start in (0, TOTAL, 2 * TOTAL):
        assert sorted(stream[start + i]["example"].tobytes() for i in range(TOTAL)) == sorted(
            images
        )


# agreement


def test_cache_of_this_config_is_accepted(tmp_path):
    config = config_with(write_cache(tmp_path / "cache"))
    source = open_data(config, build(config).modality)
    check_cache(source.metadata, config.data)
    assert len(source) == TOTAL


@pytest.mark.parametrize(("key", "value"), [(key, value * 2) for key, value in FLAGS.items()])
def test_cache_of_another_config_names_the_flag(tmp_path, key, value):
    config = config_with(write_cache(tmp_path / "cache"), **{key: value})
    with pytest.raises(
        DataError,
        match=rf"cache was made for another config; it needs --config.{key}={FLAGS[key]} \(now {value}\)\.$",
    ):
        check_cache(read_metadata(tmp_path / "cache"), config.data)
    with pytest.raises(DataError, match=f"made for another config; it needs --config.{key}="):
        open_data(config, build(config).modality)


def test_every_difference_is_listed(tmp_path):
    write_cache(tmp_path / "cache")
    changes = {key: 2 * value for key, value in FLAGS.items()}
    with pytest.raises(DataError) as caught:
        check_cache(read_metadata(tmp_path / "cache"), config_with(**changes).data)
    assert all(f"--config.{key}={value}" in str(caught.value) for key, value in FLAGS.items())


WNIDS, NAMES = (tuple(column) for column in zip(*imagenet(), strict=True))
NUMBERS = tuple(map(str, range(1000)))
OWN = ("one", "two", *NUMBERS[2:])


@pytest.mark.parametrize("found", [NAMES, WNIDS, NUMBERS, OWN])
@pytest.mark.parametrize("names", ["imagenet", "", "file"])
def test_class_names_of_a_cache_are_those_of_the_config_or_none(tmp_path, found, names):
    (tmp_path / "file").write_text("\n".join(OWN))
    cache = dataclasses.replace(
        read_metadata(write_cache(tmp_path / "cache")), num_classes=1000, class_names=found
    )
    spec = names.replace("file", f"{tmp_path}/file")
    config = config_with("CACHE", **{"data.num_classes": 1000, "data.class_names": spec})
    if (
        found
        in {
            "imagenet": (NAMES, WNIDS, NUMBERS),
            "": (NAMES, WNIDS, NUMBERS, OWN),
            "file": (OWN, NUMBERS),
        }[names]
    ):
        return check_cache(cache, config.data)
    theirs, ours = found[0], {"imagenet": "tench", "file": "one"}[names]
    words = (
        f'cache CACHE has other classes than .* class 0 is "{theirs}" in the cache and "{ours}" '
        "in the config; name a file"
    )
    with pytest.raises(DataError, match=words):
        check_cache(cache, config.data)


def test_only_the_autoencoder_of_the_cache_may_decode(tmp_path):
    metadata = read_metadata(write_cache(tmp_path / "cache"))
    check_autoencoder(metadata, "kl.ckpt", SHA)
    with pytest.raises(
        DataError, match=f"sha256 {SHA}, config.autoencoder.path kl.ckpt has 12ef; name the file"
    ):
        check_autoencoder(metadata, "kl.ckpt", "12ef")


def test_training_checks_the_autoencoder_before_it_starts(tmp_path):
    folder, weights = write_cache(tmp_path / "cache"), tmp_path / "kl.ckpt"
    config = config_with(folder, **{"autoencoder.path": weights})
    source = LatentCache(str(folder))
    with pytest.raises(
        DataError, match=f"config.autoencoder.path is {weights}, where there is no file"
    ):
        check_decoder(config, source)
    weights.write_text("another")
    with pytest.raises(DataError, match="made with the autoencoder of sha256 abab"):
        check_decoder(config, source)
    check_decoder(config, ["latents from an npz file, of which nothing is known"])
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["autoencoder"]["sha256"] = file_sha256(weights)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    check_decoder(config, LatentCache(str(folder)))
    check_decoder(
        config_with(folder), source
    )  # without an autoencoder there are no pictures, and training goes on


# moments as tokens

LATENTS = MODALITIES["image_latents"](4, 3, 2, 0.25, -0.5)


def test_tokens_of_moments_are_shifted_and_scaled(dtype):
    moments = np.stack([both[0] for _, _, both in entries(dtype)])
    LATENTS.check_example(moments[0])
    mean = moments[..., :3].astype(np.float32)
    tokens = LATENTS.tokenize(moments)
    assert tokens.dtype == jnp.float32 and tokens.shape == (
        TOTAL,
        LATENTS.num_tokens,
        LATENTS.token_dim,
    )
    np.testing.assert_array_equal(tokens, patchify((mean + 0.5) * 0.25, 2))
    np.testing.assert_allclose(LATENTS.export(tokens)["latents"], mean, atol=1e-6)


def test_latents_without_moments_are_taken_as_they_are():
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    LATENTS.check_example(latents[0])
    tokens = LATENTS.tokenize(latents, jax.random.key(0))
    np.testing.assert_allclose(LATENTS.export(tokens)["latents"], latents, atol=1e-6)


def test_posterior_is_sampled_anew_with_every_key(dtype):
    moments = np.repeat(entries(dtype)[0][2][:1], 20_000, axis=0)  # of one image, many times
    tokenize = jax.jit(LATENTS.tokenize)
    first, again, other = (
        np.asarray(tokenize(moments, jax.random.key(seed))) for seed in (0, 0, 1)
    )
    assert same(first, again) and (first != other).mean() > 0.99 and (first[0] != first[1]).any()
    mean, log_variance = np.split(moments[:1].astype(np.float32), 2, axis=-1)
    drawn = np.asarray(LATENTS.export(first)["latents"])
    np.testing.assert_allclose(
        drawn.mean(0), mean[0], atol=5 * np.exp(log_variance / 2).max() / 20_000**0.5
    )
    np.testing.assert_allclose(drawn.std(0), np.exp(log_variance[0] / 2), rtol=0.03)
