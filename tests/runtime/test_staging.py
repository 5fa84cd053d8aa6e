"""Copies of what lies in a bucket: made once, compared, completed, renewed, or refused in one line.

The bucket is an `ObjectStore` in this process, on loopback.
"""

import errno
import json
import os
import pathlib
import threading

import jax
import numpy as np
import pytest
from buckets import refusal
from caches import SHA, TOTAL, entries, write_cache
from photos import opened
from processes import Training
from small_autoencoder import cache_config, registered, write_weights
from staged import LATENTS, NAMES, URL, downloaded, files, upload
from tiny import CONFIG
from workdirs import RUN, compiled

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.core import sharding
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data.latent_cache import LatentCache, local_cache
from djepa_jax.runtime import staging
from djepa_jax.runtime.staging import local_copy
from djepa_jax.runtime.storage import PathError

FILE = "gs://bucket/kl/weights.safetensors"


def shard(number: int) -> str:
    return f"data/cache/shards/{NAMES[number]}"


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


# ---------------------------------------------------------------- copies of a cache


def test_a_copy_is_what_the_bucket_holds_and_is_made_once(bucket, again, capsys):
    folder = again()
    assert files(folder) == bucket.objects and downloaded(bucket) == NAMES
    cache = LatentCache(str(folder))
    assert len(cache) == TOTAL and cache.key(3) == entries()[3][1]
    assert f"of {URL} to {folder}" in capsys.readouterr().out
    assert again() == folder and downloaded(bucket) == [] and capsys.readouterr().out == ""


def test_a_damaged_file_is_copied_again(bucket, again):
    path = again() / "shards" / NAMES[1]
    whole = path.read_bytes()
    for damaged in (flipped(whole), whole[:-1], None):
        if damaged is None:
            path.rename(path.with_name(path.name + ".unfinished"))  # as a killed process leaves it
        else:
            path.write_bytes(damaged)
        assert files(again()) == bucket.objects and downloaded(bucket) == [NAMES[1]]


def test_a_large_copy_is_not_read_through(bucket, again, monkeypatch):
    folder = again()
    monkeypatch.setattr(staging, "VERIFIED_BYTES", 0)
    monkeypatch.setattr(staging, "_checksum", lambda path, like: 1 / 0)
    assert again() == folder and downloaded(bucket) == []


def test_an_interrupted_copy_goes_on_where_it_was(bucket, again, monkeypatch):
    checksum, count = staging._checksum, []

    def cut_off(path, like):
        count.append(path)
        if len(count) == 3:
            raise KeyboardInterrupt
        return checksum(path, like)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "THREADS", 1)
        patch.setattr(staging, "_checksum", cut_off)
        again()
    assert files(again()) == bucket.objects and downloaded(bucket) == [NAMES[2]]


def test_another_cache_at_the_same_address_is_noticed(bucket, again, tmp_path):
    folder, before = again(), dict(bucket.objects)
    upload(bucket, write_cache(tmp_path / "other", "float32"))
    assert files(again()) == bucket.objects and downloaded(bucket) == NAMES
    assert files(folder) == before, "a run may still read it"


def test_metadata_that_was_written_anew_costs_no_shard(bucket, again):
    again()
    text = json.loads(bucket.objects["data/cache/metadata.json"])
    bucket.objects["data/cache/metadata.json"] = json.dumps(text | {"scale": 0.5}).encode()
    assert files(again()) == bucket.objects and downloaded(bucket) == []


