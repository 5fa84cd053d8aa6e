"""Flow matching against the authors' numbers: training terms, time grids, Euler integration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PARITY, Spy, assert_close, load_parity

from djepa_jax.core.losses.flow_matching import FlowMatching
from djepa_jax.core.models.embedding import time_frequencies

TOLERANCE = 1e-5
GRIDS = [(100, 1.0), (100, 0.5), (25, 1.0), (25, 0.5)]


@pytest.fixture(scope="module")
def data():
    return dict(np.load(PARITY / "flow.npz"))


@pytest.fixture(scope="module")
def denoiser():
    return load_parity("flow").model.denoiser


def grid_name(points: int, shift: float) -> str:
    return f"T{points}_shift{shift}".replace(".", "p")


def test_time_frequencies_take_times_as_they_are(data):
    assert_close(
        time_frequencies(jnp.asarray(data["time_steps"])), data["time_freq_embedding"], TOLERANCE
    )


@pytest.fixture(scope="module")
def training_terms(data, denoiser):
    @jax.jit
    def run(x1, cond, t, noise):
        spy = Spy(denoiser)
        loss = FlowMatching().loss(spy, x1, cond, t[:, None], noise[:, None])
        return dict(xt=spy.xt[:, 0], model_output=spy.output[:, 0], loss=loss)

    return run(*(jnp.asarray(data[f"train_{name}"]) for name in ("x1", "z", "t", "x0")))


@pytest.mark.parametrize("name", ["xt", "model_output", "loss"])
def test_training_terms(data, training_terms, name):
    assert_close(training_terms[name], data[f"train_{name}"], TOLERANCE)


def test_velocity_target(data):
    """The recorded target is what makes our loss vanish."""

    class Answer:
        time = condition = staticmethod(lambda x: x)

        def __call__(self, xt, time, condition):
            return jnp.asarray(data["train_velocity_target"])[:, None]

    loss = FlowMatching().loss(
        Answer(),
        *(jnp.asarray(data[f"train_{name}"]) for name in ("x1", "z")),
        *recorded_draws(data),
    )
    assert float(loss.max()) < 1e-12


def recorded_draws(data):
    """Times `[rows, 1]` and noise `[rows, 1, C]`."""
    return jnp.asarray(data["train_t"])[:, None], jnp.asarray(data["train_x0"])[:, None]


@pytest.mark.parametrize("points, shift", GRIDS)
def test_time_grids(data, points, shift):
    times = FlowMatching(num_denoise_steps=points, time_shift=shift).times()
    assert times.dtype == np.float32
    assert_close(times, data[f"ode_times_{grid_name(points, shift)}"], 1e-6)


@pytest.mark.parametrize("points, shift", GRIDS)
@pytest.mark.parametrize("cfg", [1, 3])
def test_euler_runs(data, denoiser, points, shift, cfg):
    conditions = [data["sample_z_cond"], data["sample_z_uncond"]]
    cond = np.stack(conditions[: 1 if cfg == 1 else 2])  # [G, rows, D]
    noise = data["sample_noise"][:, None]  # [rows, 1, C]
    loss = FlowMatching(num_denoise_steps=points, time_shift=shift)
    ours = jax.jit(functools.partial(loss.sample, denoiser))(cond, noise, float(cfg), 1.0)
    assert_close(ours, data[f"sample_{grid_name(points, shift)}_cfg{cfg}"], TOLERANCE)
