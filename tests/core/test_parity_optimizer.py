"""The update rule against the authors' numbers: schedules, AdamW with its decay groups, moving
average.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PARITY, VARIANTS, assert_close, load_parity

from djepa_jax.checkpoints.convert.official import to_official
from djepa_jax.core.optimizer import (
    OptimizerConfig,
    decay_mask,
    ema_decay,
    learning_rate,
    make_optimizer,
    update_values,
    weight_decay,
)
from djepa_jax.core.train_step import TrainState, apply_update

STEPS = 1e-6
SCHEDULES = 1e-12  # relative, element by element, float64
TENSORS = ("w", "bias", "buffer", "kernel2")
DECAYED = {"w": True, "bias": False, "buffer": False, "kernel2": True}

# 4 epochs of 3 steps, one of them warm-up. As published the decay never leaves its first value, 0.
TOY = OptimizerConfig(
    learning_rate=8e-3, num_steps=12, warmup_steps=3, ema_decay=0.99, ema_ramp=True
)
RUNS = {
    "official": dict(weight_decay=0.0),
    "wd_schedule_as_intended": dict(weight_decay=0.02, weight_decay_schedule="linear"),
    "constant_wd": dict(weight_decay=0.02),
}
# The recorded schedules are in epochs, fractional ones too; one step of ours stands for one epoch.
LONG = OptimizerConfig(learning_rate=8e-4, min_learning_rate=1e-6, num_steps=1400, warmup_steps=100)


@pytest.fixture(scope="module")
def data():
    return dict(np.load(PARITY / "optim.npz"))


def config_with(base: OptimizerConfig, **changes) -> OptimizerConfig:
    return OptimizerConfig(**(vars(base) | changes))


def in_float64(schedule, config, steps) -> np.ndarray:
    with jax.enable_x64(True):
        values = np.asarray(schedule(config, jnp.asarray(steps, jnp.float64)))
    assert values.dtype == np.float64
    return values


@functools.cache
def run_toy(prefix: str) -> dict[str, np.ndarray]:
    """Twelve updates with the recorded gradients: arrays `[12, ...]` under the names of the
    fixtures.
    """
    data = np.load(PARITY / "optim.npz")
    config = config_with(TOY, **RUNS[prefix])
    optimizer = make_optimizer(config, mask=lambda params: {name: DECAYED[name] for name in params})
    params = {name: jnp.asarray(data[f"init_{name}"]) for name in TENSORS}
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, params, optimizer.init(params), zero, zero)

    @jax.jit
    def run(state, gradients):
        def step(state, grads):
            metrics = {"loss": jnp.zeros(()), "grad_norm": optax.tree.norm(grads)}
            values = update_values(config, state.step)
            state, metrics = apply_update(values, optimizer, state, grads, metrics)
            after = {f"{name}_after": value for name, value in state.params.items()}
            average = {f"{name}_ema_after": value for name, value in state.ema_params.items()}
            return state, after | average | {
                "grad_norm": metrics["grad_norm"],
                "lr": metrics["learning_rate"],
            }

        return jax.lax.scan(step, state, gradients)[1]

    return run(state, {name: jnp.asarray(data[f"grads_{name}"]) for name in TENSORS})


@pytest.mark.parametrize(
    "name",
    [*(f"{t}_{what}" for t in TENSORS for what in ("after", "ema_after")), "grad_norm", "lr"],
)
@pytest.mark.parametrize("prefix", RUNS)
def test_every_update(data, prefix, name):
    ours, expected = run_toy(prefix)[name], data[f"{prefix}_{name}"]
    assert len(expected) == 12
    for step in range(12):
        assert_close(ours[step], expected[step], STEPS)


def test_first_update_moves_nothing(data):
    """The warm-up starts at exactly 0."""
    for name in TENSORS:
        np.testing.assert_array_equal(
            run_toy("constant_wd")[f"{name}_after"][0], data[f"init_{name}"]
        )


@pytest.mark.parametrize("prefix", RUNS)
def test_schedules_of_the_twelve_updates(data, prefix):
    config, steps = config_with(TOY, **RUNS[prefix]), np.arange(12)
    for schedule, name in (
        (learning_rate, "lr"),
        (weight_decay, "wd_in_decay_group"),
        (ema_decay, "ema_rate"),
    ):
        ours = in_float64(schedule, config, steps)
        np.testing.assert_allclose(
            ours, data[f"{prefix}_{name}"], rtol=SCHEDULES, atol=0, err_msg=name
        )


@pytest.mark.parametrize("prefix", RUNS)
def test_decay_that_their_schedule_announces(data, prefix):
    """What the published program computes, though it does not apply it: our linear ramp, or the
    constant.
    """
    intended = RUNS["wd_schedule_as_intended" if prefix == "official" else prefix]
    ours = in_float64(weight_decay, config_with(TOY, **intended), np.arange(12))
    np.testing.assert_allclose(ours, data[f"{prefix}_wd_returned"], rtol=SCHEDULES, atol=0)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_learning_rate_schedules(data, kind):
    ours = in_float64(
        learning_rate, config_with(LONG, learning_rate_schedule=kind), data["sched_epochs"]
    )
    np.testing.assert_allclose(ours, data[f"sched_lr_{kind}"], rtol=SCHEDULES, atol=0)


def test_weight_decay_schedules(data):
    epochs = data["sched_epochs"]
    linear = in_float64(
        weight_decay, config_with(LONG, weight_decay=0.02, weight_decay_schedule="linear"), epochs
    )
    np.testing.assert_allclose(linear, data["sched_wd_returned"], rtol=SCHEDULES, atol=0)
    resumed = data["sched_wd_applied_run_resumed_after_epoch0"]
    assert np.isnan(resumed[0])  # such a run has no first epoch
    np.testing.assert_allclose(linear[1:], resumed[1:], rtol=SCHEDULES, atol=0)
    faithful = in_float64(weight_decay, LONG, epochs)
    np.testing.assert_array_equal(faithful, data["sched_wd_applied_run_from_epoch0"])


@pytest.mark.parametrize("base", [0.9999, 0.999, 0.99])
def test_ema_schedules(data, base):
    ours = in_float64(
        ema_decay, config_with(LONG, ema_decay=base, ema_ramp=True), data["sched_epochs"]
    )
    np.testing.assert_allclose(
        ours, data[f"sched_ema_{base}".replace(".", "p")], rtol=SCHEDULES, atol=0
    )


def test_ema_without_ramp_is_constant():
    np.testing.assert_array_equal(
        in_float64(ema_decay, config_with(LONG, ema_decay=0.99), np.arange(1400)), 0.99
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_decay_groups(data, variant):
    """Our mask, carried through the table of names, splits the authors' parameters as they do."""
    abstract = load_parity(variant).abstract
    flags = jax.tree.map(
        lambda leaf, decayed: np.full(leaf.shape, decayed), abstract, decay_mask(abstract)
    )
    official = to_official(flags)
    decayed = {name for name, flag in official.items() if flag.all()}
    assert decayed == set(data[f"decay_names_{variant}"])
    assert set(official) - decayed == set(data[f"no_decay_names_{variant}"])
