"""Forward passes, losses and gradients against the authors' numbers (float32, CPU)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PARITY, assert_close, load_parity
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from djepa_jax.checkpoints.convert.official import to_official
from djepa_jax.core.losses import jepa_loss
from djepa_jax.core.losses.diffusion import Diffusion
from djepa_jax.core.losses.flow_matching import FlowMatching
from djepa_jax.core.masking import to_order, to_raster
from djepa_jax.core.modalities.image import patchify, unpatchify
from djepa_jax.core.train_step import predict_features

FORWARD = 1e-5


def replay(parity):
    """The recorded inputs in our conventions: visible tokens first, in raster order."""
    data = parity.forward
    order = jnp.argsort(jnp.asarray(data["mask"]), axis=-1, stable=True)  # [B, N]
    num_visible = (data["mask"] == 0).sum(-1)
    tokens = jnp.asarray(data["patchify"])
    return tokens, order, jnp.asarray(num_visible), jnp.asarray(data["labels"])


@pytest.fixture
def outputs(parity):
    """Everything the forward pass gives, jitted, per variant."""
    return parity, _outputs(parity.variant)


def _outputs(variant, cache={}):  # noqa: B006 (one compile per variant)
    if variant not in cache:
        parity = load_parity(variant)
        tokens, order, num_visible, labels = replay(parity)
        padded = (
            parity.config.num_tokens
        )  # far more places than are visible: padding must not matter

        @jax.jit
        def forward(params):
            model = nnx.merge(parity.graph, params)
            x0 = to_order(tokens, order)
            condition = model.embed_condition(labels)
            encoded = model.context_encoder(x0, order, condition, num_visible=num_visible)
            cond = predict_features(model, x0, order, condition, num_visible, padded)
            target = model.encode_all(x0, order, condition)
            return dict(
                classes=model.context_encoder.class_embedding(labels),
                encoded=encoded,
                cond=to_raster(cond, order),
                target=to_raster(target, order),
                head=to_raster(model.jepa_head(cond), order),
            )

        cache[variant] = forward(parity.params)
    return cache[variant]


def test_patchify_and_its_inverse(parity):
    images = rearrange(parity.forward["imgs"], "b c h w -> b h w c")
    patch = parity.official["patch_size"]
    tokens = patchify(jnp.asarray(images), patch)
    np.testing.assert_array_equal(tokens, parity.forward["patchify"])
    np.testing.assert_array_equal(unpatchify(tokens, patch, *images.shape[1:3]), images)


def test_class_embedding(outputs):
    parity, ours = outputs
    np.testing.assert_array_equal(ours["classes"], parity.forward["class_embedding"])


def test_context_encoder(outputs):
    parity, ours = outputs
    expected = parity.forward["encoder_out"]
    assert_close(ours["encoded"][:, : expected.shape[1]], expected, FORWARD)


def test_predictor(outputs):
    parity, ours = outputs
    assert_close(ours["cond"], parity.forward["decoder_z"], FORWARD)


def test_target_features(outputs):
    parity, ours = outputs
    assert_close(ours["target"], parity.forward["ema_target"], FORWARD)


def test_jepa_head_and_loss(outputs):
    parity, ours = outputs
    data = parity.forward
    assert_close(ours["head"], data["jepa_head"], FORWARD)
    mask = data["mask"]

    def masked_mean(rows):
        return (rows * mask).sum() / mask.sum()

    assert_close(masked_mean(jepa_loss(ours["head"], ours["target"])), data["jepa_loss"], FORWARD)
    assert_close(
        masked_mean(jepa_loss(ours["head"], 5 * ours["target"])),
        data["jepa_loss_target_x5"],
        FORWARD,
    )
    assert_close(
        jepa_loss(ours["head"], ours["target"]).mean(), data["jepa_loss_unmasked"], FORWARD
    )


def recorded_token_loss(parity, model, x0, cond):
    """The token loss per token at the recorded times and noise: `[B, N]` in raster order."""
    data, batch = parity.forward, x0.shape[0]

    def per_token(x):
        return rearrange(
            jnp.asarray(x),
            "(k b n) ... -> b n k ...",
            b=batch,
            k=parity.official["diffusion_batch_mul"],
        )

    t = per_token(data["diffusion_t"])
    if parity.variant == "flow":
        return FlowMatching().loss(model.denoiser, x0, cond, t, per_token(data["diffusion_x0"]))
    mse, bound = Diffusion().terms(model.denoiser, x0, cond, t, per_token(data["diffusion_noise"]))
    return (mse + bound).mean(-1)


def total_loss(parity, params, num_places):
    """Token loss + JEPA loss of the recorded batch, target detached, weights 1."""
    tokens, order, num_visible, labels = replay(parity)
    mask = parity.forward["mask"]
    model = nnx.merge(parity.graph, params)
    x0 = to_order(tokens, order)
    condition = model.embed_condition(labels)
    cond = to_raster(predict_features(model, x0, order, condition, num_visible, num_places), order)
    target = jax.lax.stop_gradient(to_raster(model.encode_all(x0, order, condition), order))
    token = (recorded_token_loss(parity, model, tokens, cond) * mask).sum() / mask.sum()
    return token + (jepa_loss(model.jepa_head(cond), target) * mask).sum() / mask.sum(), token


def test_losses_and_gradients(parity):
    data = parity.forward
    num_places = int(replay(parity)[2].max()) + 2
    grad_fn = jax.jit(jax.value_and_grad(lambda p: total_loss(parity, p, num_places), has_aux=True))
    (_, token), grads = grad_fn(parity.params)
    assert_close(token, data["diffusion_loss"], FORWARD)
    assert_close(jax.jit(optax.tree.norm)(grads), data["grad_global_norm"], FORWARD)
    official = to_official(grads)
    norms = [np.linalg.norm(official[name].astype(np.float64)) for name in data["param_names"]]
    assert_close(norms, data["grad_norms"], 5e-5)
    if parity.variant == "gauss":
        for name, expected in load_file(PARITY / "grads_gauss.safetensors").items():
            assert_close(official[name], expected, 5e-5)


def test_names_map_both_ways(parity):
    official = to_official(parity.params)
    assert sorted(official) == sorted(parity.tensors)
    for name, value in official.items():
        np.testing.assert_array_equal(value, parity.tensors[name])
