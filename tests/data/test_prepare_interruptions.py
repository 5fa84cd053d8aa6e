"""Making a latent cache when something comes between: killed processes, a full disk, several
processes at once.
"""

import random
import shutil
import time

import pytest
from photos import NAMES, crop, encode, write_folder
from processes import Preparation
from small_autoencoder import cache_config, files_of, write_weights

from djepa_jax.data.latent_cache import LatentCache

COUNT, SHARD = 24, 1
SHARDS = COUNT // SHARD


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Settings for a cache of 24 images in 24 shards."""
    root = tmp_path_factory.mktemp("data")
    images = [
        (f"{name}/{i:02d}", encode(crop(name, i)), label)
        for label, name in enumerate(NAMES)
        for i in range(COUNT // 2)
    ]
    weights = write_weights(root / "small.safetensors")
    return cache_config(
        weights, write_folder(root / "images", images), f"--config.prepare.shard_size={SHARD}"
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    """Where processes keep what they compiled for one another."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def expected(config, compiled, tmp_path_factory) -> dict[str, bytes]:
    """The files of a cache that was made without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    messages = Preparation(config, folder, compiled).finish()
    assert messages[-1] == "done" and len(messages) == SHARDS + 2
    files = files_of(folder)
    assert len(files) == 2 * SHARDS + 2 and len(LatentCache(str(folder))) == COUNT
    return files


def test_killed_at_any_moment_and_started_again(config, compiled, expected, tmp_path):
    rng, kills, folder = random.Random(0), 0, tmp_path / "cache"
    while kills < 10:
        process = Preparation(config, folder, compiled)
        if kills % 3 == 2:
            time.sleep(rng.uniform(0, 0.5))  # before the first shard, or after
        else:
            next(process.messages, None)  # it says something after every shard
            time.sleep(rng.uniform(0, 0.03))
        if process.kill() == 0:  # too late
            assert files_of(folder) == expected
            shutil.rmtree(folder)
            continue
        assert not (folder / "metadata.json").exists() or files_of(folder) == expected
        kills += 1
    assert Preparation(config, folder, compiled).finish()[-1] == "done"
    assert files_of(folder) == expected


def test_full_disk_is_one_error_and_nothing_is_lost(config, compiled, expected, tmp_path):
    for limit in (70_000, 0):  # the first run is allowed one shard, the second none
        messages = Preparation(config, tmp_path, compiled, limit=limit).finish()
        assert messages[-1].startswith("failed: shard ") and "\n" not in messages[-1]
        for words in ("00001-of", "cannot be written", "File too large", "are kept", "make room"):
            assert words in messages[-1]
        found = files_of(tmp_path)
        whole = [name for name in found if name.endswith(".array_record")]
        assert len(whole) == 1 and found[whole[0]] == expected[whole[0]]
    assert Preparation(config, tmp_path, compiled).finish()[-1] == "done"
    assert files_of(tmp_path) == expected


def test_two_processes_share_the_work(config, compiled, expected, tmp_path):
    both = [Preparation(config, tmp_path, compiled, shard=f"{index}/2") for index in range(2)]
    messages = [process.finish() for process in both]
    assert all(said[-1] == "done" for said in messages), messages
    assert [sum("is finished; " in line for line in said) for said in messages] == [SHARDS / 2] * 2
    assert files_of(tmp_path) == expected, "the one that came last has completed it"


def test_a_share_that_was_killed_is_made_by_a_run_without_one(config, compiled, expected, tmp_path):
    both = [Preparation(config, tmp_path, compiled, shard=f"{index}/2") for index in range(2)]
    next(both[1].messages)
    both[1].kill()
    assert both[0].finish()[-1] == "done"
    assert Preparation(config, tmp_path, compiled).finish()[-1] == "done"
    assert files_of(tmp_path) == expected
