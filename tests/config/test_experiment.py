"""The frozen configuration: bounds, types, changed copies, and what is built from it."""

import dataclasses
import math
import pathlib

import numpy as np
import pytest
from tiny import load_config, tiny_config

from djepa_jax.config.convert import ConfigError, flatten
from djepa_jax.core.models.conditioning import Classes, Nothing

# dotted key, value -> words of the error, beside the key
REFUSED = [
    ("num_steps", 0, "at least 1"),
    ("seed", 2**31, "between 0"),
    ("mesh", (1, 2), "three"),
    ("compute_dtype", "float16", "bfloat16, float32"),
    ("model.size", "XL", "custom"),
    ("model.width", 131, "num_heads, 2"),
    ("model.mlp_ratio", 1e-3, "hidden unit"),
    ("model.condition", "smell", "class_pair, classes"),
    ("model.condition_options", {"smell": 1}, "smell"),
    ("loss.name", "gan", "diffusion, flow_matching"),
    ("loss.mask_ratio_min", 0.0, "above 0 and at most 1"),
    ("loss.mask_group", 3, "batch_size, 16"),
    ("loss.token_weight", -1.0, "from 0 on"),
    ("data.modality", "smell", "image_latents, image_pixels"),
    ("data.unconditional", True, "num_classes is 10"),
    ("data.patch_size", 3, "image_size 8"),
    ("autoencoder.sha256", "xyz", "64 hexadecimal"),
    ("sample.order", "spiral", "random, raster"),
    ("sample.sampler", "ddim", "euler, heun"),
    ("sample.num_ar_steps", 17, "number of tokens, 16"),
    ("sample.num_denoise_steps", 1, "at least 2"),
    ("sample.labels", "3,10", "0 to 9"),
    ("sample.reuse_unconditional", 0, "at least 1"),
    ("evaluation.count", 1, "at least 2"),
    ("grad_accumulation_steps", 3, "packs of 16"),
    ("seed", True, "a whole number"),
    ("sample.labels", 3, "text"),
    ("loss.options", {"clip_x0": 1.0}, "it has time_shift"),
    ("data.options", {"smell": 1}, "smell"),
    ("loss.options", {"time_shift": 0.0}, "above 0"),
]


@pytest.fixture(scope="module")
def experiment():
    return tiny_config()


def test_a_value_that_cannot_work_is_named(experiment):
    for key, value, words in REFUSED:
        with pytest.raises(ConfigError) as caught:
            experiment.updated({key: value})
        text, name = str(caught.value), key.rpartition(".")[2]
        assert (name in text or key == "loss.options") and words in text, (key, value)


def test_no_number_may_be_nan_infinite_or_negative(experiment):
    numbers = [k for k, v in flatten(experiment.to_dict()).items() if isinstance(v, float)]
    assert len(numbers) > 10
    for value in (math.nan, math.inf, -math.inf, -1.0):
        for key in numbers:
            if (key, value) != ("data.latent_shift", -1.0):
                with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
                    experiment.updated({key: value})


def test_keys_that_are_unknown_or_missing_are_named(experiment):
    with pytest.raises(ConfigError, match=r"optimizer.learning_rat; .* optimizer.learning_rate"):
        experiment.updated({"optimizer.learning_rat": 1.0})
    with pytest.raises(ConfigError, match=r"smell.x"):
        experiment.updated({"smell.x": 1.0})
    values = experiment.to_dict()
    del values["sample"]["seed"]
    with pytest.raises(ConfigError, match=r"lacks the key sample.seed"):
        type(experiment).from_dict(values)


def test_parts_to_train_are_parts_of_the_model(experiment):
    some = experiment.updated({"optimizer.parts": "denoiser, predictor"})
    assert some.train.optimizer.trained == ("denoiser", "predictor")
    for wrong in ("denoisers", "denoiser,all", ""):
        with pytest.raises(ConfigError, match=r"optimizer.parts is.*context_encoder, predictor"):
            experiment.updated({"optimizer.parts": wrong})


