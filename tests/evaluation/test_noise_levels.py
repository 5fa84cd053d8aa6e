"""The token loss by the time of its draws: denoisers whose loss is known, and who is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.losses import TOKEN_LOSSES
from djepa_jax.core.models.djepa import init_params
from djepa_jax.data.arrays import load_digits
from djepa_jax.data.sources import with_classes_of
from djepa_jax.evaluation import noise_levels
from djepa_jax.evaluation.noise_levels import draw_losses, in_bins, loss_per_noise_level


class Zero:
    """A denoiser that always gives zero, for `out` times as many channels."""

    def __init__(self, out):
        self.out = out

    def time(self, t):
        return jnp.zeros((*jnp.shape(t), 1))

    def condition(self, cond):
        return jnp.zeros((*cond.shape[:-1], 1))

    def __call__(self, xt, time, condition):
        return jnp.zeros((*xt.shape[:-1], self.out * xt.shape[-1]))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_denoiser_that_gives_zero(name):
    """Of tokens that are 2 it leaves E |2 - noise|^2 = 5 at every time; of noise, 1 and a bound; of
    clean tokens, 4 over the square of what is left of the time.
    """
    loss = TOKEN_LOSSES[name](num_denoise_steps=3)
    x0, key = jnp.full((64, 32, 4), 2.0), jax.random.key(0)
    draw = jax.jit(functools.partial(draw_losses, loss, Zero(loss.out_per_channel)))
    times, losses, counts = map(np.asarray, draw(x0, jnp.zeros((64, 32, 1)), key))
    assert times.shape == losses.shape == counts.shape == (64, 32)
    assert counts.all() or (name == "shortcut" and 0.4 < counts.mean() < 0.6)
    if name == "x_prediction":
        np.testing.assert_allclose(losses, 4 / np.maximum(1 - times, loss.min_rest) ** 2, rtol=1e-5)
        return
    last = loss.time_table_size or 1
    bins = in_bins(times, losses, counts, last)
    assert [of["from"] for of in bins] == pytest.approx(np.arange(10) * last / 10)
    assert bins[-1]["to"] == last and sum(of["tokens"] for of in bins) == counts.sum()
    for of in bins:
        away = (of["loss"] - (1 if name == "diffusion" else 5)) / of["standard_error"]
        assert away > -5 and (name == "diffusion" or away < 5)


def test_bins_hold_what_counts_and_no_more():
    rng = np.random.default_rng(0)
    times = rng.uniform(0, 1, (500, 3))
    times[:, 2] = times[:, 1]
    times[0] = -1, 7, 0.5  # of a loss with other times: the outermost bins are open
    losses, counts = rng.normal(3, 1, (500, 3)), np.ones((500, 3), bool)
    counts[::2, 0] = False
    losses[::2, 0] = np.nan
    bins = in_bins(times, losses, counts, 1)
    assert sum(of["tokens"] for of in bins) == counts.sum() == 1250
    (of,) = [of for of in bins if of["from"] == pytest.approx(0.3)]
    inside = counts & (times >= of["from"]) & (times < of["to"])
    assert of["loss"] == pytest.approx(losses[inside].mean())
    assert of["tokens"] == inside.sum()
    one = counts & (np.arange(3) == 1)
    (alone,) = in_bins(np.full((500, 3), 0.3), losses, one, 1)  # one token of each example
    assert alone["standard_error"] == pytest.approx(losses[:, 1].std() / np.sqrt(500))
    losses[:, 2] = losses[:, 1]  # a second one that says nothing new
    (twice,) = in_bins(np.full((500, 3), 0.3), losses, one | (np.arange(3) == 2), 1)
    assert twice["standard_error"] == pytest.approx(alone["standard_error"])
    assert twice["tokens"] == 1000


def test_masked_tokens_of_a_model_count_and_no_others(monkeypatch):
    """A fresh denoiser gives zero: its loss is E |x0 - noise|^2 = E x0^2 + 1."""
    monkeypatch.setattr(noise_levels, "NUM_BATCHES", 3)
    digits, mesh = load_digits(), sharding.make_mesh((-1, 1, 1))
    experiment = with_classes_of(digits, tiny_config())
    params = jax.jit(lambda: init_params(experiment.network, jax.random.key(0)))()
    bins = loss_per_noise_level(experiment.train, digits, params, mesh)
    count = sum(of["tokens"] for of in bins)
    masked = np.mean([experiment.train.masking.masked_at(u) for u in np.linspace(0, 1, 99)[1:-1]])
    assert count / (3 * 64) == pytest.approx(masked, rel=0.03)
    expected = 1 + float(jnp.square(experiment.modality.tokenize(digits.images)).mean())
    mean = sum(of["loss"] * of["tokens"] for of in bins) / count
    assert mean == pytest.approx(expected, rel=0.05)
