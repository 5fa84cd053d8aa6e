"""The whole autoregressive loop against the authors' numbers, with their orders and their noise put
in.

In their order the front stays masked; ours is revealed from the front, so it is theirs reversed.
What they recorded per step has one row per new token, item by item and in raster order inside an
item.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PARITY, VARIANTS, assert_close, load_parity
from einops import rearrange

from djepa_jax.core.losses.diffusion import Diffusion
from djepa_jax.core.losses.flow_matching import FlowMatching
from djepa_jax.core.masking import to_order
from djepa_jax.core.modalities.image import patchify, unpatchify
from djepa_jax.core.sampler import (
    Draws,
    SamplerConfig,
    SampleState,
    embed_guided,
    predict,
    run_steps,
)
from djepa_jax.core.schedules import guidance_scales, reveal_counts
from djepa_jax.core.segments import plan_segments

TOLERANCE = {"gauss": 1e-4, "gauss_p2": 1e-4, "flow": 1e-5}
RUNS = [(variant, cfg) for variant in VARIANTS for cfg in (1, 3)]
SEGMENTS = [*((*run, 1) for run in RUNS), ("flow", 3, 3), ("gauss", 3, 8)]
STEP_ARRAYS = [
    (*run, name)
    for run in RUNS
    for name in ("z", "z_uncond", "sampled")
    if run[1] != 1 or name != "z_uncond"
]
SCHEDULES = [(16, 8), (16, 16), (256, 8), (256, 32), (256, 64)]


class Recording:
    """One recorded run, its rows put at their places: arrays `[B, N, ...]` in our order
    coordinates.
    """

    def __init__(self, variant: str, cfg: int):
        self.parity, self.cfg = load_parity(variant), cfg
        data = dict(np.load(PARITY / f"sample_loop_{variant}.npz"))
        self.labels, self.temperature = jnp.asarray(data["labels"]), float(data["temperature"])
        self.order = jnp.asarray(data["orders"][:, ::-1])
        self.num_steps, self.shift = int(data["num_iter"]), float(data["time_shifting_factor"])
        self.steps = [self._step(data, f"cfg{cfg}_step{step}_") for step in range(self.num_steps)]
        self.latents = rearrange(data[f"cfg{cfg}_latents"], "b c h w -> b h w c")
        self.scales = np.array([step["cfg_iter"] for step in self.steps])
        noises = [step["noise_init"][:, None] for step in self.steps]
        if variant != "flow":
            added = [np.moveaxis(step["noise_steps"], 0, 1) for step in self.steps]
            noises = [np.concatenate(pair, axis=1) for pair in zip(noises, added, strict=True)]
        self.noise = self.in_order(noises)  # [B, N, S, C]

    @staticmethod
    def _step(data, prefix):
        return {
            name.removeprefix(prefix): value
            for name, value in data.items()
            if name.startswith(prefix)
        }

    def in_order(self, rows: list[np.ndarray]) -> jax.Array:
        """The rows of every step, put at their places."""
        placed = np.full((*self.order.shape, *rows[0].shape[1:]), np.nan, np.float32)
        for step, values in zip(self.steps, rows, strict=True):
            placed[step["mask_to_pred"] > 0] = values
        assert not np.isnan(placed).any()
        flat = to_order(jnp.asarray(placed.reshape(*self.order.shape, -1)), self.order)
        return flat.reshape(placed.shape)

    def spec(self, num_segments: int) -> SamplerConfig:
        if self.parity.variant == "flow":
            loss = FlowMatching(
                num_denoise_steps=int(self.parity.official["num_sampling_steps"]),
                time_shift=self.shift,
            )
        else:
            loss = Diffusion(num_denoise_steps=int(self.parity.official["num_sampling_steps"]))
        return SamplerConfig(
            self.parity.config,
            loss,
            self.num_steps,
            guided=self.cfg != 1,
            num_segments=num_segments,
        )

    def run(self, num_segments: int) -> jax.Array:
        """Our loop on the recorded orders and noise: tokens `[B, N, C]` in raster order."""
        spec = self.spec(num_segments)
        assert len(plan_segments(spec)) == num_segments

        @jax.jit
        def run(order, labels, scales, temperature, noise):
            draws = Draws(order, lambda places: noise[:, places])
            return run_steps(spec, self.parity.model, draws, labels, scales, temperature)

        return run(self.order, self.labels, jnp.asarray(self.scales), self.temperature, self.noise)

    def to_latents(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C]` in raster order as latents `[B, H, W, C]`."""
        return unpatchify(tokens, self.parity.official["patch_size"], *self.latents.shape[1:3])


