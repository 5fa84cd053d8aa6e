"""Gaussian diffusion against the authors' numbers: schedules, training terms, single steps, whole
sampling runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PARITY, Spy, assert_close, load_parity

from djepa_jax.core.losses.diffusion import Diffusion, make_schedule, split_output
from djepa_jax.core.models.embedding import time_frequencies

SCHEDULE_64, SCHEDULE_32 = 1e-10, 1e-6  # relative, element by element
TERMS = 2e-5
RUNS = 1e-4


@pytest.fixture(scope="module")
def data():
    return dict(np.load(PARITY / "diffusion.npz"))


@pytest.fixture(scope="module")
def denoiser():
    return load_parity("gauss").model.denoiser


def schedule_quantities(num_steps: int) -> dict[str, np.ndarray]:
    """Our schedule under the names of the fixtures."""
    ours = make_schedule(num_steps)
    return dict(
        betas=ours.betas,
        log_betas=np.log(ours.betas),
        alphas_cumprod=ours.alphas_cumprod,
        posterior_variance=ours.posterior_variance,
        posterior_log_variance_clipped=ours.posterior_log_variance,
        posterior_mean_coef1=ours.posterior_mean_x0,
        posterior_mean_coef2=ours.posterior_mean_xt,
        sqrt_recip_alphas_cumprod=1 / np.sqrt(ours.alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / ours.alphas_cumprod - 1),
    )


@pytest.mark.parametrize("num_steps", [1000, 100, 50, 25])
def test_schedules_in_float64(data, num_steps):
    prefix = "sched_train_" if num_steps == 1000 else f"sched_{num_steps}_"
    ours = schedule_quantities(num_steps)
    names = [name.removeprefix(prefix) for name in data if name.startswith(prefix)]
    assert len(names) == (4 if num_steps == 1000 else 10)
    for name in names:
        expected = data[prefix + name]
        if name == "timestep_map":
            np.testing.assert_array_equal(make_schedule(num_steps).timesteps, expected)
        else:
            assert ours[name].dtype == expected.dtype == np.float64
            np.testing.assert_allclose(ours[name], expected, rtol=SCHEDULE_64, atol=0, err_msg=name)


@pytest.mark.parametrize("num_steps", [100, 50, 25])
def test_reverse_steps_in_float32(data, num_steps):
    """What the sampler really multiplies with, highest step first."""
    at = Diffusion(num_denoise_steps=num_steps).reverse_steps()
    expected = {
        "timesteps": "timestep_map",
        "log_beta": "log_betas",
        "posterior_log_variance": "posterior_log_variance_clipped",
        "posterior_mean_x0": "posterior_mean_coef1",
        "posterior_mean_xt": "posterior_mean_coef2",
    }
    for ours, theirs in expected.items():
        np.testing.assert_allclose(
            at[ours][::-1],
            data[f"sched_{num_steps}_{theirs}"],
            rtol=SCHEDULE_32,
            atol=0,
            err_msg=ours,
        )
    np.testing.assert_allclose(
        1 / at["signal"][::-1],
        data[f"sched_{num_steps}_sqrt_recip_alphas_cumprod"],
        rtol=SCHEDULE_32,
    )
    ratio = at["sigma"][::-1] / at["signal"][::-1]
    np.testing.assert_allclose(
        ratio, data[f"sched_{num_steps}_sqrt_recipm1_alphas_cumprod"], rtol=SCHEDULE_32
    )


def test_ends_of_the_learned_range(data):
    """Variance value +1 means the log of beta, -1 the clipped posterior."""
    at = {
        name: value[::-1]
        for name, value in Diffusion(num_denoise_steps=100).reverse_steps().items()
    }
    high, low = at["log_beta"], at["posterior_log_variance"]
    for value, name in ((1.0, "log_betas"), (-1.0, "posterior_log_variance_clipped")):
        output = jnp.full((100, 2), value)
        _, log_variance = split_output(output, high[:, None], low[:, None])
        assert_close(log_variance[:, 0], data[f"sched_100_{name}"], SCHEDULE_32)


def test_time_frequencies(data):
    ours = time_frequencies(jnp.asarray(data["time_steps"]))
    np.testing.assert_allclose(ours, data["time_freq_embedding"], rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def training_terms(data, denoiser):
    @jax.jit
    def run(x0, cond, t, noise):
        spy = Spy(denoiser)
        mse, bound = Diffusion().terms(spy, x0, cond, t[:, None], noise[:, None])
        return dict(x_t=spy.xt, model_output=spy.output, mse=mse, vb=bound, loss=mse + bound)

    terms = run(*(jnp.asarray(data[f"train_{name}"]) for name in ("x_start", "z", "t", "noise")))
    return {name: value[:, 0] for name, value in terms.items()}  # one draw per row


@pytest.mark.parametrize("name", ["x_t", "model_output", "mse", "vb", "loss"])
def test_training_terms(data, training_terms, name):
    assert_close(training_terms[name], data[f"train_{name}"], TERMS)


def test_training_terms_have_rows_at_step_zero(data):
    """The discretised likelihood is only exercised there."""
    assert (data["train_t"] == 0).sum() == 4


@pytest.fixture(scope="module")
def single_steps(data, denoiser):
    """`temperature -> result` of one reverse step for every recorded row."""
    diffusion = Diffusion(num_denoise_steps=100)
    at = diffusion.reverse_steps()
    rows = len(at["timesteps"]) - 1 - data["pstep_i"]
    at = {name: value[rows][:, None] for name, value in at.items()}
    np.testing.assert_array_equal(at.pop("timesteps")[:, 0], data["pstep_t"])

    @jax.jit
    def run(temperature):
        x, z = jnp.asarray(data["pstep_x"]), jnp.asarray(data["pstep_noise"])
        output = denoiser(
            x,
            denoiser.time(jnp.asarray(data["pstep_t"])),
            denoiser.condition(jnp.asarray(data["pstep_z"])),
        )
        return diffusion.reverse(output[None], x, at, z, 1.0, temperature)

    return functools.cache(run)


@pytest.mark.parametrize(
    "ours, theirs", [("mean", "mean"), ("log_variance", "log_variance"), ("x0", "pred_xstart")]
)
def test_single_steps(data, single_steps, ours, theirs):
    assert_close(single_steps(1.0)[ours], data[f"pstep_{theirs}"], TERMS)


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_single_step_samples(data, single_steps, temperature):
    name = f"pstep_sample_temp{temperature}".replace(".", "p")
    assert_close(single_steps(temperature)["sample"], data[name], TERMS)


@pytest.fixture(scope="module")
def sampler(denoiser):
    num_steps = load_parity("gauss").official["num_sampling_steps"]
    return jax.jit(functools.partial(Diffusion(num_denoise_steps=int(num_steps)).sample, denoiser))


@pytest.mark.parametrize("cfg", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_whole_sampling_runs(data, sampler, cfg, temperature):
    conditions = [data["sample_z_cond"], data["sample_z_uncond"]]
    cond = np.stack(conditions[: 1 if cfg == 1 else 2])  # [G, rows, D]
    start, added = data[f"sample_cfg{cfg}_noise_init"], data[f"sample_cfg{cfg}_noise_steps"]
    noise = np.concatenate([start[:, None], np.moveaxis(added, 0, 1)], axis=1)  # [rows, 1 + S, C]
    name = f"sample_cfg{cfg}_temp{temperature}_final".replace(".", "p")
    assert_close(sampler(cond, noise, float(cfg), temperature), data[name], RUNS)
