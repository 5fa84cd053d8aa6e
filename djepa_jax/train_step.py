"""Training state, the loss of one batch, and one pure update.

One step, on a batch of images and labels:

1. tokens are permuted by a random order; the first `num_visible` of each example are visible;
2. the context encoder reads the visible tokens, the predictor fills in features (cond) for all;
3. the target encoder, which is the moving average's context encoder, reads all tokens;
4. loss = token_weight * token loss(masked tokens | cond) + jepa_weight * smooth L1(head(cond), target);
5. clipped gradients, AdamW, moving average; a step whose gradient is not finite changes none of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from djepa_jax import masking
from djepa_jax.losses import feature_statistics, jepa_loss
from djepa_jax.losses.base import TokenLoss
from djepa_jax.models.djepa import ModelConfig, init_params, split_model
from djepa_jax.optimizer import OptimizerConfig, ema_decay, learning_rate, make_optimizer, update_ema

STATISTICS_ROWS = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training carries and a checkpoint keeps."""

    step: jax.Array  # batches consumed
    params: Any
    ema_params: Any
    opt_state: Any
    skipped_steps: jax.Array  # updates left out because a gradient was not finite
    bad_streak: jax.Array  # how many of the latest steps in a row


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """What the step is made of; all static."""

    model: ModelConfig
    token_loss: TokenLoss
    plan: masking.MaskPlan
    optimizer: OptimizerConfig
    tokenize: Callable[[jax.Array], jax.Array]
    seed: int
    token_weight: float = 1.0
    jepa_weight: float = 1.0
    label_drop_prob: float = 0.1


def init_state(spec: TrainSpec) -> TrainState:
    """A fresh state; call it inside `jax.jit` with output shardings, so that it is never unsharded."""
    params = init_params(spec.model, jax.random.key(spec.seed))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(spec.optimizer).init(params),
        skipped_steps=zero,
        bad_streak=zero,
    )


def drop_labels(key: jax.Array, labels: jax.Array, probability: float, null_label: int) -> jax.Array:
    """Replace each label `[B]` by the null label with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), null_label, labels)


def batch_loss(spec: TrainSpec, graph, params, ema_params, tokens, labels, key):
    """Total loss of a batch and its parts.

    Args:
        spec: the static settings.
        graph: graph definition of the model.
        params: parameters that are trained.
        ema_params: their moving average, whose context encoder gives the targets.
        tokens: `[B, N, C]` in raster order.
        labels: `[B]` class ids.
        key: randomness of this step.

    Returns:
        the scalar loss, and a dict of scalar metrics.
    """
    keys = dict(zip(("order", "ratio", "label", "encoder", "predictor", "token"), jax.random.split(key, 6), strict=True))
    order = masking.draw_orders(keys["order"], *tokens.shape[:2])  # [B, N]
    num_visible = masking.draw_num_visible(keys["ratio"], spec.plan)  # [B]
    seen_labels = drop_labels(keys["label"], labels, spec.label_drop_prob, spec.model.null_label)
    model = nnx.merge(graph, params)
    x0 = masking.to_order(tokens, order)  # [B, N, C]
    use_jepa = spec.model.jepa_head
    dropout_keys = (keys["encoder"], keys["predictor"]) if spec.model.dropout or spec.model.attention_dropout else (None, None)
    cond = predict_features(model, x0, order, seen_labels, num_visible, spec.plan.max_visible, dropout_keys)

    pack = masking.pack_masked(num_visible, spec.plan)
    weights = pack(masking.masked_weights(num_visible, spec.plan))  # [chunks, K]
    cond = pack(cond)  # [chunks, K, D]
    token_loss = (weights * spec.token_loss.loss(model.denoiser, pack(x0), cond, keys["token"])).sum()
    metrics = {"token_loss": token_loss, "mask_ratio": 1 - num_visible.mean() / spec.plan.num_tokens}
    if not use_jepa:
        return spec.token_weight * token_loss, metrics
    target = pack(nnx.merge(graph, ema_params).encode_all(x0, order, labels))  # [chunks, K, D]
    predicted = model.jepa_head(cond)
    metrics["jepa_loss"] = (weights * jepa_loss(predicted, target)).sum()
    metrics |= _statistics(predicted, target)
    return spec.token_weight * token_loss + spec.jepa_weight * metrics["jepa_loss"], metrics


def predict_features(model, x0, order, labels, num_visible, max_visible: int, keys=(None, None)) -> jax.Array:
    """Context encoder on the visible prefix, then predictor: `[B, N, C]` in order coordinates -> cond `[B, N, D]`."""
    visible = jnp.arange(max_visible) < num_visible[:, None]  # [B, V]
    encoded = model.context_encoder(x0[:, :max_visible], order[:, :max_visible], labels, visible=visible, key=keys[0])
    return model.predictor(encoded, order, num_visible, key=keys[1])


def _statistics(predicted, target):
    rows = (x.reshape(-1, x.shape[-1])[:STATISTICS_ROWS] for x in (predicted, target))
    return feature_statistics(*jax.lax.stop_gradient(tuple(rows)))


def make_train_step(spec: TrainSpec) -> Callable:
    """The pure update `(state, batch) -> (state, metrics)`; `batch` has `image` and `label`."""
    graph, _ = split_model(spec.model)
    optimizer = make_optimizer(spec.optimizer)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """One update; everything random in it is drawn from (seed, step)."""
        key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
        tokens = spec.tokenize(batch["image"])

        def loss_of(params):
            return batch_loss(spec, graph, params, state.ema_params, tokens, batch["label"], key)

        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return apply_update(spec.optimizer, optimizer, state, grads, metrics)

    return train_step


def apply_update(config: OptimizerConfig, optimizer, state: TrainState, grads, metrics):
    """Optimiser and moving average, unless loss, gradient or update is not finite: then nothing but counters move."""
    updates_made = state.step - state.skipped_steps
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    finite = jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(updates))
    params = optax.apply_updates(state.params, updates)
    ema_params = update_ema(state.ema_params, params, ema_decay(config, updates_made))

    def keep(new, old):
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    bad = 1 - finite.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        ema_params=keep(ema_params, state.ema_params),
        opt_state=keep(opt_state, state.opt_state),
        skipped_steps=state.skipped_steps + bad,
        bad_streak=(state.bad_streak + 1) * bad,
    )
    metrics |= {
        "param_norm": optax.tree.norm(state.params),
        "learning_rate": learning_rate(config, updates_made),
        "skipped_steps": state.skipped_steps,
        "bad_streak": state.bad_streak,
    }
    return state, metrics
