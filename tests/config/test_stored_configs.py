"""Configurations beside weights: of this version, of the first ones, and how they are compared."""

import json
import pathlib

import pytest
from tiny import load_config, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.stored import differences, from_stored, model_differences, to_stored

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "workdirs"


def test_what_is_stored_comes_back():
    for name in ("digits", "djepa_l", "djepa_b:pixels"):
        experiment = load_config(name)
        stored = json.loads(json.dumps(to_stored(experiment)))
        assert stored["format"] == 3 and from_stored(stored) == experiment


def test_configurations_of_the_first_versions_are_read():
    for version in ("v1", "v2"):
        stored = json.loads((GOLDEN / version / "config.json").read_text())
        assert "format" not in stored and "time_shift" in stored["sample"]
        experiment = from_stored(stored)
        assert experiment.loss.options == {"time_shift": 1.0}
        assert experiment.network.width == 16 and experiment.network.conditioner.num_classes == 10
        assert from_stored(to_stored(experiment)) == experiment


def test_a_later_key_may_be_absent():
    """Of any format; then it is what was done before there was one."""
    experiment = tiny_config()
    stored = to_stored(experiment)
    del stored["model"]["attention"]
    assert from_stored(stored) == from_stored(stored | {"format": 2}) == experiment
    assert experiment.model.attention == "auto"


def test_a_named_size_of_the_first_version_stays_a_name():
    """Its numbers were written out; then --config.model.size would change nothing."""
    stored = to_stored(load_config("djepa_b"))
    old = {key: value for key, value in stored.items() if key != "format"}
    old["model"] = old["model"] | {"width": 768, "num_heads": 12}
    old["sample"] = old["sample"] | {"clip_x0": 1.0, "time_shift": 1.0}
    experiment = from_stored(old)
    assert experiment.model.width == 0 and experiment.network.width == 768
    assert experiment.loss.options == {"clip_x0": 1.0}


def test_what_cannot_be_read_is_one_error():
    for damage in ({"format": 4}, {"sample": {}}, {"loss": None}, {"model": 7}):
        stored = json.loads((GOLDEN / "v2" / "config.json").read_text()) | damage
        with pytest.raises(ConfigError):
            from_stored(stored)


def test_differences_name_key_and_both_values():
    one = tiny_config()
    other = tiny_config("--config.model.width=32", "--config.seed=5")
    assert differences(one, other) == ["model.width: 16 -> 32", "seed: 0 -> 5"]
    assert model_differences(one, other) == ["model.width: 16 -> 32"]
    assert differences(one, one) == model_differences(one, one) == []
    other = one.updated({"loss.jepa_weight": 0.0, "model.condition": "nothing"})
    keys = [line.partition(":")[0] for line in model_differences(one, other)]
    assert keys == ["loss.jepa_weight above 0", "model.condition"]
