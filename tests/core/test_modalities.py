"""Every modality of pictures: shapes, round trip, refusal of other examples."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations

from djepa_jax.core.modalities import MODALITIES
from djepa_jax.core.modalities.lapped import ImageLapped, lapped_transform
from djepa_jax.core.modalities.programs import exported, exported_unheard, shown, tokenized

EXAMPLES = {
    "image_pixels": (dict(size=8, channels=3, patch=2), np.uint8),
    "image_lapped": (
        dict(size=8, channels=3, patch=2, cutoff=1.5, colour_cutoff=1.5),
        np.uint8,
    ),
    "image_latents": (dict(size=8, channels=3, patch=2, scale=0.25), np.float32),
}


@pytest.fixture(params=EXAMPLES)  # of pictures
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


def test_a_batch_is_one_program_which_equal_modalities_share(modality):
    name, it, examples = modality
    tokens = np.asarray(it.tokenize(examples))
    programs = ((tokenized, examples), (exported, tokens), (exported_unheard, tokens))
    with count_compilations() as compiled:
        results = [program(it, batch) for program, batch in (*programs, (shown, examples))]
    assert len(compiled) == 4
    equal = MODALITIES[name](**EXAMPLES[name][0])
    with count_compilations() as compiled:
        assert [*tokenized(equal, examples).shape] == [4, 16, 12]
    assert not compiled
    for result in results[1:]:
        (array,) = result.values()
        np.testing.assert_allclose(array, examples, rtol=1e-6)


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


@pytest.mark.parametrize(("size", "patch"), [(64, 8), (32, 16), (12, 2), (8, 8), (28, 7), (9, 3)])
def test_lapped_transform_is_orthogonal(size, patch):
    transform = lapped_transform(size, patch)
    np.testing.assert_allclose(transform @ transform.T, np.eye(size), atol=1e-12)


def test_lapped_waveforms_pass_smoothly_into_the_neighbouring_windows():
    """The gain of the lapped orthogonal transform over eight samples is 9.2 dB for a correlation
    of 0.95 (Malvar 1992); that of the cosine transform, which has seams, is 8.8 dB."""
    transform = lapped_transform(64, 8)
    correlation = 0.95 ** np.abs(np.subtract.outer(np.arange(64), np.arange(64)))
    variances = np.diag(transform @ correlation @ transform.T)[24:32]
    gain = 10 * np.log10(variances.mean() / np.exp(np.log(variances).mean()))
    assert gain == pytest.approx(9.2, abs=0.05)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_picture_is_one_number_per_token(channels):
    lapped = ImageLapped(size=32, channels=channels, patch=8)
    grey = np.full((1, 32, 32, channels), 200, np.uint8)
    tokens = np.asarray(lapped.tokenize(grey))
    np.testing.assert_allclose(tokens[..., 1:], 0, atol=1e-4)
    np.testing.assert_allclose(tokens[..., 0], tokens[0, 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(lapped.export(tokens)["images"], grey)


def test_a_lapped_token_reaches_half_a_window_into_its_neighbours():
    lapped = ImageLapped(size=40, channels=3, patch=8)
    tokens = np.zeros((1, 25, lapped.token_dim), np.float32)
    tokens[:, 12] = 1.0  # in the middle
    changed = np.abs(np.asarray(lapped.detokenize(tokens))).max((0, 3)) > 1e-5
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 27, 12, 27)


def test_lapped_tokens_keep_the_low_frequencies_of_photographs_and_count_them_most():
    lapped = ImageLapped(size=64, channels=3, patch=8)
    assert lapped.token_dim == 13 + 2 * 3
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64))
    frequency[0, 0] = 1 / 64
    spectrum = np.fft.fft2(rng.standard_normal((20, 64, 64))) / frequency**1.2
    smooth = np.fft.ifft2(spectrum).real  # falls off like photographs
    pictures = np.clip(128 + 55 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    tokens = np.asarray(lapped.tokenize(np.stack([pictures] * 3, -1)))
    deviations = tokens.std((0, 1))
    assert 0.5 < deviations[0] < 1.5 and deviations[0] == deviations.max()
    assert np.all(deviations[1:13] > 0.2), "details are not lost among the noise"
    lost = np.asarray(lapped.export(tokens)["images"])[..., 0] - pictures.astype(float)
    assert 0 < lost.var() < 0.1 * pictures.var()


def test_lapped_tokens_that_cannot_be_are_refused():
    for wrong in (dict(patch=1), dict(channels=2), dict(cutoff=0.0), dict(patch=3)):
        with pytest.raises(ValueError, match="patch_size|channels|cutoff"):
            ImageLapped(**dict(size=8, channels=3, patch=2) | wrong)
