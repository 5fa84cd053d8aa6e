"""The networks: sizes, padding, partial outputs, dropout, precision, memory policies,
initialisation, symmetry.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx, traverse_util

from djepa_jax.core.models.conditioning import Classes
from djepa_jax.core.models.djepa import SIZES, ModelConfig, init_params, split_model
from djepa_jax.core.models.dropout import dropout
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.models.vit import REMAT_POLICIES, gelu
from djepa_jax.core.train_step import predict_features

TINY = ModelConfig(
    grid=(3, 3),
    token_dim=3,
    conditioner=Classes(5),
    width=32,
    encoder_depth=2,
    predictor_depth=2,
    num_heads=4,
    denoiser_depth=2,
    denoiser_width=24,
    denoiser_out=6,
    num_prefix_tokens=3,
    dropout=0.3,
    attention_dropout=0.3,
)
BATCH, PLACES = 4, 6  # examples, and visible places, some of them padding
NUM_VISIBLE = jnp.array([0, 2, 5, 6])
REAL = np.arange(PLACES) < np.asarray(NUM_VISIBLE)[:, None]  # [B, V]
PUBLISHED = {  # total, blocks of the encoder and of the predictor, denoiser
    "B": (212_410_656, 85_056_000, 35_749_920),
    "L": (687_946_272, 302_312_448, 72_230_432),
    "H": (1_427_386_144, 629_683_200, 151_206_944),
}


@functools.cache
def tiny_params() -> dict:
    """Parameters of the tiny model in which nothing is zero."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.15 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, split_model(TINY)[1])


@functools.cache
def tiny(**changes):
    """Graph definition of the tiny model with changed settings, and the parameters."""
    return split_model(dataclasses.replace(TINY, **changes))[0], tiny_params()


@pytest.fixture(scope="module")
def inputs():
    """Tokens `[B, N, C]` in order coordinates, orders, labels (one of them "none")."""
    keys = jax.random.split(jax.random.key(2), BATCH + 1)
    order = jnp.stack([jax.random.permutation(key, TINY.num_tokens) for key in keys[:-1]])
    tokens = jax.random.normal(keys[-1], (BATCH, TINY.num_tokens, TINY.token_dim))
    return tokens, order, jnp.array([0, 4, TINY.conditioner.num_classes, 2])


def features(graph, params, inputs, num_visible=NUM_VISIBLE, keys=(None, None)):
    tokens, order, labels = inputs
    model = nnx.merge(graph, params)
    condition = model.embed_condition(labels)
    return predict_features(model, tokens, order, condition, num_visible, PLACES, keys)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_published_sizes(size):
    """256 tokens of 16 channels, 1000 classes, 64 prefix tokens; nothing is allocated."""
    config = ModelConfig(
        grid=(16, 16), token_dim=16, conditioner=Classes(1000), denoiser_out=32, **SIZES[size]
    )
    _, abstract = split_model(config)

    def count(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    total, blocks, denoiser = PUBLISHED[size]
    assert count(abstract) == total
    assert (
        count(abstract["context_encoder"]["stack"]["blocks"])
        == count(abstract["predictor"]["stack"]["blocks"])
        == blocks
    )
    assert count(abstract["denoiser"]) == denoiser


def test_padding_never_reaches_a_real_place(inputs):
    """Real outputs have exactly zero gradient to padded tokens, and do not change with their
    content.
    """
    graph, params = tiny()
    tokens, order, labels = inputs

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def run(params, tokens):
        model = nnx.merge(graph, params)
        encoded = model.context_encoder(
            tokens[:, :PLACES],
            order[:, :PLACES],
            model.embed_condition(labels),
            num_visible=NUM_VISIBLE,
        )
        prefix, seen = encoded[:, : TINY.num_prefix_tokens], encoded[:, TINY.num_prefix_tokens :]
        outputs = (
            prefix,
            jnp.where(REAL[..., None], seen, 0),
            model.predictor(encoded, order, NUM_VISIBLE),
        )
        return sum(
            (jnp.cos(jnp.arange(out.size).reshape(out.shape)) * out).sum() for out in outputs
        ), outputs

    (_, before), gradient = run(params, tokens)
    gradient = np.asarray(gradient)[:, :PLACES]
    np.testing.assert_array_equal(gradient[~REAL], 0)
    assert (np.abs(gradient[REAL]).max(-1) > 0).all()
    padded = np.pad(~REAL, ((0, 0), (0, TINY.num_tokens - PLACES)))[..., None]
    (_, after), _ = run(params, jnp.where(padded, 1e3 - tokens, tokens))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_partial_output_is_a_slice_of_the_full_one(inputs):
    """`query_ids` in any order, with repetitions; the last layer alone knows about them."""
    graph, params = tiny()
    tokens, order, labels = inputs
    places = jnp.array([8, 0, 3, 3])

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        encoded = model.context_encoder(
            tokens[:, :PLACES],
            order[:, :PLACES],
            model.embed_condition(labels),
            num_visible=NUM_VISIBLE,
        )
        stack, keys = (
            model.context_encoder.stack,
            jnp.pad(jnp.asarray(REAL), ((0, 0), (3, 0)), constant_values=True),
        )
        full = model.predictor(encoded, order, NUM_VISIBLE), stack(encoded, key_mask=keys)
        some = (
            model.predictor(encoded, order, NUM_VISIBLE, query_ids=places),
            stack(encoded, key_mask=keys, queries=places),
        )
        return full, some

    for full, some in zip(*run(params), strict=True):
        assert_close(some, full[:, places], 1e-6)


def test_dropout_function():
    x = jnp.full((200, 200), 3.0)
    keys = jax.random.split(jax.random.key(0), len(x))
    kept = np.asarray(dropout(x, 0.3, keys))
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, keys) is x
    np.testing.assert_array_equal(dropout(x[50:60], 0.3, keys[50:60]), kept[50:60])
    np.testing.assert_allclose(np.unique(kept), [0, 3 / 0.7], rtol=1e-6)
    deviation = math.sqrt(0.3 * 0.7 / x.size)
    assert abs((kept == 0).mean() - 0.3) < 4 * deviation
    assert abs(kept.mean() / 3 - 1) < 4 * deviation / 0.7


