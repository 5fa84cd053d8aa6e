"""Batches of samples: where they begin, how large they are, and when they stop.

A dummy stands for the sampler; that real samples depend on nothing else is in
`tests/core/test_sample.py`.
"""

import types

import jax
import numpy as np
import pytest
from dummy_sampler import PARAMS, DummySampler, make_generator
from tiny import tiny_config

from djepa_jax.sampling.generator import Stopped

LABELS = np.arange(40, dtype=np.int32) % 10
SIXTEEN = "--config.sample.batch_size=16"
SHORT = "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"


@pytest.fixture
def sampler() -> DummySampler:
    return DummySampler()


def expected(labels=LABELS, seed: int = 0) -> np.ndarray:
    """All samples in one batch on one device."""
    whole = make_generator(
        DummySampler(), f"--config.sample.batch_size={len(labels)}", devices=jax.devices()[:1]
    )
    return whole.images(PARAMS, labels, seed)["images"]


def test_samples_are_the_same_however_they_are_batched(sampler):
    generator, whole = make_generator(sampler, SIXTEEN), expected(seed=3)
    assert whole.shape == (40, 8, 8, 1) and whole.dtype == np.uint8
    np.testing.assert_array_equal(generator.images(PARAMS, LABELS, 3)["images"], whole)
    rest = [batch["images"] for batch in generator.batches(PARAMS, LABELS, 3, first=7)]
    assert [len(batch) for batch in rest] == [16, 16, 1]
    np.testing.assert_array_equal(np.concatenate(rest), whole[7:])
    assert sampler.drawn == [0, 16, 32, 7, 23, 39]
    tokens = generator.tokens(PARAMS, LABELS, 3)
    np.testing.assert_array_equal(generator.export(tokens)["images"], whole)
    assert not list(generator.batches(PARAMS, LABELS, 3, first=40))


def test_a_batch_is_shared_by_the_devices_and_has_the_settings(sampler):
    flags = ("--config.sample.batch_size=9", "--config.sample.temperature=0.5")
    generator = make_generator(sampler, *flags)
    assert generator.batch_size == 16, "a multiple of the eight devices"
    generator.images(PARAMS, {"class": LABELS[:3], "mask": np.ones((3, 2))}, 5)
    inputs = sampler.inputs
    np.testing.assert_array_equal(inputs.conditions["class"], np.arange(16) % 3)
    assert inputs.conditions["mask"].shape == (16, 2)
    for leaf in (*jax.tree.leaves(inputs.conditions), inputs.sample_ids):
        assert len(leaf.sharding.device_set) == 8 and not leaf.sharding.is_fully_replicated
    assert (inputs.seed, inputs.temperature) == (5, 0.5)
    np.testing.assert_array_equal(inputs.cfg_scales, generator.experiment.cfg_scales)


def test_after_running_out_of_memory_it_goes_on_with_the_batch_that_failed(capsys):
    def short(ids):  # of memory, from the second batch on
        if len(ids) > 8 and ids[0] > 0:
            raise jax.errors.JaxRuntimeError(SHORT)

    sampler = DummySampler(short)
    found = make_generator(sampler, SIXTEEN).images(PARAMS, LABELS, 0)["images"]
    assert sampler.drawn == [0, 16, 24, 32] and "16" in capsys.readouterr().out
    np.testing.assert_array_equal(found, expected())


def test_what_a_smaller_batch_cannot_mend_is_raised(monkeypatch):
    def fail(text):
        def before(ids):
            raise jax.errors.JaxRuntimeError(text)

        return make_generator(DummySampler(before), SIXTEEN)

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: a mistake").images(PARAMS, LABELS, 0)
    generator = fail(SHORT)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        generator.images(PARAMS, LABELS, 0)
    assert generator.batch_size == 8, "one for each device is the least"
    generator = fail(SHORT)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        generator.images(PARAMS, LABELS, 0)
    assert generator.batch_size == 16, "processes would have to halve together"


def test_sampling_stops_between_batches(sampler):
    generator = make_generator(sampler, SIXTEEN)
    with pytest.raises(Stopped):
        generator.images(PARAMS, LABELS, 0, should_stop=lambda: len(sampler.drawn) == 2)
    assert sampler.drawn == [0, 16]


def test_latents_become_pictures_by_the_autoencoder_that_there_is(sampler):
    flags = ("--config.data.modality=image_latents", "--config.evaluation.kind=none", SIXTEEN)
    latents = tiny_config(*flags, "--config.autoencoder.path=some.ckpt")
    decoder = types.SimpleNamespace(
        sha256="ab" * 32, decode=lambda x: np.asarray(x > 0, np.uint8).repeat(2, 1).repeat(2, 2)
    )
    generator = make_generator(sampler, experiment=latents, autoencoder=decoder)
    arrays = generator.images(PARAMS, LABELS[:3], 0)
    assert generator.autoencoder_sha256 == decoder.sha256
    np.testing.assert_array_equal(arrays["images"], decoder.decode(arrays["latents"]))
    for without in (
        make_generator(sampler, experiment=latents, autoencoder=decoder, decode=False),
        make_generator(sampler, *flags),
    ):
        assert without.images(PARAMS, LABELS[:3], 0).keys() == {"latents"}
        assert without.autoencoder_sha256 == ""
