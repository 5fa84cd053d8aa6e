"""Float32 means float32: accelerators round the factors of products unless a program asks them not
to.
"""

import jax
import jax.extend as jex
import jax.numpy as jnp
import pytest
from flax import nnx
from small_autoencoder import SMALL
from tiny import tiny_config

from djepa_jax.core.models.autoencoder_kl import split_autoencoder
from djepa_jax.core.sampler import SampleInputs, make_sampler
from djepa_jax.core.train_step import init_state, make_train_step

PRODUCTS = ("dot_general", "conv_general_dilated")
EXACT = (jax.lax.Precision.HIGHEST,) * 2


def products(function, *arguments) -> list:
    """Types of the factors and precision of every matrix product or convolution of a program."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in PRODUCTS:
                found.append(
                    ({x.aval.dtype.name for x in equation.invars}, equation.params["precision"])
                )
            for inner in jex.core.jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def assert_exact(found: list, expected: set):
    assert set().union(*(types for types, _ in found)) == expected
    assert all(precision == EXACT for types, precision in found if types == {"float32"})


@pytest.mark.parametrize("variant", ["diffusion", "flow"])
def test_training_and_sampling(variant):
    """In bfloat16 programs, too, what stays float32 (time embeddings) is exact."""
    for dtype in ("float32", "bfloat16"):
        experiment = tiny_config(f"--config.compute_dtype={dtype}", variant=variant)
        state = jax.eval_shape(lambda config=experiment.train: init_state(config))
        size = experiment.batch_size
        batch = {
            "example": jax.ShapeDtypeStruct((size, 8, 8, 1), "uint8"),
            "condition": jax.ShapeDtypeStruct((size,), "int32"),
        }
        numbers = jnp.zeros(2, jnp.int32)
        inputs = SampleInputs(numbers, numbers, 0, experiment.cfg_scales, 1.0)
        sampler = make_sampler(experiment.sampler)
        for found in (
            products(make_train_step(experiment.train), state, batch),
            products(sampler, state.ema_params, inputs),
        ):
            assert_exact(found, {"float32", dtype})


def test_autoencoder():
    for dtype in ("float32", "bfloat16"):
        graph, params = split_autoencoder(SMALL, jnp.dtype(dtype))
        for method, shape in (("encode", (1, 16, 16, 3)), ("decode", (1, 8, 8, 4))):

            def call(params, x, graph=graph, method=method):
                return getattr(nnx.merge(graph, params), method)(x)

            found = products(call, params, jax.ShapeDtypeStruct(shape, "float32"))
            assert_exact(found, {dtype})


def test_sampling_casts_kernels_once():
    """Not in its loops, whose steps are many: there, only activations and vectors change type."""
    experiment = tiny_config("--config.compute_dtype=bfloat16")
    params = jax.eval_shape(lambda: init_state(experiment.train)).params
    numbers = jnp.zeros(2, jnp.int32)
    inputs = SampleInputs(numbers, numbers, 0, experiment.cfg_scales, 1.0)
    blocks = params["denoiser"]["blocks"]
    shapes = [blocks[name]["kernel"].shape for name in ("up", "down", "modulation")]
    kernels = {size for shape in shapes for size in (shape, shape[1:])}

    def casts(jaxpr, in_loop):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "convert_element_type" and in_loop:
                yield equation.invars[0].aval.shape
            for inner in jex.core.jaxprs_in_params(equation.params):
                yield from casts(inner, in_loop or equation.primitive.name == "scan")

    found = set(
        casts(jax.make_jaxpr(make_sampler(experiment.sampler))(params, inputs).jaxpr, False)
    )
    assert found and not found & kernels
