"""A cache on the devices gives the very examples that the same cache on disk gives."""

import json

import jax
import numpy as np
import pytest
from caches import TOTAL, write_cache
from tiny import run, tiny_config

from djepa_jax.config import experiment as configuration
from djepa_jax.core import sharding
from djepa_jax.data import latent_cache
from djepa_jax.data.device_cache import ResidentCache
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.data.sources import load_digits


@pytest.fixture(params=["bfloat16", "float32"])
def cache(request, tmp_path) -> latent_cache.LatentCache:
    return latent_cache.LatentCache(str(write_cache(tmp_path / "cache", request.param)))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2)])
def test_batches_are_those_from_disk(cache, mesh_shape, flip):
    resident = ResidentCache(cache, sharding.make_mesh(mesh_shape))
    from_disk = row_batches(example_stream(cache, 5, flip), 16, consumed=3)
    from_memory = row_batches(example_stream(resident.rows, 5, flip), 16, consumed=3)
    for _ in range(4):  # three epochs
        expected, actual = next(from_disk), resident.fetch(next(from_memory))
        np.testing.assert_array_equal(np.asarray(actual["example"]), expected["example"])
        np.testing.assert_array_equal(actual["condition"], expected["condition"])
        assert actual["example"].dtype == cache.metadata.dtype


def test_every_device_holds_its_share(cache):
    resident = ResidentCache(cache, sharding.make_mesh((8, 1, 1)))
    shards = resident._table.addressable_shards
    assert [shard.data.shape[0] for shard in shards] == [TOTAL // 4] * 8  # two rows an example


def test_only_a_cache_that_fits_is_taken(cache, monkeypatch):
    mesh = sharding.make_mesh((-1, 1, 1))
    with pytest.raises(configuration.ConfigError, match="device_resident needs data.source"):
        ResidentCache(load_digits(), mesh)

    class Small:
        def memory_stats(self):
            return {"bytes_limit": 100}

    monkeypatch.setattr(jax, "local_devices", lambda: [Small()])
    with pytest.raises(configuration.ConfigError, match="GiB on each device, which has 0.0 GiB"):
        ResidentCache(cache, mesh)


def test_training_is_that_from_disk_to_the_bit(tmp_path):
    """The command line, on eight devices."""
    cache = write_cache(tmp_path / "cache")
    flags = (
        f"--config.data.path={cache}",
        *(
            "--config.data.source=latents",
            "--config.data.modality=image_latents",
            "--config.data.num_classes=3",
        ),
        *(
            "--config.data.image_size=4",
            "--config.data.channels=3",
            "--config.data.patch_size=2",
            "--config.data.class_names=",
        ),
        *(
            "--config.data.latent_scale=0.25",
            "--config.data.latent_shift=-0.5",
            "--config.data.random_flip=True",
        ),
        *(
            "--config.batch_size=8",
            "--config.evaluation.kind=none",
            "--config.sample.num_ar_steps=2",
        ),
    )
    losses = []
    for resident in (False, True):
        workdir = tmp_path / str(resident)
        assert run(*flags, f"--workdir={workdir}", f"--config.data.device_resident={resident}") == 0
        losses.append(
            [
                json.loads(line)["loss"]
                for line in (workdir / "metrics.jsonl").read_text().splitlines()
            ]
        )
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_the_switch_is_off_by_default():
    assert tiny_config().data.device_resident is False
