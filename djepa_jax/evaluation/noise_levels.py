"""The token loss of a trained model by the time of its draws: which amounts of noise are hard."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from djepa_jax.core import sharding
from djepa_jax.core.losses.base import Denoiser, TokenLoss
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.train_step import StepValues, TrainStepConfig, draw_examples, predict_features
from djepa_jax.data.arrays import ArraySource
from djepa_jax.data.loader import in_batches
from djepa_jax.runtime.progress import Progress

LEAST_EXAMPLES = 10  # of a bin, without which its standard error says nothing
NUM_BINS, NUM_BATCHES, BATCH_SIZE, NUM_THREADS = 10, 16, 64, 4


def draw_losses(loss: TokenLoss, denoiser: Denoiser, x0, cond, key) -> tuple[jax.Array, ...]:
    """A time and a loss for each token `[B, N, C]`, and whether it counts, `[B, N]` each.

    Stretches of time, which shortcuts draw, too, have another loss, and do not count.
    """
    t, noise = dataclasses.replace(loss, noise_multiplicity=1).draw(key, x0.shape)
    losses = loss.loss(denoiser, x0, cond, t, noise)  # [B, N]
    ends = t.reshape(*losses.shape, -1)  # [B, N, 1], of shortcuts [B, N, 2]
    return ends[..., 0], losses, (ends == ends[..., :1]).all(-1)


def make_token_losses(config: TrainStepConfig, batch_size: int) -> Callable:
    """The jitted (params, batch, key) -> what `draw_losses` gives; masked tokens alone count.

    Orders, mask ratios and the conditions that are left out are drawn as in training.
    """
    masking = dataclasses.replace(config.masking, batch_size=batch_size, group_size=1)
    config = dataclasses.replace(config, masking=masking, grad_accumulation_steps=1)
    values = StepValues(config.seed, config.label_drop_prob, None)
    graph, _ = split_model(config.model)

    @jax.jit
    def token_losses(params, batch, key):
        """Times, losses and whether they count, `[B, N]` each."""
        model, keys = nnx.merge(graph, params), jax.random.split(key, 4)
        tokens = config.modality.tokenize(batch["example"], keys[0])
        drawn = draw_examples(config, values, tokens, batch["condition"], keys[1], keys[2])
        x0, condition = drawn["x0"], model.embed_condition(drawn["told_conditions"])
        visible = drawn["num_visible"], masking.max_visible
        cond = predict_features(model, x0, drawn["order"], condition, *visible)  # [B, N, D]
        times, losses, counts = draw_losses(config.token_loss, model.denoiser, x0, cond, keys[3])
        return times, losses, counts & (drawn["weights"] > 0)

    return token_losses


def in_bins(times: np.ndarray, losses: np.ndarray, counts: np.ndarray, last: float) -> list[dict]:
    """Mean losses of tokens `[E, N]` that count, in bins of time up to `last`, if enough are in it.

    Standard errors are of a ratio of sums over examples, whose tokens are not independent.
    """
    edges, bins = np.linspace(0, last, NUM_BINS + 1), []
    places = np.digitize(times, edges[1:-1])
    for place, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
        chosen = counts & (places == place)  # [E, N]
        count, total = chosen.sum(1), losses.sum(1, where=chosen, dtype=float)  # [E]
        if np.count_nonzero(count) >= LEAST_EXAMPLES:
            tokens = int(count.sum())
            mean = float(total.sum() / tokens)
            error = float(np.linalg.norm(total - mean * count) / tokens)
            about = {"from": start, "to": stop, "loss": mean, "standard_error": error}
            bins.append(about | {"tokens": tokens})
    return bins


def loss_per_noise_level(config: TrainStepConfig, source, params, mesh) -> list[dict]:
    """The bins of a model, by examples that a source holds out, or else by those of the training.

    Where these are few, they are taken again, with other draws.
    """
    divisor, place = sharding.batch_divisor(mesh), sharding.batch_sharding(mesh)
    size = -(-BATCH_SIZE // divisor) * divisor
    if callable(getattr(source, "held_out", None)):
        source = ArraySource(*source.held_out(NUM_BATCHES * size))
    rows = np.resize(np.random.default_rng(0).permutation(len(source)), NUM_BATCHES * size)
    token_losses, found = make_token_losses(config, size), []
    batches = Progress("denoising tokens:", "part", NUM_BATCHES).over(
        in_batches(source, rows, size, NUM_THREADS)
    )
    for number, batch in enumerate(batches):
        batch = jax.device_put(batch, place)
        found.append(jax.device_get(token_losses(params, batch, jax.random.key(number))))
    times, losses, counts = map(np.concatenate, zip(*found, strict=True))
    return in_bins(times, losses, counts, config.token_loss.time_table_size or 1)
