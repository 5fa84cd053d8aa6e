"""The autoencoder: numbers of the reference, its posterior, the program around it, and decoding in
tiles.
"""

import functools
import json
import pathlib
import types
from itertools import pairwise

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx
from small_autoencoder import (
    SMALL,
    cache_config,
    fill,
    registered,
    shapes_of,
    tensors,
    write_weights,
)

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.checkpoints.convert.autoencoder_kl import from_tensors
from djepa_jax.core import sharding
from djepa_jax.core.modalities.image import to_pixels, to_range
from djepa_jax.core.models.autoencoder_kl import (
    AUTOENCODERS,
    decode_tiled,
    sample_posterior,
    split_autoencoder,
    tile_starts,
)

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "vae"
SHAPES = {
    name: tuple(shape)
    for name, shape in json.loads((FIXTURES / "kl16_names.json").read_text()).items()
}


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


# the network


@pytest.fixture(scope="module")
def kl16():
    """The whole network with the weights of the reference numbers, and those, with channels
    last.
    """
    params = from_tensors(
        {name: fill(name, shape) for name, shape in SHAPES.items()},
        AUTOENCODERS["kl16"],
        "the rule",
    )
    numbers = {
        name: np.moveaxis(array, 1, -1) for name, array in np.load(FIXTURES / "kl16.npz").items()
    }
    return types.SimpleNamespace(params=params, **numbers)


def method(name: str, dtype=jnp.float32, config=AUTOENCODERS["kl16"]):
    """Encode or decode as a jitted function of parameters and input."""
    graph, _ = split_autoencoder(config, dtype)
    return jax.jit(lambda params, x: getattr(nnx.merge(graph, params), name)(x))


def test_names_and_shapes_are_the_references(kl16):
    assert shapes_of(AUTOENCODERS["kl16"]) == SHAPES and len(SHAPES) == 312
    assert sum(leaf.size for leaf in jax.tree.leaves(kl16.params)) == 66_456_019


def test_moments_and_pictures_are_the_references(kl16):
    encode = method("encode")
    assert_close(encode(kl16.params, kl16.image), kl16.moments, 1e-4)
    assert_close(encode(kl16.params, kl16.image_48x80), kl16.moments_48x80, 1e-4)
    decoded = method("decode")(kl16.params, kl16.latents)
    assert_close(decoded, kl16.decoded, 1e-4)
    halved = method("decode", jnp.bfloat16)(kl16.params, kl16.latents)
    assert halved.dtype == jnp.float32
    assert_close(halved, decoded, 0.05)
    assert np.abs(np.asarray(halved) - decoded).mean() > 1e-4 * np.abs(decoded).max(), (
        "it is bfloat16 that was compared"
    )


