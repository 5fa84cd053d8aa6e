"""Copies of what lies in a bucket: made once, compared, completed, renewed.

The bucket is an `ObjectStore` in this process, on loopback.
"""

import base64
import json
import os
import pathlib
import threading

import google_crc32c
import jax
import numpy as np
import pytest
from caches import TOTAL, entries, write_cache
from object_store import ObjectStore
from processes import Training
from small_autoencoder import NAME, registered, write_weights
from staged import LATENTS, NAMES, URL, downloaded, files, upload
from tiny import load_config
from workdirs import RUN, compiled

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.config.experiment import build
from djepa_jax.core import sharding
from djepa_jax.data.latent_cache import LatentCache
from djepa_jax.data.sources import SOURCES, open_data
from djepa_jax.runtime import downloads, staging
from djepa_jax.runtime.staging import local_copy, local_source

# ---------------------------------------------------------------- copies of a cache


def test_copy_holds_what_the_bucket_holds(bucket, again, capsys):
    folder = again()
    assert files(folder) == bucket.objects and downloaded(bucket) == NAMES
    cache = LatentCache(str(folder))
    assert len(cache) == TOTAL and cache.key(3) == entries()[3][1]
    assert f"copying {URL} to {folder}: 3 of 3 files, " in capsys.readouterr().out


def test_second_start_copies_nothing(bucket, again, capsys):
    folder = again()
    capsys.readouterr()
    assert again() == folder and downloaded(bucket) == [] and capsys.readouterr().out == ""


def test_process_asks_the_bucket_once(bucket, tmp_path):
    first = local_copy(URL, str(tmp_path))
    bucket.requests.clear()
    assert local_copy(URL + "/", str(tmp_path)) == first and bucket.requests == []


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:]]
)
def test_damaged_file_is_copied_again(bucket, again, damage):
    path = again() / "shards" / NAMES[1]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(damage(path.read_bytes()))
    os.utime(path, ns=times)  # as a failing disk does it, which tells nobody
    assert files(again()) == bucket.objects and downloaded(bucket) == [NAMES[1]]


def test_file_of_a_large_cache_is_read_again_only_if_it_was_changed(bucket, again, monkeypatch):
    shards = again() / "shards"
    monkeypatch.setattr(staging, "VERIFIED_BYTES", 0)
    read = []
    hasher = staging.hasher
    monkeypatch.setattr(staging, "hasher", lambda kind: read.append(kind) or hasher(kind))
    again()
    assert read == []
    (shards / NAMES[0]).write_bytes((shards / NAMES[0]).read_bytes())
    os.utime(shards / NAMES[0], ns=(1, 1))
    again()
    assert read == ["sha256"] and downloaded(bucket) == []
    (shards / NAMES[0]).write_bytes(bytes((shards / NAMES[0]).stat().st_size))
    assert files(again()) == bucket.objects and downloaded(bucket) == [NAMES[0]]


def test_interrupted_copy_is_completed(bucket, again, monkeypatch):
    storage, count = downloads.storage(), []
    cat_file = storage.cat_file

    def cut_off(path, **where):
        count.extend([path] if "shards" in path else [])
        if len(count) == 3:
            raise KeyboardInterrupt
        return cat_file(path, **where)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads, "THREADS", 1)
        patch.setattr(storage, "cat_file", cut_off)
        again()
    folder = again()
    assert downloaded(bucket) == [NAMES[2]] and files(folder) == bucket.objects


def test_what_a_killed_process_leaves_is_used_or_removed(bucket, again):
    folder = again()
    for name in ("metadata.json", staging.RECORD_NAME):
        (folder / name).unlink()
    path = folder / "shards" / NAMES[1]
    path.rename(path.with_name(path.name + downloads.UNFINISHED))
    assert files(again()) == bucket.objects and downloaded(bucket) == [NAMES[1]]


def test_other_cache_at_the_same_address_is_noticed(bucket, again, tmp_path):
    folder = again()
    (folder / "shards" / "of an earlier state").touch()
    upload(bucket, write_cache(tmp_path / "other", "float32"))
    assert again() == folder and files(folder) == bucket.objects and downloaded(bucket) == NAMES
    assert LatentCache(str(folder)).metadata.dtype == "float32"


def test_metadata_that_was_written_anew_costs_no_shard(bucket, again):
    again()
    text = json.loads(bucket.objects["data/cache/metadata.json"])
    bucket.objects["data/cache/metadata.json"] = json.dumps(text | {"scale": 0.5}).encode()
    assert files(again()) == bucket.objects and downloaded(bucket) == []


def test_caches_at_other_addresses_have_other_copies(bucket, again):
    bucket.objects.update(
        {name.replace("data/", "else/"): data for name, data in bucket.objects.items()}
    )
    assert again() != again("gs://bucket/else/cache")


def test_of_two_processes_one_copies(bucket, tmp_path, capsys):
    folders, both = [], threading.Barrier(2)

    def copy():
        both.wait()
        folders.append(staging._copied.__wrapped__(URL, tmp_path / "staged", "data.path"))

    threads = [threading.Thread(target=copy) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1] and downloaded(bucket) == NAMES
    assert capsys.readouterr().out.count("copying") == 1