def test_it_is_frozen_and_goes_through_plain_dicts(experiment):
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.sample.seed = 1
    assert type(experiment).from_dict(experiment.to_dict()) == experiment
    changed = experiment.updated({"sample.seed": 7, "sample.cfg_scale": 2})
    assert (changed.sample.seed, changed.sample.cfg_scale, experiment.sample.seed) == (7, 2.0, 0)


def test_a_named_size_can_be_overridden_in_part():
    experiment = load_config("djepa_b", "--config.model.encoder_depth=3")
    assert experiment.network.encoder_depth == 3 and experiment.network.width == 768


def test_what_is_built_follows_from_the_values(experiment):
    assert experiment.network.grid == (4, 4) and experiment.network.conditioner == Classes(10)
    assert experiment.train.masking.batch_size == 16
    assert experiment.updated({"loss.mask_group": 0}).train.masking.group_size == 16
    assert not experiment.updated({"sample.cfg_scale": 1.0}).sampler.guided
    nothing = experiment.updated({"model.condition": "nothing"})
    assert nothing.network.conditioner == Nothing()
    assert experiment.updated({"loss.options": {"time_shift": 2.0}}).token_loss.time_shift == 2.0
    assert not load_config("djepa_b").has_decoder
    assert load_config("djepa_b", "--config.autoencoder.path=x").has_decoder


def test_labels_repeat_until_there_are_enough(experiment):
    some = experiment.updated({"sample.labels": "3, 7", "sample.count": 5})
    assert some.sample_conditions.tolist() == [3, 7, 3, 7, 3]
    every = experiment.updated({"sample.count": 12})
    assert every.sample_conditions.tolist() == [*range(10), 0, 1]


def test_names_of_classes_come_from_a_file_and_travel(tmp_path):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    path = tmp_path / "number words.txt"
    path.write_text("\n".join(names))
    flags = (f"--config.data.class_names={path}", "--config.sample.count=4")
    experiment = tiny_config(*flags, "--config.sample.labels=Three, sev,0")
    assert experiment.class_names == tuple(names)
    assert experiment.sample_conditions.tolist() == [3, 7, 0, 3]
    assert experiment.titles(np.array([3, 0])) == ["three", "zero"]
    with pytest.raises(ConfigError, match=r"\"e\" may be any of 0 zero"):
        tiny_config(*flags, "--config.sample.labels=e,ten")
    stored = experiment.to_dict()
    pathlib.Path(path).unlink()
    assert type(experiment).from_dict(stored).class_names == tuple(names)


def test_data_say_what_the_config_leaves_open(experiment):
    changes = {"data.num_classes": 0, "data.path": "x", "sample.labels": "pear, 0"}
    waiting = experiment.updated(changes)
    with pytest.raises(ConfigError, match="pear"):
        waiting.with_classes(3, None)
    known = waiting.with_classes(3, ["apple", "fig", "pear"])
    assert known.data.num_classes == known.network.conditioner.num_classes == 3
    assert known.sample_conditions.tolist()[:4] == [2, 0, 2, 0]
    assert known.with_classes(7, ["a"] * 7) == known, "what is known stays"
    assert type(known).from_dict(known.to_dict()) == known
    assert waiting.completed_by(known) == known
    commas = waiting.updated({"sample.labels": "fig, dried"}).with_classes(2, ["x", "fig, dried"])
    assert set(commas.sample_conditions.tolist()) == {1}
    single = {"data.num_classes": 0, "data.unconditional": True}
    assert experiment.updated(single).with_classes(1, None).data.num_classes == 1


def test_names_that_come_with_the_package_are_stored_by_their_word(experiment):
    named = {"data.class_names": "imagenet", "data.num_classes": 1000}
    assert experiment.updated(named).to_dict()["data"]["class_names"] == "imagenet"
    with pytest.raises(ConfigError, match="1000 names, data.num_classes is 10"):
        experiment.updated({"data.class_names": "imagenet"})