@pytest.mark.parametrize("kind, vit", [("dropout", 0), ("attention_dropout", 1)])
def test_dropout_in_the_model(inputs, kind, vit):
    """On exactly when a ViT is given keys, and a function of the keys; the other rate is 0."""
    graph, params = tiny(**({"dropout": 0.0, "attention_dropout": 0.0} | {kind: 0.3}))

    @jax.jit
    def run(params, key):
        keys = [None, None]
        keys[vit] = None if key is None else jax.random.split(key, len(inputs[0]))
        return features(graph, params, inputs, keys=keys)

    a, b = jax.random.split(jax.random.key(3))
    plain, first, second = run(params, None), run(params, a), run(params, b)
    np.testing.assert_array_equal(run(params, None), plain)
    np.testing.assert_array_equal(run(params, a), first)
    for one, other in ((plain, first), (plain, second), (first, second)):
        assert (jnp.abs(one - other).max(-1) > 1e-4).mean() > 0.9


def test_bfloat16_compute_keeps_float32_parameters(inputs):
    graph, params = tiny(compute_dtype="bfloat16")
    abstract = split_model(dataclasses.replace(TINY, compute_dtype="bfloat16"))[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract)} == {jnp.dtype("float32")}

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, params):
        model, cond = nnx.merge(graph, params), features(graph, params, inputs)
        noise = model.denoiser(
            inputs[0], model.denoiser.time(jnp.array(500)), model.denoiser.condition(cond)
        )
        return cond, model.jepa_head(cond), noise

    ours, exact = run(graph, params), run(tiny()[0], params)
    assert [x.dtype for x in ours] == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]  # the denoiser answers in float32
    for low, high in zip(ours, exact, strict=True):
        assert_close(low.astype(jnp.float32), high, 0.05)
    grads = jax.eval_shape(jax.grad(lambda p: run(graph, p)[2].sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@functools.cache
def loss_and_gradients(remat, unroll):
    """A loss on a ViT with dropout and the denoiser behind it, which is all that these settings
    touch.
    """
    graph, params = tiny(remat=remat, scan_unroll=unroll, dropout=0.0)
    x = jnp.sin(jnp.arange(2 * 7 * TINY.width)).reshape(2, 7, TINY.width)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        model = nnx.merge(graph, params)
        cond = model.predictor.stack(x, keys=jax.random.split(jax.random.key(4), len(x)))
        xt, time, condition = (
            x[..., :3],
            model.denoiser.time(jnp.array(10)),
            model.denoiser.condition(cond),
        )
        return jnp.square(model.denoiser(xt, time, condition)).mean()

    return loss(params)


@pytest.mark.parametrize(
    "remat, unroll", [*((policy, 1) for policy in REMAT_POLICIES if policy != "none"), ("none", 2)]
)
def test_memory_policies_and_unrolling_change_nothing(remat, unroll):
    """With dropout on: recomputed layers draw the same masks."""
    (loss, grads), (plain, plain_grads) = (
        loss_and_gradients(remat, unroll),
        loss_and_gradients("none", 1),
    )
    assert_close(loss, plain, 1e-6)
    jax.tree.map(lambda ours, expected: assert_close(ours, expected, 2e-5), grads, plain_grads)


@pytest.fixture(scope="module")
def fresh() -> dict[str, np.ndarray]:
    """Newly initialised parameters by path, of a model wide enough for statistics."""
    config = dataclasses.replace(
        TINY, width=96, denoiser_width=64, conditioner=Classes(50), grid=(8, 8)
    )
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return {
        path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }


def test_initialisation(fresh):
    """Every parameter belongs to exactly one of these kinds."""
    seen = set()
    for path, value in fresh.items():
        module, _, name = path.rpartition("/")
        if "jepa_head" in path and "norm" not in path:
            bound = (
                fresh[f"{module}/kernel"].shape[0] ** -0.5
            )  # kernel and bias: uniform in +-1/sqrt(fan-in)
        elif name == "scale":
            np.testing.assert_array_equal(value, 1)
            continue
        elif (
            name in ("bias", "prefix_table")
            or "modulation" in path
            or path == "denoiser/out/kernel"
        ):
            np.testing.assert_array_equal(value, 0, err_msg=path)
            continue
        elif name in ("positions", "table", "null", "mask_token") or "time_embedding" in path:
            assert abs(value.std() / 0.02 - 1) < 4 / math.sqrt(2 * value.size), path
            assert abs(value.mean()) < 4 * 0.02 / math.sqrt(value.size), path
            continue
        else:
            fan_in, *out = value.shape[1:] if "blocks" in path else value.shape
            bound = math.sqrt(6 / (fan_in + math.prod(out)))
        seen.add(path)
        assert 0.95 * bound < np.abs(value).max() <= bound, path
        assert abs(value.std() / (bound / math.sqrt(3)) - 1) < 3 / math.sqrt(value.size) + 0.01, (
            path
        )
    assert {
        "context_encoder/stack/blocks/attention/qkv/kernel",
        "predictor/input_proj/kernel",
        "jepa_head/down/bias",
    } <= seen
    for path in seen:  # layers, and the two ViTs, are drawn separately
        assert "blocks" not in path or not np.array_equal(fresh[path][0], fresh[path][1])
    first, second = (
        fresh[f"{part}/stack/blocks/mlp/up/kernel"] for part in ("context_encoder", "predictor")
    )
    assert not np.array_equal(first, second)


def test_keys_are_those_of_flax():
    """So that a seed means the same model as before."""
    keys, rngs = Keys(jax.random.key(3)), nnx.Rngs(params=jax.random.key(3))
    for _ in range(3):
        assert keys.params() == rngs.params()


def test_permuting_visible_and_masked_tokens_permutes_the_output(inputs):
    """Order coordinates: position comes from the tables alone."""
    graph, params = tiny()
    tokens, order, labels = (x[2:3] for x in inputs)  # 5 visible tokens, one padded place
    shuffle = jnp.array([3, 1, 4, 0, 2, 7, 8, 5, 6])

    @jax.jit
    def run(tokens, order):
        cond = features(graph, params, (tokens, order, labels), NUM_VISIBLE[2:3])
        model = nnx.merge(graph, params)
        return cond, model.encode_all(tokens, order, model.embed_condition(labels))

    for plain, moved in zip(
        run(tokens, order), run(tokens[:, shuffle], order[:, shuffle]), strict=True
    ):
        assert_close(moved, plain[:, shuffle], 1e-5)


def test_gelu_is_exact_in_either_type():
    """Values and slopes of x Phi(x), also far below zero, where bfloat16 has few digits for it."""
    x = jnp.linspace(-6, 6, 4001)
    expected, slopes = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    np.testing.assert_allclose(gelu(x), expected, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), slopes, atol=1e-6)
    coarse = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        gelu(coarse), gelu(coarse.astype(jnp.float32)).astype(jnp.bfloat16)
    )
    slope = jax.vmap(jax.grad(gelu))(coarse)
    exact = jax.vmap(jax.grad(gelu))(coarse.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(slope, exact)
