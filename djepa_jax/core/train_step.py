"""Training state, the loss of one batch, and one pure update.

One step, on a batch of examples and their conditions (class labels):

1. tokens are permuted by a random order; the first `num_visible` of each example are visible;
2. the context encoder reads the visible tokens, the predictor fills in features (cond) for all;
3. the target encoder, which is the moving average's context encoder, reads all tokens;
4. loss = token_weight * token loss(masked tokens | cond) + jepa_weight * smooth L1(head(cond),
   target);
5. clipped gradients, AdamW, moving average; a step whose gradient is not finite changes none of
   them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from djepa_jax.core import masking
from djepa_jax.core.losses import feature_statistics, jepa_loss
from djepa_jax.core.losses.base import TokenLoss
from djepa_jax.core.models.djepa import ModelConfig, init_params, split_model
from djepa_jax.core.optimizer import (
    OptimizerConfig,
    ema_decay,
    learning_rate,
    make_optimizer,
    update_ema,
)

STATISTICS_ROWS = 512
SUMMED = (
    "loss",
    "token_loss",
    "jepa_loss",
)  # metrics of parts of a batch that add up to the batch's


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
    tokenize: Callable[[jax.Array, jax.Array], jax.Array]  # (examples, key) -> tokens
    seed: int
    token_weight: float = 1.0
    jepa_weight: float = 1.0
    label_drop_prob: float = 0.1
    microbatches: int = 1  # parts of a batch whose gradients are added up

    def __post_init__(self):
        chunks = self.plan.batch_size // self.plan.chunk_size
        if self.microbatches < 1 or chunks % self.microbatches:
            raise ValueError(
                f"microbatches is {self.microbatches}; it must divide {chunks}, the batch in "
                f"chunks of {self.plan.chunk_size}."
            )


def init_state(spec: TrainSpec) -> TrainState:
    """A fresh state; call it inside `jax.jit` with output shardings, so that it is never
    unsharded.
    """
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


def drop_labels(
    key: jax.Array, labels: jax.Array, probability: float, null_label: int
) -> jax.Array:
    """Replace each label `[B]` by the null label with the given probability."""
    return jnp.where(jax.random.bernoulli(key, probability, labels.shape), null_label, labels)


def draw_examples(spec: TrainSpec, tokens, labels, key, dropout_key) -> dict[str, jax.Array]:
    """Everything that a step draws per example, for the whole batch at once, so that no splitting
    changes it.

    Returns:
        arrays with leading axis B: tokens in order coordinates, order, labels, labels as seen,
        number of visible tokens, the weight of every place in the losses (summing to one over the
        batch), and keys of dropout in both networks.
    """
    order_key, ratio_key, label_key = jax.random.split(key, 3)
    order = masking.draw_orders(order_key, *tokens.shape[:2])  # [B, N]
    num_visible = masking.draw_num_visible(ratio_key, spec.plan)  # [B]
    return {
        "x0": masking.to_order(tokens, order),  # [B, N, C]
        "order": order,
        "labels": labels,
        "seen_labels": drop_labels(label_key, labels, spec.label_drop_prob, spec.model.null_label),
        "num_visible": num_visible,
        "weights": masking.masked_weights(num_visible, spec.plan),  # [B, N]
        "dropout_keys": jax.random.split(dropout_key, (len(tokens), 2)),  # [B, 2]
    }


def batch_loss(spec: TrainSpec, graph, params, ema_params, examples: dict, token_keys):
    """Total loss of a batch, or of some of its chunks, and its parts.

    Args:
        spec: the static settings.
        graph: graph definition of the model.
        params: parameters that are trained.
        ema_params: their moving average, whose context encoder gives the targets.
        examples: from `draw_examples`; whole chunks of them.
        token_keys: `[chunks]`, randomness of the token loss, a key per chunk.

    Returns:
        the scalar loss, and a dict of scalar metrics.
    """
    x0, order, num_visible = examples["x0"], examples["order"], examples["num_visible"]
    model = nnx.merge(graph, params)
    model.denoiser.keep_batch_split = True
    drops = spec.model.dropout or spec.model.attention_dropout
    keys = examples["dropout_keys"].T if drops else (None, None)
    cond = predict_features(
        model, x0, order, examples["seen_labels"], num_visible, spec.plan.max_visible, keys
    )

    pack = masking.pack_masked(num_visible, spec.plan)
    x0_masked, weights, cond = (
        pack(x0),
        pack(examples["weights"]),
        pack(cond),
    )  # [chunks, K, C], [chunks, K], [chunks, K, D]
    draws = jax.vmap(lambda key: spec.token_loss.draw(key, x0_masked.shape[1:]))(token_keys)
    token_loss = (weights * spec.token_loss.loss(model.denoiser, x0_masked, cond, *draws)).sum()
    if not spec.model.jepa_head:
        return spec.token_weight * token_loss, {"token_loss": token_loss}
    target = pack(
        nnx.merge(graph, ema_params).encode_all(x0, order, examples["labels"])
    )  # [chunks, K, D]
    predicted = model.jepa_head(cond)
    feature_loss = (weights * jepa_loss(predicted, target)).sum()
    metrics = {
        "token_loss": token_loss,
        "jepa_loss": feature_loss,
        **_statistics(predicted, target),
    }
    return spec.token_weight * token_loss + spec.jepa_weight * feature_loss, metrics


def predict_features(
    model, x0, order, labels, num_visible, max_visible: int, keys=(None, None)
) -> jax.Array:
    """Context encoder on the visible prefix, then predictor: `[B, N, C]` in order coordinates ->
    cond `[B, N, D]`.
    """
    visible = jnp.arange(max_visible) < num_visible[:, None]  # [B, V]
    encoded = model.context_encoder(
        x0[:, :max_visible], order[:, :max_visible], labels, visible=visible, keys=keys[0]
    )
    return model.predictor(encoded, order, num_visible, keys=keys[1])


def _statistics(predicted, target):
    rows = (x.reshape(-1, x.shape[-1])[:STATISTICS_ROWS] for x in (predicted, target))
    return feature_statistics(*jax.lax.stop_gradient(tuple(rows)))


def make_train_step(spec: TrainSpec) -> Callable:
    """The pure update `(state, batch) -> (state, metrics)`; `batch`: `example`, `condition`."""
    graph, _ = split_model(spec.model)
    optimizer = make_optimizer(spec.optimizer)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """One update; everything random in it is drawn from (seed, step)."""
        key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
        example_key, token_key, dropout_key, posterior_key = jax.random.split(key, 4)
        tokens = spec.tokenize(batch["example"], posterior_key)
        examples = draw_examples(spec, tokens, batch["condition"], example_key, dropout_key)
        token_keys = jax.random.split(token_key, spec.plan.batch_size // spec.plan.chunk_size)

        def gradient_of(examples, token_keys):
            def loss_of(params):
                return batch_loss(spec, graph, params, state.ema_params, examples, token_keys)

            (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            return grads, metrics | {"loss": loss}

        grads, metrics = accumulate(spec, gradient_of, examples, token_keys)
        visible = examples["num_visible"].mean() / spec.plan.num_tokens
        metrics |= {"grad_norm": optax.tree.norm(grads), "mask_ratio": 1 - visible}
        return apply_update(spec.optimizer, optimizer, state, grads, metrics)

    return train_step


def accumulate(spec: TrainSpec, gradient_of: Callable, examples: dict, token_keys):
    """Gradient and metrics of the whole batch, from `spec.microbatches` parts of it, one after the
    other.

    Losses and gradients of parts add up, since the weights sum to one over the whole batch;
    statistics are averaged.
    """
    parts = spec.microbatches
    if parts == 1:
        return gradient_of(examples, token_keys)
    examples = jax.tree.map(lambda x: split_chunks(x, parts, spec.plan.chunk_size), examples)
    inputs = (examples, split_chunks(token_keys, parts, 1))

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient_of(*part)), None

    shapes = jax.eval_shape(gradient_of, *jax.tree.map(lambda x: x[0], inputs))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, start, inputs)
    return grads, {
        name: value if name in SUMMED else value / parts for name, value in metrics.items()
    }


def split_chunks(x: jax.Array, parts: int, chunk_size: int) -> jax.Array:
    """`[B, ...]` -> `[parts, B / parts, ...]`; part j has chunks j, j + parts, ..., so every device
    has a share of it.
    """
    return rearrange(x, "(c p e) ... -> p (c e) ...", p=parts, e=chunk_size)


def apply_update(config: OptimizerConfig, optimizer, state: TrainState, grads, metrics):
    """Optimiser and moving average, unless loss, gradient or update is not finite: then nothing but
    counters move.
    """
    updates_made = state.step - state.skipped_steps
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    finite = (
        jnp.isfinite(metrics["grad_norm"])
        & jnp.isfinite(metrics["loss"])
        & jnp.isfinite(optax.tree.norm(updates))
    )
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
