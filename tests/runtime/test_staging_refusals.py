"""Data in a bucket that cannot be had or must not be used: refused in one line, and before anything
is copied where it can be.

The bucket is an `ObjectStore` in this process, on loopback.
"""

import os
import pathlib
import shutil

import aiohttp
import pytest
from buckets import refusal
from caches import SHA
from object_store import ObjectStore
from staged import LATENTS, NAMES, URL, downloaded, files
from tiny import CONFIG, load_config

from djepa_jax.config.experiment import build
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import open_data
from djepa_jax.runtime import downloads, staging
from djepa_jax.runtime.staging import local_copy, local_source, staging_folder
from djepa_jax.runtime.storage import PathError

# ---------------------------------------------------------------- the program


def config_of(tmp_path: pathlib.Path, *flags: str):
    return load_config("digits", *LATENTS, f"--config.data.staging={tmp_path / 'staged'}", *flags)


def test_cache_of_another_config_is_not_copied(bucket, tmp_path):
    config = config_of(tmp_path, "--config.data.latent_scale=0.5")
    with pytest.raises(
        DataError,
        match=f"{URL} was made for another config; it needs --config.data.latent_scale=0.25",
    ):
        open_data(config.data, build(config).modality)
    assert downloaded(bucket) == []


def test_cache_is_not_copied_for_a_run_that_has_no_autoencoder(bucket, tmp_path, capsys):
    flags = [
        f"--config={CONFIG}",
        *LATENTS,
        f"--config.data.staging={tmp_path}",
        "--config.autoencoder.path=gs://bucket/kl16.ckpt",
    ]
    line = refusal(capsys, *flags, f"--workdir={tmp_path / 'run'}")
    assert line.startswith(
        "error: config.autoencoder.path names gs://bucket/kl16.ckpt, and there is no such object"
    )
    assert downloaded(bucket) == [] and not (tmp_path / "run").exists()


def test_autoencoder_in_a_bucket_is_compared_with_the_cache(bucket, tmp_path, capsys):
    bucket.objects["kl/kl16.ckpt"] = b"another"
    flags = [
        f"--config={CONFIG}",
        *LATENTS,
        f"--config.data.staging={tmp_path}",
        "--config.autoencoder.path=gs://bucket/kl/kl16.ckpt",
    ]
    line = refusal(capsys, *flags, f"--workdir={tmp_path / 'run'}")
    assert (
        f"made with the autoencoder of sha256 {SHA}, config.autoencoder.path "
        "gs://bucket/kl/kl16.ckpt has" in line
    )


# ---------------------------------------------------------------- what cannot be


def change_shard(store: ObjectStore, data: bytes | None) -> None:
    del store.objects[f"data/cache/shards/{NAMES[2]}"]
    if data is not None:
        store.objects[f"data/cache/shards/{NAMES[2]}"] = data


def flipped(store: ObjectStore) -> bytes:
    data = store.objects[f"data/cache/shards/{NAMES[2]}"]
    return data[:-1] + bytes([data[-1] ^ 1])