def test_of_two_processes_one_copies(bucket, tmp_path, capsys):
    threads = [
        threading.Thread(target=lambda: local_cache(URL, str(tmp_path / "staged")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloaded(bucket) == NAMES and capsys.readouterr().out.count("copying") == 1


# ---------------------------------------------------------------- single files


def test_a_file_is_copied_once_by_a_process_and_anew_when_it_changes(bucket, tmp_path):
    bucket.objects["kl/weights.safetensors"] = b"one"
    path = local_copy(FILE, str(tmp_path))
    assert path.name == "weights.safetensors" and path.read_bytes() == b"one"
    bucket.objects["kl/weights.safetensors"] = b"two"
    assert local_copy(FILE, str(tmp_path)) == path and path.read_bytes() == b"one"
    staging._copied.cache_clear()
    assert local_copy(FILE, str(tmp_path)).read_bytes() == b"two"


def test_npz_files_and_autoencoders_in_a_bucket(bucket, tmp_path):
    np.savez(tmp_path / "mine.npz", images=np.zeros((5, 4, 4), np.uint8), labels=np.arange(5))
    bucket.objects["data/mine.npz"] = (tmp_path / "mine.npz").read_bytes()
    modality, staging = MODALITIES["image_pixels"](4, 1, 2), str(tmp_path / "staged")
    source = opened("npz", "gs://bucket/data/mine.npz", 5, modality, staging=staging)
    assert source.labels.tolist() == list(range(5))
    weights = write_weights(tmp_path / "small.safetensors")
    bucket.objects["kl/weights.safetensors"] = pathlib.Path(weights).read_bytes()
    mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:1])
    with registered():
        experiment = cache_config(FILE, "")
        found = Autoencoder(experiment.autoencoder, mesh, staging)
    assert found.sha256 == file_sha256(weights)


def test_local_paths_are_left_alone():
    assert local_copy("a/b") == pathlib.Path("a/b")
    assert local_cache("a/b", "") == pathlib.Path("a/b")


# ---------------------------------------------------------------- the program


def test_training_takes_its_cache_from_a_bucket(bucket, tmp_path):
    flags = (*RUN, *LATENTS, f"--config.data.staging={tmp_path}", f"--workdir={tmp_path / 'run'}")
    training = Training(compiled(), *flags, "--config.num_steps=2", storage=bucket.environment)
    status, said = training.finish()
    assert status == 0 and downloaded(bucket) == NAMES, said
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert stored["path"] == URL, "the next start needs the address, not the copy"


BAD = {  # what is done to the bucket -> words of the error
    "no object": (lambda objects: objects.clear(), [URL]),
    "an unfinished cache": (lambda objects: objects.pop("data/cache/metadata.json"), [URL]),
    "a missing shard": (lambda objects: objects.pop(shard(2)), [NAMES[2], "check the address"]),
    "a cut shard": (lambda objects: objects.update({shard(2): b"1"}), [NAMES[2], "checksum"]),
    "a damaged shard": (
        lambda objects: objects.update({shard(2): flipped(objects[shard(2)])}),
        [NAMES[2], "checksum", "copy it to the bucket again"],
    ),
    "other metadata": (
        lambda objects: objects.update({"data/cache/metadata.json": b"[]"}),
        [f"{URL}/metadata.json cannot be read"],
    ),
    "a name that leads out": (
        lambda objects: objects.update(
            {
                "data/cache/metadata.json": objects["data/cache/metadata.json"].replace(
                    NAMES[0].encode(), b"../../x"
                )
            }
        ),
        ["../../x is not the name of a file"],
    ),
}


def test_a_bad_cache_is_one_line(bucket, tmp_path, capsys):
    whole = dict(bucket.objects)
    for name, (change, words) in BAD.items():
        bucket.objects.clear()
        bucket.objects.update(whole)
        change(bucket.objects)
        staged = tmp_path / name
        flags = [f"--config={CONFIG}", *LATENTS, f"--config.data.staging={staged}"]
        line = refusal(capsys, *flags, f"--workdir={tmp_path / 'run'}")
        assert all(word in line for word in words), (name, line)
        assert not (tmp_path / "run").exists() and not list(staged.rglob(NAMES[2]))


REFUSED = {  # flags -> words of the error
    "--config.data.latent_scale=0.5": [URL, "--config.data.latent_scale=0.25"],
    "--config.autoencoder.path=gs://bucket/kl16.ckpt": ["autoencoder.path", "kl16.ckpt"],
    "--config.autoencoder.path=gs://bucket/kl/kl16.ckpt": [SHA, "gs://bucket/kl/kl16.ckpt"],
    "--config.data.source=tar": [URL, '"tar"', "--mode=prepare", "gcloud storage cp"],
}


def test_what_does_not_fit_a_cache_is_one_line(bucket, tmp_path, capsys):
    bucket.objects["kl/kl16.ckpt"] = b"another"
    flags = [f"--config={CONFIG}", *LATENTS, f"--config.data.staging={tmp_path / 'staged'}"]
    for flag, words in REFUSED.items():
        line = refusal(capsys, *flags, flag, f"--workdir={tmp_path / 'run'}")
        assert all(word in line for word in words), line
        assert not (tmp_path / "run").exists()


def test_a_disk_that_cannot_take_it_is_named(bucket, again, monkeypatch, tmp_path):
    needed = sum(len(data) for name, data in bucket.objects.items() if "shards" in name)
    usage = staging.shutil.disk_usage("/")
    with monkeypatch.context() as patch, pytest.raises(PathError, match=f"needs {needed:,} bytes"):
        patch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        again()
    assert downloaded(bucket) == []

    def full(path, like):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(PathError, match="No space left.*staging"):
        patch.setattr(staging, "_checksum", full)
        again()
    assert files(again()) == bucket.objects
    (tmp_path / "file").touch()
    with pytest.raises(PathError, match=f"cannot be copied to {tmp_path}/file .*data.staging"):
        local_copy(FILE, str(tmp_path / "file"))


def test_where_copies_are_kept(bucket, monkeypatch, tmp_path):
    bucket.objects["kl/weights.safetensors"] = b"one"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local_copy(FILE).is_relative_to(tmp_path / "djepa_jax" / "staged")
    with pytest.raises(PathError, match='data.staging "gs://bucket/x" is not a local path'):
        local_copy(FILE, "gs://bucket/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", str)
    with pytest.raises(PathError, match="no cache folder.*--config.data.staging"):
        local_copy(FILE)