def test_lock_is_waited_for(bucket, tmp_path, monkeypatch, capsys):
    held = []

    def flock(file, operation):
        held.append(operation)
        if operation & staging.fcntl.LOCK_NB:
            raise BlockingIOError

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    local_copy(URL, str(tmp_path / "staged"))
    assert held == [staging.fcntl.LOCK_EX | staging.fcntl.LOCK_NB, staging.fcntl.LOCK_EX]
    assert (
        f"waiting for another process on this host, which copies {URL}" in capsys.readouterr().out
    )


def test_progress_tells_what_is_left():
    said = []
    progress = downloads.Progress(4 * 2**30, said.append)
    progress.add(10)
    progress._told -= downloads.PROGRESS_SECONDS
    progress._start -= 100
    progress.add(2**30)
    (line,) = said
    assert (
        line.startswith("copied 1.0 GiB of 4.0 GiB, ")
        and line.endswith(" left")
        and "MiB/s" in line
    )


# ---------------------------------------------------------------- single files


def with_npz(store: ObjectStore, tmp_path: pathlib.Path) -> dict[str, np.ndarray]:
    arrays = {
        "images": np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4),
        "labels": np.arange(5) % 2,
    }
    np.savez(tmp_path / "mine.npz", **arrays)
    store.objects["data/mine.npz"] = (tmp_path / "mine.npz").read_bytes()
    return arrays


def test_npz_file_in_a_bucket_is_a_source(bucket, tmp_path):
    arrays = with_npz(bucket, tmp_path)
    flags = [
        "image_size=4",
        "patch_size=1",
        "num_classes=2",
        f"staging={tmp_path / 'staged'}",
        "class_names=",
    ]
    places = ["--config.data.source=npz", "--config.data.path=gs://bucket/data/mine.npz"]
    config = load_config("digits", *places, *(f"--config.data.{flag}" for flag in flags))
    source = open_data(config.data, build(config).modality)
    np.testing.assert_array_equal(source.images[..., 0], arrays["images"])


@pytest.mark.parametrize("kind", ["md5", "crc32c"])
def test_file_is_known_by_its_checksum(bucket, again, tmp_path, monkeypatch, kind):
    with_npz(bucket, tmp_path)
    storage = downloads.storage()
    info = storage.info

    def of_parts(path):
        """What is told of an object that was uploaded in parts."""
        crc = google_crc32c.Checksum(bucket.objects["data/mine.npz"]).digest()
        told = {name: value for name, value in info(path).items() if name != "md5Hash"}
        return told | {"crc32c": base64.b64encode(crc).decode()}

    if kind == "crc32c":
        monkeypatch.setattr(storage, "info", of_parts)
    path = again("gs://bucket/data/mine.npz")
    assert path.name == "mine.npz" and path.read_bytes() == bucket.objects["data/mine.npz"]
    again("gs://bucket/data/mine.npz")
    assert downloaded(bucket) == []
    bucket.objects["data/mine.npz"] = bytes(len(bucket.objects["data/mine.npz"]))
    assert again("gs://bucket/data/mine.npz").read_bytes() == bucket.objects["data/mine.npz"]


def test_local_paths_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        local_copy("a/b") == pathlib.Path("a/b")
        and local_copy("~/kl16.ckpt") == tmp_path / "kl16.ckpt"
    )
    assert all(local_source(name, "a//b") == "a//b" for name in SOURCES)


# ---------------------------------------------------------------- the program


def test_training_takes_its_cache_from_a_bucket(bucket, tmp_path):
    flags = (
        *RUN,
        *LATENTS,
        f"--config.data.staging={tmp_path / 'staged'}",
        f"--workdir={tmp_path / 'run'}",
    )
    status, said = Training(
        compiled(), *flags, "--config.num_steps=2", storage=bucket.environment
    ).finish()
    assert status == 0 and f"copying {URL} to {tmp_path / 'staged'}" in said, said
    assert downloaded(bucket) == NAMES
    bucket.requests.clear()
    status, said = Training(
        compiled(), *flags, "--config.num_steps=4", storage=bucket.environment
    ).finish()
    assert status == 0 and "going on from step 2 of 4" in said and downloaded(bucket) == [], said
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert stored["path"] == URL, "the next start needs the address, not the copy"


def test_autoencoder_in_a_bucket(bucket, tmp_path):
    weights = write_weights(tmp_path / "small.safetensors")
    bucket.objects["kl/small.safetensors"] = pathlib.Path(weights).read_bytes()
    settings = load_config("default", f"--config.autoencoder.name={NAME}").autoencoder
    settings.path = "gs://bucket/kl/small.safetensors"
    with registered():
        found = Autoencoder(
            settings, sharding.make_mesh((-1, 1, 1), jax.devices()[:1]), str(tmp_path / "staged")
        )
    assert found.sha256 == file_sha256(weights) and downloaded(bucket) == ["small.safetensors"]
