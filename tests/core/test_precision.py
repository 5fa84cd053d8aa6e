"""Float32 means float32: accelerators round the factors of products unless a program asks them not
to.
"""

import collections

import jax
import jax.extend as jex
import jax.numpy as jnp
import pytest
from flax import nnx
from small_autoencoder import SMALL
from tiny import tiny_config

from djepa_jax.core.models.autoencoder_kl import split_autoencoder
from djepa_jax.core.sampler import SampleInputs, make_sampler
from djepa_jax.core.train_step import make_train_step, state_shapes

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
        state = state_shapes(experiment.train)
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


def test_sampling_prepares_the_denoiser_once():
    """Its loops, whose steps are many, find weights as products take them: no casts, no slices."""
    one = {(24, 24), (24, 3, 24), (24, 2, 24), (24, 8, 24), (24, 192)}
    kernels = one | {(2, *shape) for shape in one}  # and stacks of two layers
    changes = "compute_dtype=bfloat16", "model.denoiser_depth=2", "model.denoiser_width=24"
    experiment = tiny_config(*(f"--config.{change}" for change in changes))
    params = state_shapes(experiment.train).params
    numbers = jnp.zeros(2, jnp.int32)
    inputs = SampleInputs(numbers, numbers, 0, experiment.cfg_scales, 1.0)

    def uses(jaxpr, loops):
        """Of arrays shaped like kernels, in any loop: the operation, the type."""
        for equation in jaxpr.eqns:
            inner = list(jex.core.jaxprs_in_params(equation.params))
            for sub in inner:
                yield from uses(sub, loops + (equation.primitive.name == "scan"))
            for x in [] if inner or loops < 1 else equation.invars:
                if x.aval.shape in kernels:
                    yield equation.primitive.name, x.aval.dtype.name

    sampler = make_sampler(experiment.sampler)
    found = collections.Counter(uses(jax.make_jaxpr(sampler)(params, inputs).jaxpr, 0))
    # Up and down of two blocks, and the modulations of all; of times, once per token set, one
    expected = {("dot_general", "bfloat16"): 2 * 2 + 1, ("reshape", "bfloat16"): 1}
    assert found == expected | {("dot_general", "float32"): 1}
