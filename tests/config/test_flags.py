"""From words on a command line, files by name and JSON to an Experiment."""

import json

import pytest
from ml_collections import ConfigDict
from tiny import CONFIGS

from djepa_jax.config import files
from djepa_jax.config.convert import ConfigError, flatten
from djepa_jax.config.flags import read_config
from djepa_jax.config.stored import to_stored


def read_json(tmp_path, values, *overrides):
    file = tmp_path / "config.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return read_config(None, str(file), overrides)


def test_built_in_configurations_have_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # nothing depends on where one stands
    digits = read_config("digits", None, [])
    assert read_config("configs/digits.py", None, []) == digits
    assert read_config(str(CONFIGS / "digits.py"), None, []) == digits
    assert read_config("digits:diffusion", None, []).loss.name == "diffusion"
    assert read_config("configs/digits.py:diffusion", None, []).loss.name == "diffusion"
    names = {"default", "digits", "mnist", "spoken_digits", "moving_digits", "own_pictures"}
    names |= {"emoji", "speech", "say_and_draw", "djepa_b", "djepa_l", "djepa_h"}
    assert names == set(files.builtin_names())


def test_a_file_of_ones_own_wins_over_a_built_in_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").write_text(
        "from djepa_jax.config.files import builtin\n\n\ndef get_config():\n"
        '    config = builtin("digits").get_config()\n    config.seed = 7\n    return config\n'
    )
    assert read_config("digits.py", None, []).seed == 7


SPECS = [  # what is named as the configuration, words of the error
    ("smell", "digits, djepa_b"),
    ("no/such.py", "no/such.py"),
    ("digits:vae", "flow and diff"),
]
OVERRIDES = [  # what is typed, words of the error
    ("--config.optimizer.lr=1", "did you mean optimizer.learning_rate"),
    ("--config.optimiser.beta1=1", "did you mean optimizer.beta1"),
    ("--config.num_step=5", "did you mean num_steps"),
    ("--config.microbatches=2", "grad_accumulation_steps"),
    ("--config.sample.clip_x0=1", "loss.options.clip_x0"),
    ("--config.loss.options.clip_x0=1", "it has time_shift"),
    ("--config.num_steps=many", "many"),
    ("--config.num_steps=1.5", "1.5"),
    ("--config.mesh=3", "mesh"),
]


def test_a_name_or_an_override_that_cannot_be_says_what_would_do():
    for spec, words in SPECS:
        with pytest.raises(ConfigError, match=words):
            read_config(spec, None, [])
    for word, words in OVERRIDES:
        with pytest.raises(ConfigError, match=words):
            read_config("digits", None, [word])


def test_options_of_a_loss_can_be_set_whether_the_file_names_them_or_not():
    assert read_config("digits", None, []).token_loss.time_shift == 1.0
    changed = read_config("digits", None, ["--config.loss.options.time_shift=2"])
    assert changed.token_loss.time_shift == 2.0
    other = ["--config.loss.name=diffusion", "--config.sample.sampler=ddim"]
    assert read_config("digits", None, other).token_loss.clip_x0 == 0.0
    assert read_config("digits:diffusion", None, []).token_loss.clip_x0 == 1.0


def test_json_is_laid_over_the_defaults(tmp_path):
    default = read_config("default", None, [])
    given = {"seed": 3, "model": {"size": "B"}, "data.path": "x", "mesh": [2, -1, 1]}
    experiment = read_json(tmp_path, given, "--config.seed=4")
    expected = {"seed": 4, "model.size": "B", "data.path": "x", "mesh": (2, -1, 1)}
    assert experiment == default.updated(expected)


def test_json_of_a_workdir_and_of_an_export_will_do(tmp_path):
    experiment = read_config("digits", None, ["--config.seed=9"])
    assert read_json(tmp_path, to_stored(experiment)) == experiment
    record = {"kind": "djepa_jax export", "config": to_stored(experiment)}
    assert read_json(tmp_path, record, "--config.seed=1").seed == 1
    larger = read_json(
        tmp_path, to_stored(read_config("djepa_b", None, [])), "--config.model.size=L"
    )
    assert larger.network.width == 1024


BAD_JSON = [
    ("{", "Expecting"),
    ("[1]", "must hold an object"),
    ('{"seed": NaN}', "NaN is not a number"),
    ('{"seed": "3"}', "seed is '3'; it must be a whole number"),
    ('{"seed": 1.5}', "seed is 1.5"),
    ('{"model": 3}', "model"),
    ('{"model": {"widht": 3}}', "did you mean model.width"),
    ('{"sead": 3}', "did you mean seed"),
    ('{"mesh": [1, 2.5, 1]}', "mesh"),
    ('{"a":' * 100_000, "recursion|Expecting|nested"),
    (" " * (2**20 + 1), "more than 1,048,576 bytes"),
]


def test_json_that_cannot_be_used_and_two_configurations_are_one_error(tmp_path):
    for text, words in BAD_JSON:
        with pytest.raises(ConfigError, match=words):
            read_json(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(None, str(tmp_path / "none.json"), [])
    with pytest.raises(ConfigError, match="both given"):
        read_config("digits", "x.json", [])
    with pytest.raises(ConfigError, match="needs a --config"):
        read_config(None, None, ["--config.seed=1"])


def test_the_defaults_name_every_key_with_a_comment():
    """Every key of the frozen groups is set, and explained, in configs/default.py."""
    text = (CONFIGS / "default.py").read_text()
    config = files.builtin("default").get_config()
    assert isinstance(config, ConfigDict)
    for key in flatten(config.to_dict()):
        assert f".{key.rpartition('.')[2]} = " in text


def test_options_of_another_modality_do_not_stay():
    """But those that both have."""
    config = read_config("own_pictures", None, ["--config.data.modality=image_pixels"])
    assert config.data.options == {}
    for flag in ("options.cutoff=0.6", "modality=image_lapped", "modality=video_lapped"):
        config = read_config("own_pictures", None, [f"--config.data.{flag}"])
        assert {"cutoff", "colour_cutoff"} == config.data.options.keys()
