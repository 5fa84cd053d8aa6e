"""Every modality: shapes, round trip, refusal of other examples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djepa_jax.core.modalities import MODALITIES

EXAMPLES = {
    "image_pixels": (dict(size=8, channels=3, patch=2), np.uint8),
    "image_latents": (dict(size=8, channels=3, patch=2, scale=0.25), np.float32),
}


@pytest.fixture(params=MODALITIES)
def modality(request):
    settings, dtype = EXAMPLES[request.param]
    rng = np.random.default_rng(0)
    examples = rng.integers(0, 256, (4, 8, 8, 3)).astype(dtype)
    return request.param, MODALITIES[request.param](**settings), examples


def test_tokens_have_the_promised_shape(modality):
    _, it, examples = modality
    tokens = jax.jit(it.tokenize)(examples)
    assert (
        tokens.shape == (4, math.prod(it.grid), it.token_dim) == (4, 16, 12)
        and tokens.dtype == jnp.float32
    )
    assert it.example_shape == examples.shape[1:]


def test_round_trip_gives_the_examples_back(modality):
    _, it, examples = modality
    (exported,) = it.export(np.asarray(it.tokenize(examples))).values()
    np.testing.assert_allclose(exported, examples, rtol=1e-6)
    assert exported.dtype == examples.dtype


def test_other_examples_are_refused(modality):
    _, it, examples = modality
    it.check_example(examples[0])
    other = np.float32 if examples.dtype == np.uint8 else np.uint8
    for wrong in (
        examples[0, :4],
        examples[0].astype(other),
        examples[0].astype(np.uint16),
        examples[0].astype(np.float64),
    ):
        with pytest.raises(ValueError, match="expects"):
            it.check_example(wrong)


def test_pixels_are_clipped_and_rounded():
    pixels = MODALITIES["image_pixels"](size=2, channels=1, patch=1)
    tokens = np.array([[[-3.0], [-1.0], [0.0], [7.0]]])
    assert pixels.export(tokens)["images"].ravel().tolist() == [0, 0, 128, 255]


def test_patch_must_divide_the_image():
    with pytest.raises(ValueError, match="divisible"):
        MODALITIES["image_pixels"](size=8, channels=1, patch=3)
