"""The latent cache: records, reading, damage, agreement with the config, and what training makes of
the moments.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import SHA, SHAPE, TOTAL, entries, write_cache
from photos import opened, same, settings

from djepa_jax.checkpoints.autoencoder import find_weights
from djepa_jax.checkpoints.convert.tensor_files import SourceError
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.config.class_names import imagenet
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.core.modalities.image import patchify
from djepa_jax.data import latent_cache
from djepa_jax.data.arrays import load_digits
from djepa_jax.data.latent_cache import (
    DTYPES,
    LatentCache,
    check_cache,
    find_shard,
    latents_made_by,
    pack,
    read_metadata,
    unpack,
)
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.data.records import DataError

LATENTS = MODALITIES["image_latents"](4, 3, 2, 0.25, -0.5)
# What the handwritten cache needs.
FITTING = {"image_size": 4, "channels": 3, "num_classes": 3, "latent_scale": 0.25}
FITTING["latent_shift"] = -0.5


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    return write_cache(tmp_path / "cache")


def data_with(path="CACHE", **changes):
    return settings("latents", path, **FITTING | changes)


# records and reading


def test_records_come_back():
    for dtype in DTYPES:
        for key in ("", "imagenet2012#train[3]", "é/ü.jpg", "caf\udce9/\udcff.jpg", "long" * 999):
            moments = entries(dtype)[3][2]
            label, found, read = unpack(pack(999, key, moments), SHAPE, DTYPES[dtype])
            assert label == 999 and found == key and same(read, moments)


def test_examples_come_back_in_any_order(tmp_path):
    for dtype in DTYPES:
        source, expected = LatentCache(write_cache(tmp_path / dtype, dtype)), entries(dtype)
        assert len(source) == TOTAL and source.class_names == ("a", "b", "c")
        assert source.labels.tolist() == [0, 1, 2]
        for i in np.random.default_rng(0).permutation(2 * TOTAL) % TOTAL:
            label, key, moments = expected[i]
            item = source[int(i)]
            assert source.key(int(i)) == key
            assert item.keys() == {"example", "mirror", "condition"}
            assert same(item["example"], moments[0]) and same(item["mirror"], moments[1])
            assert item["condition"] == label and item["condition"].dtype == np.int32


def test_stream_gives_the_image_or_its_mirror_image_as_stored(cache):
    for random_flip in (False, True):
        stream = example_stream(LatentCache(cache), 3, random_flip)
        stored = {
            both[side].tobytes(): (label, side) for label, _, both in entries() for side in (0, 1)
        }
        batches, mirrored = row_batches(stream, 4, consumed=0), 0
        for _ in range(0, 8 * TOTAL, 4):
            batch = next(batches)
            assert batch.keys() == {"example", "condition"}
            for image, condition in zip(batch["example"], batch["condition"], strict=True):
                label, side = stored[image.tobytes()]
                assert condition == label
                mirrored += side
        assert 30 < mirrored < 66 if random_flip else mirrored == 0  # of 96


# damage


def flipped(whole: bytes, place: int, mask: int = 1) -> bytes:
    return whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]


def test_damaged_shard_is_named(cache):
    shard = cache / "shards" / "00001-of-00003.array_record"
    whole, checksum = shard.read_bytes(), file_sha256(shard)
    for content, words in (
        (flipped(whole, 20_000), f"differs from its checksum, sha256 {checksum}"),
        (whole[:-1], f"has {len(whole) - 1} bytes instead of {len(whole)}"),
        (None, "is missing"),
    ):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(DataError, match=f"shard {shard} {words}; copy it again.*mode=prepare"):
            LatentCache(cache)


def test_damage_in_a_cache_too_large_to_be_verified_is_found_on_reading(cache, monkeypatch):
    monkeypatch.setattr(latent_cache, "VERIFIED_BYTES", 0)
    shard = cache / "shards" / "00001-of-00003.array_record"
    whole, checksum, rng = shard.read_bytes(), file_sha256(shard), random.Random(0)
    moments = [whole.index(entry[2].tobytes()) + rng.randrange(300) for entry in entries()[5:9]]
    index = [1950, 65_590]  # parts of the file that say where the records are
    for place in moments + index + rng.sample(range(len(whole)), 20):
        shard.write_bytes(flipped(whole, place))
        try:
            source = LatentCache(cache)
            read = [source[i] for i in range(TOTAL)]
        except DataError as error:
            assert str(shard) in str(error) and checksum in str(error)
        else:
            assert place not in moments + index, "only padding may change unnoticed"
            for item, entry in zip(read, entries(), strict=True):
                assert same(item["mirror"], entry[2][1])


def test_shard_is_whole_or_absent(tmp_path, monkeypatch):
    records = [pack(*entry) for entry in entries()]
    contents = {"count": TOTAL, "class_counts": {"0": TOTAL}, "skipped": {}}
    contents |= {"sum": 0.0, "sum_of_squares": 1.0}
    (tmp_path / "shards").mkdir()
    shard = latent_cache.write_shard(tmp_path / "shards" / "a", records, contents)
    assert find_shard(tmp_path, "a", verify=True) == shard
    with pytest.raises(OSError, match="no disk/a cannot be written .*make room or repair"):
        latent_cache.write_shard(tmp_path / "no disk" / "a", records, contents)
    writer = latent_cache.array_record_module.ArrayRecordWriter
    write, changes = writer.write, iter([b"another", *records[1:]])
    monkeypatch.setattr(writer, "write", lambda self, _: write(self, next(changes)))
    with pytest.raises(OSError, match="does not hold what was written"):
        latent_cache.write_shard(tmp_path / "shards" / "b", records, contents)
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["a", "a.json"]


def test_unfinished_and_absent_caches_are_told_apart(cache, tmp_path):
    (cache / "metadata.json").unlink()
    for path, words in ((cache, "an unfinished"), (tmp_path / "elsewhere", "no")):
        with pytest.raises(DataError, match=f'"{path}", which holds {words} latent cache.*prepare'):
            opened("latents", path, 3, LATENTS)


def test_metadata_of_another_format_or_place_is_refused(cache):
    path = cache / "metadata.json"
    whole = path.read_text()
    for old, new, words in (
        ('"format": 1', '"format": 2', "format 2, this version reads 1"),
        ('"00001-of-00003.array_record"', '"/etc/hostname"', "/etc/hostname is not the name"),
        ('"00001-of-00003.array_record"', '"../../secret"', "../../secret is not the name"),
    ):
        path.write_text(whole.replace(old, new))
        with pytest.raises(DataError, match=f"metadata.json cannot be read .*{words}"):
            LatentCache(cache)


def test_damaged_metadata_is_one_clear_error(cache):
    path, rng = cache / "metadata.json", random.Random(3)
    whole, good = path.read_bytes(), read_metadata(cache)
    cases = [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\0" * 99, whole[: len(whole) // 2]]
    places = range(0, len(whole), 3)
    for content in cases + [flipped(whole, place, rng.randrange(1, 256)) for place in places]:
        path.write_bytes(content)
        try:
            source = LatentCache(cache)
        except DataError:
            continue
        assert source.metadata.shape == good.shape and source.metadata.dtype == good.dtype
        assert same(source[3]["mirror"], entries()[3][2][1])


# agreement


def test_cache_of_this_config_is_accepted(cache):
    assert len(opened("latents", cache, modality=LATENTS, **FITTING)) == TOTAL


def test_cache_of_another_config_names_every_flag(cache):
    metadata = read_metadata(cache)
    for key, value in FITTING.items():
        with pytest.raises(DataError, match=rf"needs --config.data.{key}={value} .now {value * 2}"):
            check_cache(metadata, data_with(**{key: value * 2}))
    with pytest.raises(DataError) as caught:
        opened("latents", cache, modality=LATENTS, **{key: 2 * FITTING[key] for key in FITTING})
    assert all(
        f"--config.data.{key}={value}" in str(caught.value) for key, value in FITTING.items()
    )


WNIDS, NAMES = (tuple(column) for column in zip(*imagenet(), strict=True))
NUMBERS = tuple(map(str, range(1000)))
OWN = ("one", "two", *NUMBERS[2:])


def test_class_names_of_a_cache_are_those_of_the_config_or_none(cache, tmp_path):
    (tmp_path / "file").write_text("\n".join(OWN))
    fitting = {
        "imagenet": (NAMES, WNIDS, NUMBERS),
        "": (NAMES, WNIDS, NUMBERS, OWN),
        f"{tmp_path}/file": (OWN, NUMBERS),
    }
    for names, found in itertools.product(fitting, (NAMES, WNIDS, NUMBERS, OWN)):
        metadata = dataclasses.replace(read_metadata(cache), num_classes=1000, class_names=found)
        data = data_with(num_classes=1000, class_names=names)
        if found in fitting[names]:
            check_cache(metadata, data)
        else:
            with pytest.raises(DataError, match="has a class .*names calls it .*name a file"):
                check_cache(metadata, data)


def test_only_the_autoencoder_of_the_cache_may_decode(cache, tmp_path):
    weights, source = tmp_path / "kl.ckpt", LatentCache(cache)
    autoencoder = settings("", str(weights), sha256="")
    with pytest.raises(SourceError, match=f'autoencoder.path "{weights}" does not exist'):
        find_weights(autoencoder)
    weights.write_text("another")
    assert find_weights(autoencoder) == (weights, file_sha256(weights))
    with pytest.raises(DataError, match=f"{SHA}.*{file_sha256(weights)}.*name the file"):
        latents_made_by(source, autoencoder, file_sha256(weights))
    other = file_sha256(weights)
    assert latents_made_by(load_digits(), autoencoder, other) == "", "nothing is known of it"
    assert latents_made_by(source, autoencoder, "") == SHA, "without pictures"
    metadata = json.loads((cache / "metadata.json").read_text())
    metadata["autoencoder"]["sha256"] = file_sha256(weights)
    (cache / "metadata.json").write_text(json.dumps(metadata))
    assert latents_made_by(LatentCache(cache), autoencoder, other) == other


# moments as tokens


def test_tokens_of_moments_are_shifted_and_scaled():
    for dtype in DTYPES:
        moments = np.stack([both[0] for _, _, both in entries(dtype)])
        LATENTS.check_example(moments[0])
        mean = moments[..., :3].astype(np.float32)
        tokens = LATENTS.tokenize(moments)
        assert tokens.dtype == jnp.float32
        assert tokens.shape == (TOTAL, math.prod(LATENTS.grid), LATENTS.token_dim)
        np.testing.assert_array_equal(tokens, patchify((mean + 0.5) * 0.25, 2))
        np.testing.assert_allclose(LATENTS.export(tokens)["latents"], mean, atol=1e-6)


def test_latents_without_moments_are_taken_as_they_are():
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    LATENTS.check_example(latents[0])
    tokens = LATENTS.tokenize(latents, jax.random.key(0))
    np.testing.assert_allclose(LATENTS.export(tokens)["latents"], latents, atol=1e-6)


def test_posterior_is_sampled_anew_with_every_key():
    moments = np.repeat(entries()[0][2][:1], 20_000, axis=0)  # of one image, many times
    tokenize = jax.jit(LATENTS.tokenize)
    first, again, other = (np.asarray(tokenize(moments, jax.random.key(s))) for s in (0, 0, 1))
    assert same(first, again) and (first != other).mean() > 0.99 and (first[0] != first[1]).any()
    mean, log_variance = np.split(moments[:1].astype(np.float32), 2, axis=-1)
    drawn, deviation = np.asarray(LATENTS.export(first)["latents"]), np.exp(log_variance / 2)
    np.testing.assert_allclose(drawn.mean(0), mean[0], atol=5 * deviation.max() / 20_000**0.5)
    np.testing.assert_allclose(drawn.std(0), deviation[0], rtol=0.03)
