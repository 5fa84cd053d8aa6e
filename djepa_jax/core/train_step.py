"""Training state, the loss of one batch, and one pure update.

One step, on a batch of examples and conditions:

1. tokens are permuted by a random order; the first `num_visible` of each example are visible;
2. the context encoder reads the visible tokens, the predictor fills in features (cond) for all;
3. the target encoder, which is the moving average's context encoder, reads all tokens;
4. loss = token_weight * token loss(masked tokens | cond) + jepa_weight * smooth L1(head(cond),
   target);
5. clipped gradients, AdamW, moving average; a step whose gradient is not finite changes none of
   them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx

from djepa_jax.core import masking, optimizer
from djepa_jax.core.losses import feature_statistics, jepa_loss
from djepa_jax.core.losses.base import TokenLoss
from djepa_jax.core.modalities.base import Modality
from djepa_jax.core.models.djepa import ModelConfig, init_params, split_model

STATISTICS_ROWS = 512
SUMMED = ("loss", "token_loss", "jepa_loss")  # metrics of accumulation steps that add up


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
class TrainStepConfig:
    """What the step is made of; static but for what `StepValues` has in its place."""

    model: ModelConfig
    token_loss: TokenLoss
    masking: masking.MaskingConfig
    optimizer: optimizer.OptimizerConfig
    modality: Modality
    seed: int
    token_weight: float = 1.0
    jepa_weight: float = 1.0
    label_drop_prob: float = 0.1
    mask_modes: tuple[tuple[str, float], ...] = (("random", 1.0),)  # keys of ORDERS, their shares
    grad_accumulation_steps: int = 1  # parts of a batch whose gradients are added up

    def __post_init__(self):
        parts = self.optimizer.parts
        if parts != "all" and "jepa_head" in self.optimizer.trained and not self.model.jepa_head:
            raise ValueError(
                f'optimizer.parts is "{parts}"; config.loss.jepa_weight 0 leaves no jepa_head.'
            )
        packs = self.masking.batch_size // self.masking.pack_size
        if self.grad_accumulation_steps < 1 or packs % self.grad_accumulation_steps:
            raise ValueError(
                f"grad_accumulation_steps is {self.grad_accumulation_steps}; it must divide "
                f"{packs}, the packs of {self.masking.pack_size} examples in a batch."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepValues:
    """What a compiled step is told anew at every call: one program serves all such numbers.

    Weights of the losses, `clip_norm` and the constants of the moments are compiled in: XLA folds
    them into others, so that a step without them rounds differently.
    """

    seed: jax.Array
    label_drop_prob: jax.Array
    update: optimizer.UpdateValues


def step_values(config: TrainStepConfig, state: TrainState) -> StepValues:
    """Those of the step that follows a state."""
    update = optimizer.update_values(config.optimizer, state.step - state.skipped_steps)
    return StepValues(config.seed, config.label_drop_prob, update)


def init_state(config: TrainStepConfig, shardings: TrainState | None = None) -> TrainState:
    """A fresh state; with `shardings` every array is made where it belongs, never whole before.

    Models alike share the programs, whatever their seeds.
    """
    where = (None, None) if shardings is None else (shardings.params, shardings)
    init = jax.jit(init_params, static_argnums=0, out_shardings=where[0])
    begin = jax.jit(begin_with, static_argnums=0, donate_argnums=1, out_shardings=where[1])
    return begin(config.optimizer, init(config.model, jax.random.key(config.seed)))


def state_shapes(config: TrainStepConfig) -> TrainState:
    """Shapes and types of the state; allocates nothing."""
    _, params = split_model(config.model)
    return jax.eval_shape(lambda params: begin_with(config.optimizer, params), params)


def begin_with(config: optimizer.OptimizerConfig, params: dict) -> TrainState:
    """The state at step 0 of a training that begins with `params`."""
    average = jax.tree.map(jnp.copy, params)
    opt_state = optimizer.make_optimizer(config).init(params)
    zero = jnp.zeros((), jnp.int32)
    counters = {"step": zero, "skipped_steps": zero, "bad_streak": zero}
    return TrainState(params=params, ema_params=average, opt_state=opt_state, **counters)


def draw_examples(
    config: TrainStepConfig, values: StepValues, tokens, conditions, key, dropout_key
) -> dict:
    """All that a step draws per example, for the whole batch, so that no splitting changes it.

    Returns:
        arrays with leading axis B, in the order of `masking.sort_packs`; `x0` are the tokens in
        order coordinates, `told_conditions` those of which some are dropped, `weights` those of
        every place in the losses (summing to one over the batch), `dropout_keys` one for each of
        both networks.
    """
    order_key, ratio_key, drop_key = jax.random.split(key, 3)
    if config.mask_modes == (("random", 1.0),):
        order = masking.draw_orders(order_key, *tokens.shape[:2])  # [B, N]
    else:
        how = config.model.grid, config.mask_modes
        order = masking.draw_mixed_orders(order_key, len(tokens), *how)
    num_visible = masking.draw_num_visible(ratio_key, config.masking)  # [B]
    told = config.model.conditioner.drop(drop_key, conditions, values.label_drop_prob)
    examples = {
        "x0": masking.to_order(tokens, order),  # [B, N, C]
        "order": order,
        "conditions": conditions,
        "told_conditions": told,
        "num_visible": num_visible,
        "weights": masking.masked_weights(num_visible, config.masking),  # [B, N]
        "dropout_keys": jax.random.split(dropout_key, (len(tokens), 2)),  # [B, 2]
    }
    return masking.sort_packs(examples, num_visible, config.masking)


def batch_loss(config: TrainStepConfig, graph, params, ema_params, examples: dict, token_keys):
    """Total loss of a batch, or of some of its packs, and a dict of scalar metrics.

    `examples` are whole packs of those from `draw_examples`, `token_keys` `[packs]` the randomness
    of the token loss. The context encoder of `ema_params` gives the targets.
    """
    x0, order, num_visible = examples["x0"], examples["order"], examples["num_visible"]
    model = nnx.merge(graph, params)
    model.denoiser.many_rows = True  # B K of them, which a mesh splits along the batch
    drops = config.model.dropout or config.model.attention_dropout
    keys = examples["dropout_keys"].T if drops else (None, None)
    condition = model.embed_condition(examples["told_conditions"])
    most, lengths = config.masking.max_visible, config.masking.lengths
    cond = predict_features(model, x0, order, condition, num_visible, most, keys, lengths)

    pack = masking.pack_masked(num_visible, config.masking)
    x0_masked = pack(x0)  # [packs, K, C]
    weights = pack(examples["weights"])  # [packs, K]
    cond = pack(cond)  # [packs, K, D]
    draws = jax.vmap(lambda key: config.token_loss.draw(key, x0_masked.shape[1:]))(token_keys)
    token_loss = (weights * config.token_loss.loss(model.denoiser, x0_masked, cond, *draws)).sum()
    if not config.model.jepa_head:
        return config.token_weight * token_loss, {"token_loss": token_loss}
    target_model = nnx.merge(graph, ema_params)
    condition = target_model.embed_condition(examples["conditions"])
    target = pack(target_model.encode_all(x0, order, condition))  # [packs, K, D]
    predicted = model.jepa_head(cond)
    feature_loss = (weights * jepa_loss(predicted, target)).sum()
    rows = (x.reshape(-1, x.shape[-1])[:STATISTICS_ROWS] for x in (predicted, target))
    statistics = feature_statistics(*jax.lax.stop_gradient(tuple(rows)))
    loss = config.token_weight * token_loss + config.jepa_weight * feature_loss
    return loss, {"token_loss": token_loss, "jepa_loss": feature_loss, **statistics}


def predict_features(
    model, x0, order, condition, num_visible, max_visible: int, keys=(None, None), lengths=()
) -> jax.Array:
    """Context encoder on the visible prefix, then predictor: `[B, N, C]` -> cond `[B, N, D]`."""
    seen = x0[:, :max_visible], order[:, :max_visible]
    how = {"num_visible": num_visible, "keys": keys[0], "lengths": lengths}
    encoded = model.context_encoder(*seen, condition, **how)  # [B, P + V, D]
    return model.predictor(encoded, order, num_visible, condition.mask, keys=keys[1])


@functools.lru_cache(maxsize=8)  # a process that trains again like this traces nothing anew
def make_train_step(config: TrainStepConfig) -> Callable:
    """The pure update `(state, batch of "example" and "condition") -> (state, metrics)`.

    A third argument, `step_values(config, state)`, keeps its numbers out of the program.
    """
    graph, _ = split_model(config.model)

    def train_step(
        state: TrainState, batch: dict, values: StepValues | None = None
    ) -> tuple[TrainState, dict]:
        """One update; everything random in it is drawn from (seed, step)."""
        values = values or step_values(config, state)
        key = jax.random.fold_in(jax.random.key(values.seed), state.step)
        example_key, token_key, dropout_key, posterior_key = jax.random.split(key, 4)
        tokens = config.modality.tokenize(batch["example"], posterior_key)
        keys = example_key, dropout_key
        examples = draw_examples(config, values, tokens, batch["condition"], *keys)
        num_packs = config.masking.batch_size // config.masking.pack_size
        token_keys = jax.random.split(token_key, num_packs)

        def gradient_of(examples, token_keys):
            def loss_of(params):
                params = optimizer.stop_frozen(config.optimizer, params, state.ema_params)
                return batch_loss(config, graph, params, state.ema_params, examples, token_keys)

            (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            return grads, metrics | {"loss": loss}

        grads, metrics = accumulate(config, gradient_of, examples, token_keys)
        visible = examples["num_visible"].mean() / config.masking.num_tokens
        metrics |= {"grad_norm": optax.tree.norm(optimizer.pack(grads)), "mask_ratio": 1 - visible}
        transform = optimizer.make_optimizer(config.optimizer, values=values.update)
        new, metrics = apply_update(values.update, transform, state, grads, metrics)
        return keep_frozen(config.optimizer, new, state), metrics

    return train_step


def keep_frozen(config: optimizer.OptimizerConfig, new: TrainState, old: TrainState) -> TrainState:
    """The new state, in which parts that are not trained are the old ones, in both sets."""
    params = optimizer.keep_frozen(config, new.params, old.params)
    average = optimizer.keep_frozen(config, new.ema_params, old.ema_params)
    return dataclasses.replace(new, params=params, ema_params=average)


def accumulate(config: TrainStepConfig, gradient_of: Callable, examples: dict, token_keys):
    """Gradient and metrics of the batch from its `config.grad_accumulation_steps` parts in turn.

    Losses and gradients of parts add up, since the weights sum to one over the whole batch;
    statistics are averaged.
    """
    parts = config.grad_accumulation_steps
    if parts == 1:
        return gradient_of(examples, token_keys)
    examples = jax.tree.map(lambda x: split_packs(x, parts, config.masking.pack_size), examples)
    inputs = (examples, split_packs(token_keys, parts, 1))

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient_of(*part)), None

    shapes = jax.eval_shape(gradient_of, *jax.tree.map(lambda x: x[0], inputs))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, start, inputs)
    return grads, {name: x if name in SUMMED else x / parts for name, x in metrics.items()}


def split_packs(x: jax.Array, parts: int, pack_size: int) -> jax.Array:
    """`[B, ...]` -> `[parts, B / parts, ...]`; part j has packs j, j + parts and so on."""
    # Strided, so that every device has a share of every part.
    return rearrange(x, "(c p e) ... -> p (c e) ...", p=parts, e=pack_size)


def apply_update(values: optimizer.UpdateValues, transform, state: TrainState, grads, metrics):
    """Optimiser and average; only counters move if loss, gradient or update is not finite.

    The metric "param_norm" is that of the new parameters, also where they are left out.
    """
    old = optimizer.pack((state.params, state.ema_params, state.opt_state))
    params, ema_params, opt_state = old
    updates, opt_state = transform.update(optimizer.pack(grads), opt_state, params)
    params = optax.apply_updates(params, updates)
    ema_params = optimizer.update_ema(ema_params, params, values.ema_decay)
    metrics |= {"param_norm": optax.tree.norm(params)}
    finite = jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["loss"])
    finite &= jnp.isfinite(metrics["param_norm"])

    def keep(new, old):
        return jnp.where(finite, new, old)

    new = jax.tree.map(keep, (params, ema_params, opt_state), old)
    params, ema_params, opt_state = optimizer.unpack(new, state.params)
    bad = 1 - finite.astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema_params=ema_params,
        opt_state=opt_state,
        skipped_steps=state.skipped_steps + bad,
        bad_streak=(state.bad_streak + 1) * bad,
    )
    metrics |= {
        "learning_rate": values.learning_rate,
        "skipped_steps": state.skipped_steps,
        "bad_streak": state.bad_streak,
    }
    return state, metrics
