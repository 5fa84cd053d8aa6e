"""The ImageNet recipes: their variants in any order, that they train and sample, and what their
headers say.
"""

import functools
import importlib
import itertools
import json
import re

import jax
import numpy as np
import pytest
from tiny import CONFIGS, load_config

from configs.recipes import LOSSES, VARIANTS
from djepa_jax.config import experiment as configuration
from djepa_jax.core import flops, sharding
from djepa_jax.core.sampler import make_sampler
from djepa_jax.core.train_step import init_state, make_train_step
from djepa_jax.data.sources import open_data
from djepa_jax.main import UsageError, main
from djepa_jax.training.compile_step import ROOM, StepProgram, fits

PAIRS = [pair for pair in itertools.combinations(VARIANTS, 2) if pair != LOSSES]


def recipe(variant: str):
    return load_config(f"djepa_b:{variant}")


# variants


@pytest.mark.parametrize("a, b", PAIRS)
def test_the_order_of_variants_does_not_matter(a, b):
    one, other = recipe(f"{a}+{b}"), recipe(f"{b}+{a}")
    assert one.to_dict() == other.to_dict()
    configuration.build(one)


@functools.cache
def changes(variant: str) -> dict:
    """The keys that a variant alone changes, with what it sets them to."""
    plain, varied = (
        configuration.flatten(recipe(name).to_dict()) for name in ("diffusion", variant)
    )
    return {key: value for key, value in varied.items() if plain[key] != value}


@pytest.mark.parametrize("a, b", PAIRS)
def test_two_variants_keep_what_each_is_for(a, b):
    both = configuration.flatten(recipe(f"{a}+{b}").to_dict())
    built_on = {("pixels", "512"): {"data.image_size"}, ("pixels", "debug"): {"data.source"}}.get(
        (a, b), set()
    )
    for key, value in (changes(a) | changes(b)).items():
        assert key in built_on or both[key] == value


def test_512_is_twice_the_side_in_latents_and_in_pixels():
    for variant, size, patch, dim in (
        ("512", 32, 1, 16),
        ("pixels+512", 512, 16, 768),
        ("512+pixels", 512, 16, 768),
    ):
        config = recipe(variant)
        modality = configuration.build(config).modality
        assert (config.data.image_size, config.data.patch_size) == (size, patch)
        assert (modality.num_tokens, modality.token_dim) == (1024, dim)


def test_debug_needs_no_data_whatever_stands_beside_it():
    assert all(
        recipe(f"debug+{name}").data.source == "synthetic" for name in VARIANTS if name != "debug"
    )


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (
            "flow+diffusion",
            "djepa_b.py:flow\\+diffusion asks for two token losses, diffusion and flow; name one",
        ),
        ("debug+diffusion+no_jepa+flow", "two token losses"),
        (
            "flow+debug+flow",
            'djepa_b.py:flow\\+debug\\+flow names the variant "flow" twice; name it once',
        ),
        ("flow+pixel", 'djepa_b.py has no variant "pixel"; it has diffusion, flow, '),
        ("flow+", 'no variant ""'),
    ],
)
def test_variants_that_cannot_be_are_refused(variant, words):
    with pytest.raises(UsageError, match=words):
        recipe(variant)


# what a variant trains and samples


@pytest.mark.parametrize(
    "variant", [f"{name}+debug" for name in VARIANTS if name != "debug"] + ["pixels+512+debug"]
)
def test_a_variant_traces_from_its_examples_to_its_samples(variant):
    config = recipe(variant)
    experiment = configuration.build(config)
    source = open_data(config.data, experiment.modality)
    examples = [source[index] for index in range(config.batch_size)]
    batch = {
        name: np.stack([example[name] for example in examples]) for name in ("example", "condition")
    }
    state = jax.eval_shape(lambda: init_state(experiment.train))
    after, metrics = jax.eval_shape(make_train_step(experiment.train), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert ("jepa_loss" in metrics) == ("no_jepa" not in variant)
    ids, tokens = (
        np.arange(3, dtype=np.int32),
        (experiment.modality.num_tokens, experiment.modality.token_dim),
    )
    scales = configuration.step_scales(config, experiment.modality.num_tokens)
    sampler = make_sampler(experiment.sample)
    assert jax.eval_shape(sampler, state.params, ids, ids, 0, scales, 1.0).shape == (3, *tokens)
    assert experiment.sample.guided == ("unconditional" not in variant)


def test_debug_draws_the_posterior_as_with_a_cache():
    config = recipe("debug")
    experiment = configuration.build(config)
    example = open_data(config.data, experiment.modality)[3]
    assert example["example"].shape == example["mirror"].shape == (16, 16, 2 * 16)
    np.testing.assert_array_equal(example["mirror"][:, ::-1], example["example"])
    assert example["example"].dtype == config.prepare.dtype
    mean, one, other = (
        experiment.train.tokenize(example["example"][None], key)
        for key in (None, jax.random.key(0), jax.random.key(1))
    )
    assert not np.array_equal(one, other)
    spread = np.exp(-1.0) * config.data.latent_scale
    assert np.std(one - mean) == pytest.approx(spread, rel=0.05)


# The others differ from these in what the test above traces; tests/test_pipeline_proof.py trains
# the recipe as it is.
RUNS = {
    "flow+unconditional+debug": ("latents", (4, 4, 4, 16)),
    "no_jepa+pixels+debug": ("arr_0", (4, 64, 64, 3)),
}


@pytest.mark.parametrize("variant", RUNS)
def test_a_variant_trains_and_samples(variant, tmp_path):
    name, shape = RUNS[variant]
    command = ["djepa_jax", f"--config={CONFIGS}/djepa_b.py:{variant}", f"--workdir={tmp_path}/run"]
    command += [
        f"--config.data.image_size={shape[1]}",
        "--config.num_steps=2",
        "--config.log_every=1",
    ]  # smaller: faster
    assert main(command) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2] and np.isfinite(
        [line["loss"] for line in lines]
    ).all()
    assert lines[-1]["skipped_steps"] == 0
    no_pictures = ["--latents_only"] if name == "latents" else []
    assert main([*command, "--mode=sample", f"--out={tmp_path}/samples", *no_pictures]) == 0
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays[name].shape == shape and np.isfinite(arrays[name]).all()