BAD = {
    "no object": (
        lambda store: store.objects.clear(),
        [f'data.path is "{URL}"', "no latent cache", "copy it again"],
    ),
    "an unfinished cache": (
        lambda store: store.objects.pop("data/cache/metadata.json"),
        [f'data.path is "{URL}"', "an unfinished latent cache"],
    ),
    "a missing shard": (
        lambda store: change_shard(store, None),
        [f"{URL}/shards/{NAMES[2]} is missing", "copy the cache"],
    ),
    "a cut shard": (
        lambda store: change_shard(store, b"123"),
        ["has 3 bytes instead of ", "copy the cache"],
    ),
    "a damaged shard": (
        lambda store: change_shard(store, flipped(store)),
        [NAMES[2], "differs from its checksum, sha256"],
    ),
    "other metadata": (
        lambda store: store.objects.update({"data/cache/metadata.json": b"[]"}),
        [f"{URL}/metadata.json cannot be read"],
    ),
    "a name that leads out": (
        lambda store: store.objects.update(
            {
                "data/cache/metadata.json": store.objects["data/cache/metadata.json"].replace(
                    NAMES[0].encode(), b"../../x"
                )
            }
        ),
        ["../../x is not the name of a file"],
    ),
    "a file": (
        lambda store: (store.objects.clear(), store.objects.update({"data/cache": b"1"})),
        [f'data.path is "{URL}"', "no latent cache"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cache_is_one_line(bucket, tmp_path, capsys, name):
    change, texts = BAD[name]
    change(bucket)
    flags = [f"--config={CONFIG}", *LATENTS, f"--config.data.staging={tmp_path / 'staged'}"]
    line = refusal(capsys, *flags, f"--workdir={tmp_path / 'run'}")
    assert all(text in line for text in texts), line
    assert not (tmp_path / "run").exists() and not list(
        (tmp_path / "staged").rglob(NAMES[2] + "*[!d]")
    )


def test_missing_bucket_is_named(bucket, again):
    with pytest.raises(
        PathError,
        match="data.path names gs://no-bucket/cache, and there is no such object; check the name",
    ):
        again("gs://no-bucket/cache")


@pytest.mark.parametrize("error", ["HttpError", "ClientError", "OSError"])
@pytest.mark.parametrize("call", ["info", "cat_file", "ls"])
def test_storage_that_refuses_or_does_not_answer_is_one_line(
    bucket, again, monkeypatch, error, call
):
    from gcsfs.retry import HttpError  # not before access to buckets is set up

    errors = [
        HttpError({"code": 403, "message": "not\nyours"}),
        aiohttp.ClientError("away"),
        OSError("x"),
    ]

    def fail(*_, **__):
        raise next(raised for raised in errors if type(raised).__name__ == error)

    monkeypatch.setattr(downloads.storage(), call, fail)
    with pytest.raises(
        PathError, match=f"{URL}.* cannot be read .*{error}.*storage.objectViewer"
    ) as caught:
        again()
    assert len(str(caught.value).splitlines()) == 1


def test_full_disk_is_told_before_anything_is_copied(bucket, again, monkeypatch):
    needed = sum(len(data) for name, data in bucket.objects.items() if "shards" in name)
    usage = shutil.disk_usage("/")._replace(free=needed - 1)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        PathError,
        match=f"needs {needed:,} bytes, and the disk of .* has {needed - 1:,} free; .*data.staging",
    ):
        again()
    assert downloaded(bucket) == []
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert files(again()) == bucket.objects


def test_disk_that_fills_meanwhile_is_one_line(bucket, again, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(PathError, match="cannot be copied to .*No space left.*is kept"),
    ):
        patch.setattr(downloads.os, "fsync", full)
        again()
    assert files(again()) == bucket.objects


@pytest.mark.parametrize("name", ["folder", "tar", "tfds"])
def test_images_in_a_bucket_are_encoded_first(name):
    with pytest.raises(
        PathError,
        match=f'"gs://bucket/images" .* data.source "{name}" does not .*prepare.*gcloud storage',
    ):
        local_source(name, "gs://bucket/images")
    with pytest.raises(
        PathError, match=f'prepare.path "gs://bucket/images" .* prepare.source "{name}"'
    ):
        local_source(name, "gs://bucket/images", group="prepare")
    assert local_source("synthetic", "gs://bucket/unused") == "gs://bucket/unused"


def test_copies_are_kept_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert staging_folder() == tmp_path / "djepa_jax" / "staged"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert staging_folder() == pathlib.Path("/home/me/.cache/djepa_jax/staged")
    assert staging_folder("~/here") == pathlib.Path("/home/me/here")
    monkeypatch.setattr(os.path, "expanduser", str)
    with pytest.raises(PathError, match="no cache folder.*--config.data.staging"):
        staging_folder()


def test_folder_for_copies_that_cannot_be_is_named(bucket, tmp_path):
    with pytest.raises(
        PathError, match='--config.data.staging "gs://bucket/x" is not a local path'
    ):
        local_copy(URL, "gs://bucket/x")
    (tmp_path / "file").touch()
    with pytest.raises(
        PathError, match=f"cannot be copied to {tmp_path}/file/cache-.*--config.data.staging"
    ):
        local_copy(URL, str(tmp_path / "file"))
