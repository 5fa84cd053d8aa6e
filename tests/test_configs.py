"""Every shipped configuration builds, and its checks are reachable."""

import pytest
from tiny import CONFIGS, load_config, tiny_config

from djepa_jax import config as configuration

SHIPPED = [
    "default",
    "djepa_b",
    "djepa_b:flow",
    "djepa_l",
    "djepa_l:flow",
    "djepa_h",
    "djepa_h:flow",
    "digits",
    "digits:flow",
    "digits:diffusion",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_build(name):
    experiment = configuration.build(load_config(name))
    assert experiment.train.model.num_tokens == experiment.modality.num_tokens


def test_no_shipped_config_is_forgotten():
    files = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"}
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
    assert configuration.parse_labels("3, 7", 10, 5) == (3, 7, 3, 7, 3)
    assert configuration.parse_labels("all", 3, 4) == (0, 1, 2, 0)


def test_mask_group_of_zero_means_the_whole_batch():
    experiment = configuration.build(tiny_config("--config.loss.mask_group=0"))
    assert experiment.train.plan.group_size == 16