# what the headers say


SIZES = {"b": 1400, "l": 480, "h": 320}
GPU_BYTES, TPU_BYTES = (
    0.92 * 141e9,
    31 * 2**30,
)  # what launch/train_gpu.sh allows of an H200; a TPU v6e


def header(size: str) -> str:
    return importlib.import_module(f"configs.djepa_{size}").__doc__


@pytest.mark.parametrize("size", SIZES)
def test_work_and_hours_are_what_the_arithmetic_gives(size):
    config, text = load_config(f"djepa_{size}"), header(size)
    spec = configuration.build(config).train
    image = flops.train_image(spec.model, spec.plan, spec.token_loss.noise_multiplicity)
    work = image * config.batch_size * config.num_steps
    assert f"Work: {work / 1e18:,.0f} EFLOP" in text and "40 % of the speed named" in text
    rows = re.findall(
        r"^    (\d+) x ([\w ]+), (\d+) TFLOP/s \(.*\): (\d+) hours$", text, re.MULTILINE
    )
    assert [(int(count), name) for count, name, _, _ in rows] == [
        (8, "H200"),
        (32, "TPU v6e"),
        (32, "TPU v4"),
    ]
    for count, name, speed, hours in rows:
        assert round(work / (0.4 * int(count) * float(speed) * 1e12) / 3600) == int(hours)
        assert float(speed) * 1e12 == flops.peak_flops(name) or (name, speed) == ("H200", "790")


@pytest.mark.parametrize("size", SIZES)
def test_model_length_and_commands_are_the_ones_told(size):
    config, text = load_config(f"djepa_{size}"), header(size)
    state = jax.eval_shape(lambda: init_state(configuration.build(config).train))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert (
        f"{parameters / 1e6:,.0f} M parameters, {SIZES[size]} epochs at batch {config.batch_size}"
        in text
    )
    assert config.num_steps * config.batch_size == SIZES[size] * 625 * 2048
    assert set(re.findall(r"--config=(\S+)", text)) == {
        f"configs/djepa_{size}.py",
        f"configs/djepa_{size}.py:pixels",
    }
    scripts = set(re.findall(r"launch/\w+\.sh", text))
    assert scripts == {"launch/train_gpu.sh", "launch/train_tpu_vm.sh"}
    assert all((CONFIGS.parent / script).is_file() for script in scripts)
    named = re.search(r'Variants \(joined with "\+"\): (.*); see', text)
    assert named and ["diffusion", *named[1].split(", ")] == list(VARIANTS)


def chosen_parts(config, devices: int, limit: float, split: bool) -> tuple[int, bool]:
    """In how many parts training takes a batch, the state whole or split over the devices; and
    whether that fits.
    """
    spec = configuration.build(config).train
    abstract = jax.eval_shape(lambda: init_state(spec))
    shape = (1, devices, 1) if split else (devices, 1, 1)
    shardings = sharding.state_shardings(
        abstract, jax.sharding.AbstractMesh(shape, sharding.MESH_AXES)
    )
    program = next(StepProgram(spec, abstract, shardings, int(limit)).in_parts())
    return program.spec.microbatches, fits(program.plan(), ROOM)


@pytest.mark.parametrize("size", SIZES)
def test_state_and_parts_are_what_training_will_take(size):
    config, text = load_config(f"djepa_{size}"), header(size)
    assert config.microbatches == 0 and "`config.microbatches` chooses itself" in text
    state = jax.eval_shape(lambda: init_state(configuration.build(config).train))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert f"Memory: {held / 2**30:.1f} GiB of state." in text
    found = re.search(
        r"(\d+) parts? on 8 H200 \(92 % of 141 GB each\), (\d+) parts? on 32 TPU v6e \(31 GiB each\)",
        text,
    )
    split = "--config.mesh=(1,-1,1)" in text
    assert chosen_parts(config, 8, GPU_BYTES, split=False) == (int(found[1]), True)
    assert chosen_parts(config, 32, TPU_BYTES, split) == (int(found[2]), True)
    assert not split or not chosen_parts(config, 32, TPU_BYTES, split=False)[1], (
        "splitting the state would not be needed"
    )
