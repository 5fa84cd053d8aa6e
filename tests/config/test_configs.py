"""The shipped configurations: that they build, what their variants mean, what their headers say."""

import itertools
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import CONFIGS, TINY, load_config

from djepa_jax.config.convert import ConfigError, flatten
from djepa_jax.config.files import builtin, builtin_names
from djepa_jax.core import flops
from djepa_jax.core.sampler import SampleInputs, make_sampler
from djepa_jax.core.train_step import make_train_step, state_shapes
from djepa_jax.data.sources import open_data
from djepa_jax.main import main

RECIPES = builtin("recipes")
VARIANTS = RECIPES.VARIANTS
PAIRS = [pair for pair in itertools.combinations(VARIANTS, 2) if pair != RECIPES.LOSSES]
SIZES = {"b": 1400, "l": 480, "h": 320}


def recipe(variant: str):
    return load_config(f"djepa_b:{variant}")


def test_every_shipped_configuration_builds_with_the_same_keys():
    keys = flatten(load_config("default").to_dict()).keys()
    names = [*builtin_names(), "digits:flow", "digits:diffusion", "mnist:windows"]
    names += [f"djepa_{size}:{variant}" for size in "blh" for variant in VARIANTS]
    for name in names:
        assert flatten(load_config(name).to_dict()).keys() == keys


def changes(variant: str) -> dict:
    """The keys that a variant alone changes, with what it sets them to."""
    plain, varied = (flatten(recipe(name).to_dict()) for name in ("diffusion", variant))
    return {key: value for key, value in varied.items() if plain[key] != value}


def test_variants_can_be_joined_in_any_order():
    """Either order gives the same, and two keep what each is for, unless one builds on another."""
    built_on = {("pixels", "512"): "data.image_size", ("pixels", "debug"): "data.source"}
    built_on[("flow", "pixels")] = "loss.options"
    alone = {name: changes(name) for name in VARIANTS}
    for a, b in PAIRS:
        both = recipe(f"{a}+{b}")
        assert both == recipe(f"{b}+{a}"), (a, b)
        values = flatten(both.to_dict())
        for key, value in (alone[a] | alone[b]).items():
            assert key == built_on.get((a, b)) or values[key] == value, (a, b, key)


def test_512_is_twice_the_side_in_latents_and_in_pixels():
    for variant, size, patch, dim in (("512", 32, 1, 16), ("pixels+512", 512, 16, 768)):
        experiment = recipe(variant)
        assert (experiment.data.image_size, experiment.data.patch_size) == (size, patch)
        assert (experiment.network.num_tokens, experiment.network.token_dim) == (1024, dim)


def test_variants_that_cannot_be_are_refused():
    for variant, words in (
        ("flow+diffusion", "two token losses, diffusion and flow"),
        ("flow+debug+flow", '"flow" twice'),
        ("flow+pixel", 'no variant "pixel"; it has diffusion, flow'),
        ("flow+", 'no variant ""'),
    ):
        with pytest.raises(ConfigError, match=words):
            recipe(variant)


@pytest.mark.parametrize("variant", ["flow", "no_jepa", "unconditional", "pixels+512"])
def test_a_variant_traces_from_its_examples_to_its_samples(variant):
    experiment = recipe(f"{variant}+debug")
    source = open_data(experiment)
    examples = [source[index] for index in range(experiment.batch_size)]
    names = ("example", "condition")
    batch = {name: np.stack([example[name] for example in examples]) for name in names}
    state = state_shapes(experiment.train)
    after, metrics = jax.eval_shape(make_train_step(experiment.train), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert ("jepa_loss" in metrics) == ("no_jepa" not in variant)
    ids, network = np.arange(3, dtype=np.int32), experiment.network
    inputs = SampleInputs(ids, ids, 0, experiment.cfg_scales, 1.0)
    tokens = jax.eval_shape(make_sampler(experiment.sampler), state.params, inputs)
    assert tokens.shape == (3, network.num_tokens, network.token_dim)
    assert experiment.sampler.guided == ("unconditional" not in variant)


def test_debug_draws_the_posterior_as_with_a_cache():
    experiment = recipe("debug")
    example = open_data(experiment)[3]
    assert example["example"].shape == example["mirror"].shape == (16, 16, 2 * 16)
    np.testing.assert_array_equal(example["mirror"][:, ::-1], example["example"])
    mean, one, other = (
        experiment.train.modality.tokenize(example["example"][None], key)
        for key in (None, jax.random.key(0), jax.random.key(1))
    )
    assert not np.array_equal(one, other)
    spread = np.exp(-1.0) * experiment.data.latent_scale
    assert np.std(one - mean) == pytest.approx(spread, rel=0.05)


def test_a_recipe_trains_and_samples(tmp_path):
    """The others differ in what is traced above; tests/data/test_pipeline_proof.py has latents."""
    config = f"--config={CONFIGS}/djepa_b.py:no_jepa+pixels+debug"
    command = ["djepa", config, f"--workdir={tmp_path}/run", "--config.data.image_size=64"]
    command += ["--config.num_steps=2", "--config.log_every=1"]
    command += ["--config.sample.num_ar_steps=3", "--config.sample.num_denoise_steps=3"]
    assert main(command) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in metrics)
    assert main([*command, "--mode=sample", f"--out={tmp_path}/samples"]) == 0
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 64, 64, 3)


