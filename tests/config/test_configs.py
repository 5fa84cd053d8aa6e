"""Every shipped configuration builds, and its checks are reachable; tests/test_recipes.py has the
ImageNet recipes.
"""

import pathlib

import pytest
from djepa_jax.config.experiment.settings import Settings
from tiny import CONFIGS, load_config, tiny_config

from configs.recipes import VARIANTS
from djepa_jax.config.experiment import experiment as configuration

SHIPPED = [
    "default",
    "djepa_b",
    "djepa_l",
    "djepa_h",
    *(f"djepa_{size}:{variant}" for size in "blh" for variant in VARIANTS),
    "djepa_b:flow+no_jepa+debug",
    "djepa_h:unconditional+pixels",
    "digits",
    "digits:flow",
    "digits:diffusion",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_build(name):
    experiment = load_config(name)
    assert experiment.train.model.num_tokens == experiment.modality.num_tokens


def test_no_shipped_config_is_forgotten():
    files = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__", "recipes"}
    assert files == {name.partition(":")[0] for name in SHIPPED}


def test_every_config_has_exactly_the_keys_of_the_default():
    keys = configuration.flatten(load_config("default").to_dict()).keys()
    for name in SHIPPED:
        assert configuration.flatten(load_config(name).to_dict()).keys() == keys


def test_named_size_can_be_overridden_in_part():
    config = load_config("djepa_b")
    config.model.encoder_depth = 3
    size = configuration.resolve_size(config.model)
    assert size["encoder_depth"] == 3 and size["width"] == 768


def test_differences_name_key_and_both_values():
    a, b = (
        configuration.resolved(tiny_config()),
        configuration.resolved(tiny_config("--config.model.width=32", "--config.seed=5")),
    )
    assert configuration.differences(a, b) == ["model.width: 16 -> 32", "seed: 0 -> 5"]
    assert configuration.differences(a, b, configuration.MODEL_KEYS) == ["model.width: 16 -> 32"]
    assert configuration.differences(a, a) == []


def test_labels_repeat_until_there_are_enough():
    digits = [str(digit) for digit in range(10)]
    assert configuration.parse_labels("3, 7", digits, 5) == (3, 7, 3, 7, 3)
    assert configuration.parse_labels("all", digits[:3], 4) == (0, 1, 2, 0)


@pytest.fixture
def number_words(tmp_path) -> tuple[str, list[str]]:
    """A file with the digits' names, and the names."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    path = tmp_path / "number words.txt"
    path.write_text("\n".join(names))
    return str(path), names


def test_samples_may_be_asked_for_by_name(number_words):
    path, names = number_words
    flags = [
        f"--config.data.class_names={path}",
        "--config.sample.labels=Three, sev,0",
        "--config.sample.count=4",
    ]
    experiment = tiny_config(*flags)
    assert experiment.class_names == tuple(names)
    assert experiment.sample_labels == (3, 7, 0, 3)
    with pytest.raises(
        ConfigError,
        match="config.sample.labels is 'e,ten'; \"e\" may be any of 0 zero",
    ):
        tiny_config(flags[0], "--config.sample.labels=e,ten")


def test_the_names_in_a_file_are_stored_with_the_weights(number_words):
    path, names = number_words
    config = tiny_config(f"--config.data.class_names={path}")
    stored = Settings(config.to_dict())
    pathlib.Path(path).unlink()
    assert stored.data.class_names == names
    assert stored.class_names == tuple(names)
    assert config.data.class_names == path, "the config itself stays as it was"


@pytest.mark.parametrize("spec", ["", "imagenet"])
def test_names_that_come_with_the_package_are_stored_by_their_word(spec):
    config = tiny_config(f"--config.data.class_names={spec}", "--config.data.num_classes=1000")
    assert config.to_dict()["data"]["class_names"] == spec


def test_wrong_class_names_are_a_config_error(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r'class_names is "/no/such.txt", which is neither "imagenet" nor',
    ):
        tiny_config("--config.data.class_names=/no/such.txt")
    with pytest.raises(ConfigError, match=r'"imagenet" with 1000 names, data.num_classes is 10'):
        tiny_config("--config.data.class_names=imagenet")


def test_mask_group_of_zero_means_the_whole_batch():
    experiment = tiny_config("--config.loss.mask_group=0")
    assert experiment.train.masking.group_size == 16
