"""Attention: its implementations agree, the kernel is sound for GPUs, and programs hold what they
should.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx
from jaxlib.mlir import ir
from jaxlib.triton import dialect
from tiny import tiny_config

import djepa_jax
from djepa_jax.checkpoints.restore import find_model
from djepa_jax.config.convert import ConfigError
from djepa_jax.core import sharding
from djepa_jax.core.models import attention
from djepa_jax.core.models.attention import attend, obstacle
from djepa_jax.core.models.fused_attention import Tiles, attention_kernel
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.vit import Stack
from djepa_jax.core.train_step import make_train_step, state_shapes
from djepa_jax.training.loop import train

EXPORTED = pathlib.Path(__file__).parents[1] / "fixtures/exported/orbax"
KEYS = 70  # more than a block of the kernel
LENGTHS = jnp.array([3, 66])
SOME = np.isin(np.arange(KEYS), (2, 65, 68)) | (np.arange(2)[:, None] * np.arange(KEYS) % 3 == 1)
# queries, heads, width, dtype, rate, mask
CASES = {
    "prefix": (KEYS, 2, 20, "float32", 0.3, LENGTHS),
    "holes": (5, 2, 16, "bfloat16", 0.0, jnp.asarray(SOME)),
}


def results(implementation, queries, heads, width, dtype, rate, mask) -> list:
    """Output and gradients to queries, keys and values."""
    rng = np.random.default_rng(0)
    num_keys = KEYS if mask.ndim == 1 else mask.shape[1]
    shapes = [(2, n, heads, width) for n in (queries, num_keys, num_keys, queries)]
    *inputs, weights = (jnp.asarray(rng.normal(size=s), jnp.dtype(dtype)) for s in shapes)
    keys = jax.random.split(jax.random.key(1), 2) if rate else None

    @jax.jit
    def run(*inputs):
        how = {"mask": mask, "rate": rate, "keys": keys, "implementation": implementation}
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, **how), *inputs)
        return out, *pull(weights)

    return [x.astype(jnp.float32) for x in run(*inputs)]


@pytest.mark.parametrize("case", CASES)
def test_fused_agrees_with_plain(case):
    """With the same bits of dropout, and exactly nothing at keys that must not be seen."""
    plain, fused = (results(kind, *CASES[case]) for kind in ("plain", "fused"))
    for ours, expected in zip(fused, plain, strict=True):
        assert_close(ours, expected, 1e-5 if CASES[case][3] == "float32" else 0.02)
    mask = CASES[case][-1]
    hidden = ~np.asarray(mask if mask.ndim == 2 else np.arange(KEYS) < mask[:, None])
    for gradient in map(np.asarray, fused[2:]):
        assert (gradient[hidden] == 0).all() and (gradient[~hidden] != 0).any()


def test_cudnn_gets_even_lengths_with_a_mask(monkeypatch):
    """It has no gradients of odd ones; XLA takes its place here."""
    attention_of_jax, lengths = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, *, mask, implementation):
        lengths.extend((q.shape[1], k.shape[1]))
        return attention_of_jax(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    odd = (5, 2, 16, "bfloat16", 0.0, jnp.asarray(SOME[:, : KEYS - 1]))
    plain, cudnn = (results(kind, *odd) for kind in ("plain", "cudnn"))
    assert lengths == [6, KEYS]
    for ours, expected in zip(cudnn, plain, strict=True):
        assert_close(ours, expected, 0.02)


def test_both_masks_say_the_same():
    as_mask = jnp.arange(KEYS) < LENGTHS[:, None]
    one, other = (results("plain", *CASES["prefix"][:-1], mask) for mask in (LENGTHS, as_mask))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_fused_on_a_mesh():
    """Examples and heads on different devices draw what they draw on one."""
    mesh = sharding.make_mesh((2, 2, 2))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 6, 2, 8))
    keys = jax.random.split(jax.random.key(1), 4)
    run = jax.jit(functools.partial(attend, rate=0.3, implementation="fused"))
    place = jax.sharding.NamedSharding(mesh, jax.P(sharding.BATCH_AXES, None, "tensor"))
    placed = jax.device_put((q, k, v), place)
    split = run(*placed, keys=jax.device_put(keys, sharding.batch_sharding(mesh)))
    assert split.sharding.shard_shape(split.shape) == (1, 6, 1, 8)
    assert_close(split, run(q, k, v, keys=keys), 1e-6)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="needs a GPU from JAX 0.11 on")
@pytest.mark.parametrize("width", [64, 80])
def test_kernels_lower_to_sound_triton(width):
    """As far as a machine without a GPU can tell: B's and H's heads in the recipe's lengths."""
    tiles = Tiles(320, 320, width, 0.1, interpret=False)
    x = jax.ShapeDtypeStruct((2, 320, 3, width), jnp.bfloat16)
    rest = [((2, 320), "int32"), ((2, 2), "uint32"), ((3,), "int32")]
    inputs = (x, x, x, *(jax.ShapeDtypeStruct(*what) for what in rest))

    def loss(*inputs):
        return attention_kernel(tiles, *inputs).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*inputs)
    program = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    kernels = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            kernels.append(operation.attributes["mhlo.backend_config"]["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    program.operation.walk(visit)
    assert len(kernels) == 3
    with ir.Context() as context:
        dialect.register_dialect(context)
        assert all(ir.Module.parse(kernel).operation.verify() for kernel in kernels)


def equations(function, *arguments) -> list:
    """Every equation of a program with how often it runs."""
    found = []

    def visit(jaxpr, times):
        for equation in jaxpr.eqns:
            found.append((equation, times))
            inner_times = times * equation.params.get("length", 1)
            for inner in jex.core.jaxprs_in_params(equation.params):
                visit(inner, inner_times)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr, 1)
    return found


def named(found: list, *names: str) -> list:
    return [(equation, times) for equation, times in found if equation.primitive.name in names]


@functools.cache
def step_equations(rate: float) -> list:
    """Of a training step in bfloat16."""
    changes = (f"--config.model.{name}={rate}" for name in ("dropout", "attention_dropout"))
    config = tiny_config("--config.compute_dtype=bfloat16", *changes).train
    state = state_shapes(config)
    batch = {
        "example": jax.ShapeDtypeStruct((16, 8, 8, 1), "uint8"),
        "condition": jax.ShapeDtypeStruct((16,), "int32"),
    }
    return equations(make_train_step(config), state, batch)


@functools.cache
def stack_equations(implementation: str, remat: str) -> list:
    """Of a loss on two layers in bfloat16, and its gradient."""
    model = tiny_config(f"--config.model.remat={remat}", "--config.compute_dtype=bfloat16")
    changes = {"attention": implementation, "attention_dropout": 0.1}
    model = dataclasses.replace(model.train.model, **changes)
    stack = nnx.eval_shape(lambda: Stack(model, 2, rngs=Keys(0)))
    graph, params = nnx.split(stack)
    keys = jax.random.split(jax.random.key(0), 3)

    def loss(params, x):
        return nnx.merge(graph, params)(x, key_mask=jnp.array([3, 5, 2]), keys=keys).sum()

    return equations(jax.grad(loss), params, jnp.zeros((3, 5, model.width)))


@pytest.mark.parametrize("where", ["step", "none", "dots", "full"])
def test_attention_multiplies_bfloat16_alone(where):
    """In the backward pass, too: the gradient of the scores is float32 until then."""
    found = step_equations(0.1) if where == "step" else stack_equations("plain", where)
    products = [equation for equation, _ in named(found, "dot_general")]
    batched = [e for e in products if len(e.params["dimension_numbers"][1][0]) == 2]  # B and H
    networks = {"step": (3, 2)}.get(where, (1, 1))  # forward, of these backward
    assert len(batched) >= 2 * networks[0] + 4 * networks[1]
    assert {x.aval.dtype.name for e in batched for x in e.invars} == {"bfloat16"}


def drawn(found: list) -> int:
    """Elements of masks: hashing one multiplies once by this number, as does that of keys."""
    products = [(e, times) for e, times in named(found, "mul") if is_hash(e)]
    arrays = [(e.outvars[0].aval, times) for e, times in products]
    return sum(x.size * times for x, times in arrays if x.shape[-1] != 2)


def is_hash(product) -> bool:
    return any(getattr(x, "val", None) == 0xED5AD4BB for x in product.invars)


def test_a_step_draws_each_mask_where_it_is_used():
    """Forward and backward, and nothing of it by JAX's generators."""
    width, heads, layers = 16, 2, 1
    experiment = tiny_config()
    prefix, masking = experiment.model.num_prefix_tokens, experiment.train.masking
    packs = masking.batch_size // masking.pack_size
    parts = [(count * packs, most) for count, most in masking.lengths]  # of the context encoder
    parts = [(n, prefix + places) for n, places in [*parts, (16, masking.num_tokens)]]
    total = layers * sum(n * (heads * s**2 + (4 + 2) * width * s) for n, s in parts)
    assert drawn(step_equations(0.0)) == 0
    assert drawn(step_equations(0.1)) == 2 * total

    def bits(rate):
        found = named(step_equations(rate), "random_bits", "threefry2x32")
        return sum(e.outvars[0].aval.size * times for e, times in found)

    assert bits(0.1) == bits(0.0)


def test_heads_stay_where_they_are():
    """Nothing is transposed for the kernel; XLA's products, which put heads first, do so inside."""
    shapes = [
        e.invars[0].aval.shape for e, _ in named(stack_equations("fused", "none"), "transpose")
    ]
    assert all(len(shape) < 4 for shape in shapes)


def test_memory_policies_keep_what_the_kernel_computed():
    for remat, runs in (("none", 1), ("dots", 1), ("full", 2)):
        found = stack_equations("fused", remat)
        used = {id(x) for equation, _ in found for x in equation.invars}
        kernels = [e for e, _ in named(found, "pallas_call") if used & set(map(id, e.outvars))]
        names = [e.params["jaxpr"].debug_info.func_name for e in kernels]
        assert names.count("forward_kernel") == runs, remat


@pytest.mark.parametrize(
    "flags, why",
    [
        (("compute_dtype=float32",), "bfloat16"),
        (("compute_dtype=bfloat16", "model.attention_dropout=0.1"), "attention_dropout"),
        (("compute_dtype=bfloat16", "model.num_heads=4"), "channels"),
    ],
)
def test_what_cudnn_cannot_do_is_said_at_once(flags, why):
    flags = [f"--config.{flag}" for flag in ("model.attention=cudnn", *flags)]
    with pytest.raises(ConfigError, match=f"config.model.attention.*{why}"):
        tiny_config(*flags)


def test_what_needs_a_gpu_is_said_before_work(tmp_path, monkeypatch):
    """And never of a model that was trained on one: `auto` takes its place."""
    experiment = tiny_config("--config.model.attention=fused")
    with pytest.raises(ConfigError, match="attention.*needs a GPU"):
        train(experiment, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
    stored = find_model(EXPORTED)
    stored = dataclasses.replace(stored, config=stored.config.updated({"model.attention": "fused"}))
    monkeypatch.setattr("djepa_jax.sampling.model.find_model", lambda path: stored)
    assert djepa_jax.load(EXPORTED).config.model.attention == "auto"


def test_auto_is_the_best_that_can_be_had(monkeypatch):
    monkeypatch.setitem(attention.BEST, ("cpu", False), "cudnn")
    auto, plain = (results(kind, *CASES["holes"]) for kind in ("auto", "plain"))
    jax.tree.map(np.testing.assert_array_equal, auto, plain)
    assert obstacle("cudnn", "gpu", jnp.bfloat16, 80, 0.0) == ""
    with pytest.raises(ValueError, match="no dropout"):
        results("cudnn", KEYS, 2, 16, "bfloat16", 0.3, LENGTHS)
