"""A cache on the devices gives the very examples that the same cache on disk gives."""

import json

import jax
import numpy as np
import pytest
from caches import TOTAL, write_cache
from processes import simple_step
from tiny import run
from workdirs import arrays, assert_same_arrays

from djepa_jax.config.experiment import ConfigError
from djepa_jax.core import sharding
from djepa_jax.data.arrays import load_digits
from djepa_jax.data.device_cache import ResidentCache, table_bytes
from djepa_jax.data.latent_cache import LatentCache
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.training import compile_step
from djepa_jax.training.reporting import Reporter


def test_batches_are_those_from_disk(tmp_path):
    for dtype, mesh_shape, flip in (
        ("bfloat16", (8, 1, 1), True),
        ("float32", (2, 2, 2), False),
        ("bfloat16", (2, 2, 2), True),
    ):
        cache = LatentCache(write_cache(tmp_path / f"{dtype} {mesh_shape}", dtype))
        resident = ResidentCache(cache, sharding.make_mesh(mesh_shape))
        from_disk = row_batches(example_stream(cache, 5, flip), 16, consumed=3)
        from_memory = row_batches(example_stream(resident.rows, 5, flip), 16, consumed=3)
        for _ in range(4):  # three epochs
            expected, actual = next(from_disk), resident.fetch(next(from_memory))
            np.testing.assert_array_equal(np.asarray(actual["example"]), expected["example"])
            np.testing.assert_array_equal(actual["condition"], expected["condition"])
            assert actual["example"].dtype == cache.metadata.dtype


def test_every_device_holds_its_share_and_only_a_cache_that_fits_is_taken(tmp_path, monkeypatch):
    cache, mesh = LatentCache(write_cache(tmp_path / "cache")), sharding.make_mesh((8, 1, 1))
    shards = ResidentCache(cache, mesh)._table.addressable_shards
    assert [shard.data.shape[0] for shard in shards] == [TOTAL // 4] * 8  # two rows an example
    assert shards[0].data.nbytes == table_bytes(cache, mesh)
    with pytest.raises(ConfigError, match="device_resident needs data.source"):
        ResidentCache(load_digits(), mesh)

    class Small:
        def memory_stats(self):
            return {"bytes_limit": 100}

    monkeypatch.setattr(jax, "local_devices", lambda: [Small()])
    with pytest.raises(ConfigError, match="GiB on each device, which has 0.0 GiB"):
        ResidentCache(cache, mesh)


def test_training_is_that_from_disk_to_the_bit(tmp_path, monkeypatch):
    """The command line, on eight devices, with a step that compiles at once."""
    monkeypatch.setattr(compile_step, "make_train_step", lambda config: simple_step)
    monkeypatch.setattr(Reporter, "final_grid", lambda self, step, state: None)
    flags = f"""
        --config.data.path={write_cache(tmp_path / "cache")} --config.data.source=latents
        --config.data.modality=image_latents --config.data.num_classes=3 --config.data.class_names=
        --config.data.image_size=4 --config.data.channels=3 --config.data.patch_size=2
        --config.data.latent_scale=0.25 --config.data.latent_shift=-0.5
        --config.data.random_flip=True --config.batch_size=8 --config.evaluation.kind=none
        --config.sample.num_ar_steps=2
    """.split()
    losses, states = [], []
    for resident in (False, True):
        workdir = tmp_path / str(resident)
        assert run(*flags, f"--workdir={workdir}", f"--config.data.device_resident={resident}") == 0
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        states.append(arrays(workdir, step=3))
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    assert_same_arrays(*states)