def test_own_pictures_of_any_size_train_and_sample(tmp_path):
    """A folder per class; the path, and the number of classes, are all that must be given."""
    rng = np.random.default_rng(0)
    for index, (name, size) in enumerate((("cat", (90, 64)), ("dog", (30, 200))) * 4):
        (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    command = ["djepa", "--config=own_pictures", f"--workdir={tmp_path}/run"]
    command += [f"--config.data.path={tmp_path}/pictures", "--config.data.num_classes=2"]
    command += [*TINY, "--config.evaluation.kind=auto", "--config.sample_every=2"]
    assert main(command) == 0
    samples = tmp_path / "run" / "samples"
    assert {"real.png", "step_00000002.npz"} <= {path.name for path in samples.iterdir()}
    with np.load(samples / "step_00000002.npz") as arrays:
        assert arrays["arr_0"].shape == (10, 64, 64, 3) and set(arrays["arr_1"]) == {0, 1}


def test_own_pictures_may_be_grey():
    flags = ("--config.data.channels=1", "--config.data.options.cutoff=0.3")
    experiment = load_config("own_pictures", *flags)
    assert experiment.modality.cutoff == 0.3
    grey = experiment.modality
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1), np.uint8)
    tokens = grey.tokenize(pictures)
    assert tokens.shape[1:] == (experiment.network.num_tokens, experiment.network.token_dim)
    assert grey.export(tokens)["images"].shape == pictures.shape


@pytest.mark.parametrize("size", SIZES)
def test_headers_say_what_the_arithmetic_gives(size):
    experiment, text = load_config(f"djepa_{size}"), builtin(f"djepa_{size}").__doc__
    config = experiment.train
    multiplicity = config.token_loss.noise_multiplicity
    image = flops.train_image(config.model, config.masking, multiplicity)
    work = image * experiment.batch_size * experiment.num_steps
    assert f"Work: {work / 1e18:,.0f} EFLOP" in text and "40 % of the speed named" in text
    pattern = r"^    (\d+) x ([\w ]+), (\d+) TFLOP/s \(.*\): (\d+) hours$"
    rows = re.findall(pattern, text, re.MULTILINE)
    assert [name for _, name, _, _ in rows] == ["H200", "TPU v6e", "TPU v4"]
    for count, name, speed, hours in rows:
        assert round(work / (0.4 * int(count) * float(speed) * 1e12) / 3600) == int(hours)
        assert float(speed) * 1e12 == flops.peak_flops(name) or (name, speed) == ("H200", "790")
    state = state_shapes(config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    epochs = f"{SIZES[size]} epochs at batch {experiment.batch_size}"
    assert f"{parameters / 1e6:,.0f} M parameters, {epochs}" in text
    assert experiment.num_steps * experiment.batch_size == SIZES[size] * 625 * 2048
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert f"Memory: {held / 2**30:.1f} GiB of state" in text
    named = re.search(r'Variants \(joined with "\+"\): (.*); see', text)
    assert named and ["diffusion", *named[1].split(", ")] == list(VARIANTS)
