"""AdamW with the schedules and decay groups of the recipe, and the moving average of parameters.

Schedules are functions of the number of updates made, so that they can be read in float64 as well.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from djepa_jax.core import bounds
from djepa_jax.core.sharding import has_whole_params, path_name

VECTORS = re.compile(r"/(bias|scale)$")  # most of the arrays, hardly any of the numbers
MAX_RAMPED_EMA_DECAY = 0.9999
PARTS = ("context_encoder", "predictor", "jepa_head", "denoiser")
# Only matrices of the ViT blocks decay: no denoiser, JEPA head, embedding, bias or norm.
DECAYED = re.compile(
    r"(context_encoder|predictor)/stack/blocks/(attention/(qkv|out)|mlp/(up|down))/kernel$"
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the update; steps are optimiser steps."""

    learning_rate: bounds.AboveZero
    num_steps: int  # of the training, which checks it
    warmup_steps: bounds.Natural = 0  # linear, from exactly 0
    # "cosine" falls to `min_learning_rate` at the last step, "linear" rises from 0.
    learning_rate_schedule: Annotated[str, bounds.OneOf(("constant", "cosine"))] = "constant"
    min_learning_rate: bounds.AtLeastZero = 0.0
    weight_decay: bounds.AtLeastZero = 0.0
    weight_decay_schedule: Annotated[str, bounds.OneOf(("constant", "linear"))] = "constant"
    beta1: bounds.Share = 0.9
    beta2: bounds.Share = 0.95
    epsilon: bounds.AboveZero = 1e-6
    clip_norm: bounds.AboveZero = 3.0
    ema_decay: bounds.Share = 0.9999
    # The decay rises linearly towards 1 over the training, capped at 0.9999, as in the authors'
    # code; with a decay of 0.9999 it changes nothing.
    ema_ramp: bool = False
    parts: str = "all"  # those that are trained, of `PARTS`, with commas between them

    def __post_init__(self):
        bounds.check_bounds(self)
        if strange := [name for name in self.trained if name not in PARTS]:
            raise ValueError(
                f'parts is "{self.parts}"; the model has no part "{strange[0]}", write all or some '
                f"of {', '.join(PARTS)} with commas between them."
            )

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that are trained, by their names."""
        if self.parts == "all":
            return PARTS
        return tuple(name.strip() for name in self.parts.split(","))


def learning_rate(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Learning rate of update number `step` (from 0)."""
    warmup = config.learning_rate * step / max(config.warmup_steps, 1)
    rest = config.learning_rate
    if config.learning_rate_schedule == "cosine":
        progress = (step - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1)
        span = config.learning_rate - config.min_learning_rate
        wave = 1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))
        rest = config.min_learning_rate + span * 0.5 * wave
    return jnp.where(step < config.warmup_steps, warmup, rest)


def weight_decay(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Weight decay of update number `step`, for the decay group."""
    if config.weight_decay_schedule == "linear":
        return config.weight_decay * step / max(config.num_steps, 1)
    return config.weight_decay * jnp.ones_like(jnp.asarray(step), dtype=float)


def ema_decay(config: OptimizerConfig, step: jax.Array) -> jax.Array:
    """Decay of the moving average after update number `step`."""
    if not config.ema_ramp:
        return config.ema_decay * jnp.ones_like(jnp.asarray(step), dtype=float)
    ramped = config.ema_decay + (1 - config.ema_decay) * step / max(config.num_steps, 1)
    return jnp.minimum(ramped, max(MAX_RAMPED_EMA_DECAY, config.ema_decay))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateValues:
    """The numbers of one update that its program need not know when it is compiled."""

    learning_rate: jax.Array
    weight_decay: jax.Array
    ema_decay: jax.Array


def update_values(config: OptimizerConfig, step: jax.Array) -> UpdateValues:
    """Those of update number `step` (from 0)."""
    schedules = learning_rate, weight_decay, ema_decay
    values = (schedule(config, step) for schedule in schedules)
    return UpdateValues(*(jnp.asarray(value, float) for value in values))  # one type for all kinds


def describe_trained(config: OptimizerConfig, params: dict) -> str:
    """How many parameters are trained, and of which parts if not of all."""
    parts = {name: part for name, part in params.items() if name in config.trained}
    count = sum(leaf.size for leaf in jax.tree.leaves(parts))
    return f"{count:,} parameters" + (
        f" of {', '.join(parts)}" if parts.keys() < params.keys() else ""
    )


def keep_frozen(config: OptimizerConfig, new: dict, old: dict) -> dict:
    """The parameters `new`, and of parts that are not trained those of `old`."""
    return {name: (new if name in config.trained else old)[name] for name in old}


def stop_frozen(config: OptimizerConfig, params: dict, average: dict) -> dict:
    """The parameters to train with: parts that are not trained have no gradient, and are those of
    the moving average, which samples are drawn with.
    """
    return keep_frozen(config, params, jax.lax.stop_gradient(average))


def decay_mask(params: dict) -> dict:
    """True for the parameters that weight decay acts on, by their path."""

    def decays(path, _):
        return bool(DECAYED.search(path_name(path)))

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    config: OptimizerConfig, mask=decay_mask, values: UpdateValues | None = None
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov and Hutter 2019) with scheduled decay.

    With `values` the next update takes its numbers from there, and not from the configuration.
    """

    def at(count) -> UpdateValues:
        return values or update_values(config, count)

    adamw = optax.adamw(
        lambda count: at(count).learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=lambda count: at(count).weight_decay,
        mask=mask,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def params_norm(params: dict) -> float:
    """The norm of all parameters, a number that tells weights apart; one program computes it."""
    return float(jax.jit(optax.tree.norm)(params))


def pack(tree):
    """A tree in which parameters, or dicts like them, are by path, with all `VECTORS` in one.

    An update runs a dozen kernels per array, which take longer to compile and to launch than to run
    on vectors.
    """
    return _map_dicts(_pack, tree)


def unpack(tree, like: dict):
    """The reverse of `pack`; shapes are those of the parameters `like`."""
    return _map_dicts(functools.partial(_unpack, like=like), tree)


def _map_dicts(change: Callable[[dict], dict], tree):
    def is_dict(x) -> bool:
        return isinstance(x, dict)

    return jax.tree.map(lambda x: change(x) if is_dict(x) else x, tree, is_leaf=is_dict)


def _pack(tree: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    packed = {path_name(path): leaf for path, leaf in leaves}
    names = [name for name in packed if VECTORS.search(name)]
    if not names or not has_whole_params(packed[names[0]]):  # XLA would gather kernels for it
        return packed
    vectors = [packed.pop(name).reshape(-1) for name in names]
    return packed | {"vectors": jnp.concatenate(vectors)}


def _unpack(packed: dict, like: dict) -> dict:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    found, start = [], 0
    for path, leaf in leaves:
        name = path_name(path)
        if name not in packed:
            found.append(packed["vectors"][start : start + leaf.size].reshape(leaf.shape))
            start += leaf.size
        else:
            found.append(packed[name])
    return jax.tree.unflatten(treedef, found)


def update_ema(ema: dict, params: dict, decay: jax.Array) -> dict:
    """decay * ema + (1 - decay) * params; float32, as bfloat16 would never move at 0.9999."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
