"""The JEPA prediction loss: how far the predicted features are from the target encoder's."""

import jax
import jax.numpy as jnp

SMOOTH_L1_BETA = 2.0


def jepa_loss(predicted: jax.Array, target: jax.Array) -> jax.Array:
    """Smooth L1 with beta 2, mean over features: `[..., D]`, `[..., D]` -> `[...]` float32.

    0.5 d^2 / beta below beta, |d| - beta / 2 above. The target carries no gradient.
    """
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    difference = jnp.abs(predicted.astype(jnp.float32) - target)
    quadratic = 0.5 * jnp.square(difference) / SMOOTH_L1_BETA
    linear = difference - 0.5 * SMOOTH_L1_BETA
    return jnp.where(difference < SMOOTH_L1_BETA, quadratic, linear).mean(-1)


def feature_statistics(predicted: jax.Array, target: jax.Array) -> dict[str, jax.Array]:
    """Signs of collapse, from rows `[R, D]` of predictions and targets.

    Returns:
        `target_std`: standard deviation over rows, mean over features; goes to 0 in a collapse.
        `target_rank`: effective rank, tr(C)^2 / tr(C^2) of the rows' covariance C, between 1 and D
        (0 if all rows are equal). `cosine`: mean cosine between prediction and target.
    """
    predicted, target = predicted.astype(jnp.float32), target.astype(jnp.float32)
    centred = target - target.mean(0)
    products = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)  # [D, D]
    covariance = products / target.shape[0]
    rank = jnp.square(jnp.trace(covariance)) / jnp.maximum(jnp.square(covariance).sum(), 1e-20)
    norms = jnp.linalg.norm(predicted, axis=-1) * jnp.linalg.norm(target, axis=-1)
    cosine = (predicted * target).sum(-1) / jnp.maximum(norms, 1e-20)
    std = jnp.sqrt(jnp.diagonal(covariance)).mean()
    return dict(target_std=std, target_rank=rank, cosine=cosine.mean())
