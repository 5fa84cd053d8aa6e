"""Pictures from words: prompts on the command line and in Python, and what grids show."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny import TINY, arrays_of, load_config, tiny_config

import djepa_jax
from djepa_jax.config.convert import ConfigError
from djepa_jax.main import main
from djepa_jax.sampling.generator import Generator
from djepa_jax.sampling.sample_to_npz import numbered
from djepa_jax.training import compile_step

WORDS = [f"digit {index} \u00e9" for index in range(20)]
CONFIG = """
from djepa_jax.config.files import builtin

def get_config():
    config = builtin("digits").get_config()
    config.model.condition = "text"
    config.model.condition_options.update({"length": 12, "width": 8, "num_heads": 1, "depth": 1})
    config.data.num_classes = 0
    config.evaluation.kind = "none"
    return config
"""
FOUR = ("--config.sample.count=4", "--config.sample.batch_size=4")
NONE = "--config.evaluation.kind=none"


def count(state, batch, values):
    """In place of a training step: nothing is learned."""
    assert batch["condition"].shape == (16, 12) and batch["condition"].dtype == np.uint8
    state = dataclasses.replace(state, step=state.step + 1)
    return state, {"loss": 0.0, "bad_streak": state.bad_streak}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(folder / "x.npz", images=images, captions=np.array(WORDS))
    (folder / "words.py").write_text(CONFIG)
    flags = [f"--config={folder / 'words.py'}", *TINY, *FOUR, NONE]
    flags += ["--config.data.source=npz", f"--config.data.path={folder / 'x.npz'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_step, "make_train_step", lambda config: count)
        assert main(["djepa", f"--workdir={folder / 'run'}", *flags]) == 0
    return folder / "run"


def test_grids_show_captions_of_the_data(workdir):
    lines = (workdir / "samples" / "captions.txt").read_text("utf-8").splitlines()
    assert len({*lines}) == 4 and {*lines} <= {*WORDS}
    drawn = arrays_of(workdir / "samples" / "step_00000003.npz")
    told = [bytes(row).rstrip(b"\0").decode() for row in drawn["arr_1"]]
    assert told == lines and (workdir / "samples" / "real.png").exists()


def test_prompts_take_turns(workdir, tmp_path, monkeypatch):
    flags = ["--mode=sample", f"--workdir={workdir}", "--config.sample.prompt=a b| red \u00e9 "]
    assert main(["djepa", *flags, f"--out={tmp_path}/each/"]) == 0
    names = sorted(path.name for path in (tmp_path / "each").glob("*.png"))
    titles = ["a_b", "red_\u00e9"] * 2
    assert names[:4] == [f"{index:06d}_{title}.png" for index, title in enumerate(titles)]
    arrays = arrays_of(tmp_path / "each" / "samples.npz")
    model, prompts = djepa_jax.load(workdir), ["a b", "red \u00e9"] * 2
    encode = model.config.network.conditioner.encode
    told = np.stack([encode(prompt) for prompt in prompts])
    np.testing.assert_array_equal(arrays["arr_1"], told)
    np.testing.assert_array_equal(model.sample(prompts=prompts), arrays["arr_0"])

    def told_to(self, params, conditions, seed):
        return {"conditions": conditions}

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "images", told_to)
        for asked, rows in {"a b": told[:1], ("a b", "red \u00e9"): told[:2]}.items():
            found = model.sample_arrays(prompts=asked)["conditions"]
            np.testing.assert_array_equal(found, rows)
    assert main(["djepa", *flags[:2], f"--out={tmp_path}/none.npz"]) == 0
    assert not arrays_of(tmp_path / "none.npz")["arr_1"].any()


def test_what_a_model_cannot_be_told_is_refused_in_a_line(workdir, capsys):
    flags = ["--mode=sample", f"--workdir={workdir}"]
    for wrong, told in {
        "labels=3": "no classes; it is told by",
        "prompt=a| ": "is no prompt",
        "prompt=thirteen char": "has 13 bytes, the model reads 12",
    }.items():
        assert main(["djepa", *flags, f"--config.sample.{wrong}"]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    model = djepa_jax.load(workdir)
    for wrong in ({"labels": "a"}, {"labels": [3, None]}, {"prompts": []}, {"prompts": [3]}):
        with pytest.raises(ValueError, match="prompt"):
            model.sample(**wrong)
    with pytest.raises(ValueError, match="in place of labels"):
        model.sample(labels=[None], prompts=["a"])


def test_models_of_classes_and_of_embeddings_take_no_prompt():
    with pytest.raises(ConfigError, match="ask for classes by labels"):
        tiny_config("--config.sample.prompt=three")
    with pytest.raises(ConfigError, match="conditions="):
        tiny_config("--config.model.condition=embeddings", "--config.sample.prompt=three")


def test_prompts_are_mixed(tmp_path):
    (tmp_path / "words.py").write_text(CONFIG)
    words = functools.partial(load_config, str(tmp_path / "words.py"), *TINY, *FOUR)
    experiment = words("--config.sample.mix=red:1,\u00e9:3")
    texts, weights = experiment.sample_conditions
    assert texts.shape == (4, 2, 12) and weights.tolist() == [[0.25, 0.75]] * 4
    decode = experiment.network.conditioner.decode
    assert [decode(row) for row in texts[3]] == ["red", "\u00e9"]
    assert experiment.titles(experiment.sample_conditions) == ["red:1,\u00e9:3"] * 4
    with pytest.raises(ConfigError, match="reads 12"):
        words("--config.sample.mix=red:1,a very long prompt:3")


def test_long_prompts_still_name_files():
    assert len(numbered(3, "\u00e9" * 500).encode()) < 250


def test_judges_of_classes_refuse_models_of_texts(workdir, capsys):
    for kind in ("classifier", "small_images"):
        flags = ("--mode=evaluate", f"--config.evaluation.kind={kind}")
        assert main(["djepa", f"--workdir={workdir}", *flags]) == 2
        error = capsys.readouterr().err
        assert "told texts" in error and error.count("\n") == 1
