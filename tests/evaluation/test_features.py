"""Running a feature network over any number of pictures, and what its layers compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from photos import photographs

from djepa_jax.evaluation.features.base import (
    FeatureError,
    Network,
    convolve,
    resize_bicubic,
    without_batch_norm,
)


def corner(params, images):
    """The first row, and sums."""
    pixels = images.astype(jnp.float32)
    return {"pool": pixels[:, 0].reshape(len(images), -1) * params["by"], "sum": pixels.sum((1, 2))}


@pytest.fixture(scope="module")
def network() -> Network:
    return Network("corner", "0", {"by": np.float32(2)}, corner, batch_size=3)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_any_number_of_pictures_and_grey_ones(network, count):
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 1), np.uint8)
    taps = network(images)
    assert taps["pool"].dtype == np.float32
    np.testing.assert_array_equal(taps["pool"], 2.0 * images[:, 0].repeat(3, -1).reshape(count, 6))
    np.testing.assert_array_equal(taps["sum"], images.sum((1, 2), np.float32).repeat(3, -1))


@pytest.mark.parametrize("shape, dtype", [((2, 2, 3), "uint8"), ((1, 2, 2, 3), "float32")])
def test_other_arrays_are_refused(network, shape, dtype):
    with pytest.raises(FeatureError, match=rf"^features \"corner\" are of uint8 .*{dtype}.*\.$"):
        network(np.zeros(shape, dtype))


def test_products_are_exact_wherever_they_run(network):
    """Accelerators shorten float32 unless they are told otherwise."""

    def product(params, images):
        x = images.astype(jnp.float32)
        return {"pool": convolve(params, x)[:, 0, 0] @ jnp.ones((1, 1))}

    params = {"kernel": np.ones((1, 1, 3, 1), np.float32), "bias": np.zeros(1, np.float32)}
    network = Network("product", "0", params, product, batch_size=1)
    program = network._apply.lower(params, np.zeros((1, 2, 2, 3), np.uint8)).as_text()
    assert program.count("precision = [HIGHEST, HIGHEST]") == 1  # of dot_general
    assert program.count("#stablehlo<precision HIGHEST>") == 2  # of the convolution


def test_batch_norms_are_folded_into_convolutions():
    rng = np.random.default_rng(0)
    tensors = {
        f"n.{part}": rng.uniform(0.5, 2, 4).astype(np.float32)
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    tensors["c.weight"] = rng.standard_normal((4, 2, 3, 3)).astype(np.float32)
    x = jax.random.normal(jax.random.key(0), (1, 5, 5, 2))
    plain = {"kernel": tensors["c.weight"].transpose(2, 3, 1, 0), "bias": 0}
    weight, bias, mean, variance = (
        tensors[f"n.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    expected = (convolve(plain, x) - mean) / np.sqrt(variance + 1e-3) * weight + bias
    assert_close(convolve(without_batch_norm(tensors, "c", "n"), x), expected, 1e-6)


def test_resizing_is_pillows():
    """Except that Pillow rounds to bytes, twice."""
    whole = np.stack([np.asarray(image) for image in photographs().values()])
    expected = np.stack([np.asarray(image.resize((96, 96), 3)) for image in photographs().values()])
    assert np.abs(resize_bicubic(whole, 96) - expected).mean() < 0.5