def equations(jaxpr):
    """All operations of a program, with those inside of others."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_norms_and_softmax_are_float32_in_bfloat16_decoding():
    _, abstract = split_autoencoder(SMALL)
    latents = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
    program = jax.make_jaxpr(method("decode", jnp.bfloat16, SMALL))(abstract, latents)
    types_of = {}
    for equation in equations(program.jaxpr):
        types_of.setdefault(equation.primitive.name, set()).update(
            str(v.aval.dtype) for v in equation.invars
        )
    for exact in (
        "rsqrt",
        "square",
        "exp",
        "reduce_sum",
        "reduce_max",
    ):  # of the norms, and of softmax
        assert types_of[exact] == {"float32"}, exact
    assert types_of["conv_general_dilated"] == types_of["dot_general"] == {"bfloat16"}


def test_posterior_has_its_mean_and_variance():
    mean, log_variance = (
        np.array([0.0, 3.0, -2.0, 1.0, 5.0]),
        np.array([0.0, 1.0, -2.0, 100.0, -100.0]),
    )
    moments = np.concatenate([mean, log_variance])
    variance = np.exp([0.0, 1.0, -2.0, 20.0, -30.0])  # log-variances are held between -30 and 20
    np.testing.assert_array_equal(sample_posterior(moments, np.zeros(5)), mean.astype(np.float32))
    for noise in (1.0, -2.5):
        drawn = sample_posterior(np.concatenate([np.zeros(5), log_variance]), np.full(5, noise))
        np.testing.assert_allclose(drawn, noise * np.sqrt(variance), rtol=1e-5)
    draws = np.asarray(
        sample_posterior(moments, np.random.default_rng(0).standard_normal((100_000, 5))),
        np.float64,
    )
    np.testing.assert_allclose(draws.var(0)[:4], variance[:4], rtol=0.02)
    assert (np.abs(draws.mean(0) - mean) < 4 * np.sqrt(variance / 100_000) + 1e-6).all()


# as the program uses it


def test_images_and_mirror_images_in_padded_batches(tmp_path):
    config = cache_config(
        write_weights(tmp_path / "x.safetensors"), "", "--config.autoencoder.batch_size=3"
    )
    autoencoder = Autoencoder(config.autoencoder, sharding.make_mesh((-1, 1, 1)))
    assert autoencoder.batch_size == 8, "a multiple of the devices"
    params, encode = from_tensors(tensors(), SMALL, ""), method("encode", config=SMALL)
    images = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), np.uint8)
    moments = autoencoder.encode(images)
    assert moments.shape == (11, 2, 8, 8, 8) and moments.dtype == np.float32
    assert_close(moments[:, 0], encode(params, to_range(images)), 1e-5)
    assert_close(moments[:, 1], encode(params, to_range(images[:, :, ::-1])), 1e-5)
    latents = moments[:9, 0, ..., :4]
    pictures, exact = (
        autoencoder.decode(latents),
        to_pixels(method("decode", config=SMALL)(params, latents)),
    )
    assert pictures.shape == (9, 16, 16, 3) and pictures.dtype == np.uint8
    assert np.abs(pictures.astype(int) - exact).mean() < 3, "it is bfloat16"


# tiles


def enlarge(scale: int):
    """Stands for a decoder: repeats every value."""
    return lambda latents: jnp.asarray(latents).repeat(scale, axis=1).repeat(scale, axis=2)


def test_tiles_cover_everything_without_seams():
    for height, width, tile, overlap, scale in (
        (8, 8, 8, 2, 1),
        (5, 3, 8, 2, 3),
        (9, 8, 8, 2, 1),
        (7, 23, 8, 3, 3),
        (16, 13, 4, 0, 3),
    ):
        latents = np.random.default_rng(0).standard_normal((2, height, width, 3))
        latents, decode, shapes = latents.astype(np.float32), enlarge(scale), set()

        def decode_tile(x, decode=decode, shapes=shapes):
            shapes.add(x.shape[1:3])
            return decode(x)

        result = jax.jit(functools.partial(decode_tiled, decode_tile), static_argnums=(1, 2))(
            latents, tile, overlap
        )
        assert shapes == {(min(tile, height), min(tile, width))}, "one size, so one program"
        np.testing.assert_allclose(result, decode(latents), rtol=1e-5)
        for size in (height, width):
            starts = tile_starts(size, tile, overlap)
            assert starts[0] == 0 and starts[-1] == max(0, size - tile)
            assert starts == sorted(set(starts))
            assert all(b - a <= tile - overlap for a, b in pairwise(starts))


def test_tiles_that_disagree_are_blended_gradually():
    values = iter((0.0, 1.0))
    result = decode_tiled(
        lambda x: jnp.full((1, 16, 16, 1), next(values)),
        jnp.zeros((1, 8, 12, 4)),
        tile=8,
        overlap=4,
    )
    row = np.asarray(result)[0, 3, :, 0]
    assert (row[:8] == 0).all() and (row[16:] == 1).all() and (np.diff(row) >= 0).all()
    assert np.diff(row).max() < 1.1 / 9, "eight pixels between them share the step evenly"
    np.testing.assert_allclose(np.asarray(result)[0, :, :, 0], np.tile(row, (16, 1)), rtol=1e-6)
