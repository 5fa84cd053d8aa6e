"""Settings: nested dicts with attribute access that need no config library."""

import copy
import dataclasses
import pickle

import pytest
from djepa_jax.config.experiment.settings import Settings
from tiny import tiny_config

from djepa_jax.config.experiment import experiment as configuration

PLAIN = {"seed": 1, "mesh": [-1, 1, 1], "model": {"width": 16, "inner": {"deep": "x"}}}


@pytest.fixture
def settings() -> Settings:
    return Settings(PLAIN)


def test_values_are_read_as_attributes_or_items(settings):
    assert settings.model.width == settings["model"]["width"] == settings["model"].width == 16
    assert settings.model.inner.deep == "x" and settings == PLAIN


def test_an_unknown_attribute_names_those_that_exist(settings):
    with pytest.raises(AttributeError, match='no key "widht"; there are width, inner'):
        _ = settings.model.widht
    assert not hasattr(settings, "nothing")


def test_attributes_are_read_only(settings):
    with pytest.raises(AttributeError, match=r"read only; make changed ones with updated\(seed="):
        settings.seed = 2
    assert settings.seed == 1


def test_updated_changes_a_copy(settings):
    changed = settings.updated({"seed": 5, "model.inner.deep": "y"})
    assert changed == PLAIN | {"seed": 5, "model": {"width": 16, "inner": {"deep": "y"}}}
    assert isinstance(changed, Settings) and isinstance(changed.model.inner, Settings)
    changed.mesh.append(0)
    assert settings == PLAIN, "the first settings share nothing with the copy"
    assert settings.updated({}) == settings


@pytest.mark.parametrize(
    "name",
    ["sed", "model.widht", "modell.width", "seed.width", "model.inner.deep.er", "", "model."],
)
def test_updated_refuses_names_that_do_not_exist(settings, name):
    with pytest.raises(KeyError) as error:
        settings.updated({name: 1})
    assert error.value.args == (name,)


def test_settings_share_nothing_with_what_they_are_made_of():
    plain = copy.deepcopy(PLAIN)
    settings = Settings(plain)
    plain["model"]["width"] = 32
    plain["mesh"].append(0)
    assert settings == PLAIN


def test_to_dict_gives_plain_dicts_and_back(settings):
    plain = settings.to_dict()
    assert plain == PLAIN and type(plain) is dict and type(plain["model"]["inner"]) is dict
    assert Settings(plain) == settings
    plain["model"]["width"] = 32
    assert settings.model.width == 16


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), Settings]
)
def test_settings_can_be_copied(settings, again):
    other = again(settings)
    assert type(other) is Settings and other == settings and other.model.inner.deep == "x"


def test_a_stored_configuration_builds_what_the_config_file_builds():
    """What a checkpoint stores, read without ml_collections, means the same; and it can be stored
    again.
    """
    config = tiny_config()
    stored = Settings(config.to_dict())
    built = [c for c in (stored, config)]
    first, second = (
        dataclasses.replace(b, train=dataclasses.replace(b.train, tokenize=None)) for b in built
    )  # a method
    assert first == second
    assert stored.to_dict() == stored
