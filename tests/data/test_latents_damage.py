"""Latent caches that are unfinished, damaged or of another version: always one clear error."""

import pathlib
import random

import pytest
from caches import SHA, TOTAL, entries, write_cache
from photos import same

from djepa_jax.data import latent_cache
from djepa_jax.data.latent_cache import LatentCache, check_autoencoder, pack, read_metadata
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import open_source


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    return write_cache(tmp_path / "cache")


@pytest.fixture
def shard(cache) -> pathlib.Path:
    return cache / "shards" / "00001-of-00003.array_record"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flipped(whole: bytes, place: int, mask: int = 1) -> bytes:
    return whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]


def flip(path):
    path.write_bytes(flipped(path.read_bytes(), 20_000))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (pathlib.Path.unlink, "is missing"),
        (cut, "has 131071 bytes instead of 131072"),
        (flip, "differs from its checksum, sha256 {}"),
    ],
)
def test_damaged_shard_is_named(cache, shard, damage, words):
    words = words.format(latent_cache.file_sha256(shard))
    damage(shard)
    with pytest.raises(DataError) as caught:
        LatentCache(str(cache))
    assert f"shard {shard} {words}; copy it again, or remove it and run --mode=prepare" in str(
        caught.value
    )


def test_damage_in_a_cache_too_large_to_be_verified_is_found_on_reading(cache, shard, monkeypatch):
    monkeypatch.setattr(latent_cache, "VERIFIED_BYTES", 0)
    whole, checksum, rng = shard.read_bytes(), latent_cache.file_sha256(shard), random.Random(0)
    moments = [whole.index(entry[2].tobytes()) + rng.randrange(300) for entry in entries()[5:9]]
    index = [1950, 65_590]  # parts of the file that say where the records are
    for place in moments + index + rng.sample(range(len(whole)), 30):
        shard.write_bytes(flipped(whole, place))
        try:
            source = LatentCache(str(cache))
            read = [source[i] for i in range(TOTAL)]
        except DataError as error:
            assert str(shard) in str(error) and checksum in str(error)
        else:
            assert place not in moments + index, "only padding may change unnoticed"
            assert all(
                same(example["mirror"], entry[2][1])
                for example, entry in zip(read, entries(), strict=True)
            )


def test_shard_is_whole_or_absent(tmp_path, monkeypatch):
    path, records = tmp_path / "shard", [pack(*entry) for entry in entries()]
    (tmp_path / "shard.unfinished").write_text("left over")
    latent_cache.write_shard(path, records)
    assert [file.name for file in tmp_path.iterdir()] == ["shard"]
    with pytest.raises(OSError, match="no disk/shard.unfinished could not be written") as caught:
        latent_cache.write_shard(tmp_path / "no disk" / "shard", records)
    assert caught.value.errno not in latent_cache.FULL, "more space would not help"
    write = latent_cache.array_record_module.ArrayRecordWriter.write
    changes = iter([b"another", *records[1:]])
    monkeypatch.setattr(
        latent_cache.array_record_module.ArrayRecordWriter,
        "write",
        lambda self, _: write(self, next(changes)),
    )
    with pytest.raises(OSError, match="other.unfinished does not hold what was written to it"):
        latent_cache.write_shard(tmp_path / "other", records)
    assert not (tmp_path / "other").exists()


def test_unfinished_and_absent_caches_are_told_apart(cache, tmp_path):
    (cache / "metadata.json").unlink()
    with pytest.raises(
        DataError,
        match=f'data.path is "{cache}", which holds an unfinished .*--mode=prepare '
        f"--workdir={cache}",
    ):
        open_source("latents", str(cache), None, 3)
    with pytest.raises(DataError, match="which holds no latent cache; make one"):
        LatentCache(str(tmp_path / "elsewhere"))


def test_metadata_of_another_format_is_refused(cache):
    path = cache / "metadata.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(
        DataError, match="metadata.json has format 2, this version reads 1; prepare the data again"
    ):
        LatentCache(str(cache))


def test_damaged_metadata_is_one_clear_error(cache):
    path, rng, expected = cache / "metadata.json", random.Random(3), entries()
    whole, good = path.read_bytes(), read_metadata(cache)
    cases = [
        b"",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{}",
        b"\0" * len(whole),
        whole[: len(whole) // 2],
    ]
    cases += [flipped(whole, place, rng.randrange(1, 256)) for place in range(len(whole))]
    for content in cases:
        path.write_bytes(content)
        try:
            source = LatentCache(str(cache))
            check_autoencoder(source.metadata, "kl.ckpt", SHA)
            read = [source[i] for i in range(len(source))]
            assert source.labels.tolist() == [0, 1, 2] or max(source.labels) > 2, (
                "a class that the config does not have"
            )
        except DataError:
            continue
        assert all(
            same(example["mirror"], entry[2][1])
            for example, entry in zip(read, expected, strict=True)
        )
        assert source.metadata.shape == good.shape and source.metadata.dtype == good.dtype