load_recording = functools.cache(Recording)


@pytest.mark.parametrize("num_tokens, num_steps", SCHEDULES)
def test_schedules(num_tokens, num_steps):
    data = np.load(PARITY / "mask_schedule.npz")
    name = f"len{num_tokens}_iter{num_steps}"
    np.testing.assert_array_equal(
        reveal_counts(num_tokens, num_steps), data[f"tokens_per_step_{name}"]
    )
    ours = guidance_scales(reveal_counts(num_tokens, num_steps), 3.0, "linear")
    np.testing.assert_allclose(ours, data[f"cfg_per_step_scale3_{name}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant, cfg", RUNS)
def test_order_masks_and_guidance_of_every_step(variant, cfg):
    """The reverse of their order reveals what they reveal, step by step."""
    recording = load_recording(variant, cfg)
    counts = reveal_counts(recording.parity.config.num_tokens, recording.num_steps)
    raster = np.argsort(recording.order, axis=-1)  # where a raster place comes in our order
    start = 0
    for step, count in zip(recording.steps, counts, strict=True):
        np.testing.assert_array_equal(step["mask_before"], raster >= start)
        np.testing.assert_array_equal(
            step["mask_to_pred"], (raster >= start) & (raster < start + count)
        )
        start += count
    ours = guidance_scales(
        reveal_counts(recording.parity.config.num_tokens, recording.num_steps),
        float(recording.cfg),
        "linear",
    )
    np.testing.assert_allclose(ours, recording.scales, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant, cfg, num_segments", SEGMENTS)
def test_final_latents(variant, cfg, num_segments):
    """Padding to shared shapes changes nothing: one segment, a few, and one for every step give the
    same.
    """
    recording = load_recording(variant, cfg)
    assert_close(
        recording.to_latents(recording.run(num_segments)), recording.latents, TOLERANCE[variant]
    )


@functools.cache
def single_steps(variant: str, cfg: int) -> dict[str, jax.Array]:
    """Conditions and new tokens of every step, each computed from the *recorded* tokens known
    before it.
    """
    recording = load_recording(variant, cfg)
    spec = recording.spec(1)
    num_tokens = spec.model.num_tokens
    counts = np.array(reveal_counts(num_tokens, recording.num_steps))
    tokens = to_order(
        patchify(jnp.asarray(recording.latents), recording.parity.official["patch_size"]),
        recording.order,
    )

    @jax.jit
    def run(tokens, order, labels, noise, scales):
        def known(num_visible):
            state = SampleState(tokens=tokens, num_visible=num_visible)
            model = recording.parity.model
            condition = embed_guided(spec, model, labels)
            places = jnp.arange(num_tokens)
            return predict(spec, model, state, order, condition, places, num_tokens)

        per_step = jax.vmap(known)(jnp.asarray(np.cumsum(counts) - counts))  # [T, G, B, N, D]
        step_of = np.repeat(np.arange(len(counts)), counts)  # the step that reveals a place
        cond = jnp.moveaxis(per_step[step_of, :, :, np.arange(num_tokens)], 0, 2)  # [G, B, N, D]
        scales = scales[step_of][:, None]  # [N, 1], broadcast over channels
        return cond, spec.token_loss.sample(
            recording.parity.model.denoiser, cond, noise, scales, recording.temperature
        )

    cond, sampled = run(
        tokens, recording.order, recording.labels, recording.noise, jnp.asarray(recording.scales)
    )
    return dict(z=cond[0], sampled=sampled, **({"z_uncond": cond[1]} if cfg != 1 else {}))


@pytest.mark.parametrize("variant, cfg, name", STEP_ARRAYS)
def test_single_steps(variant, cfg, name):
    recording, start = load_recording(variant, cfg), 0
    ours, expected = (
        single_steps(variant, cfg)[name],
        recording.in_order([step[name] for step in recording.steps]),
    )
    for count in reveal_counts(recording.parity.config.num_tokens, recording.num_steps):
        places = slice(start, start + count)
        assert_close(ours[:, places], expected[:, places], TOLERANCE[variant])
        start += count
