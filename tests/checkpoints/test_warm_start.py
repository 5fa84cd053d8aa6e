"""--init_from: a training begins with the weights of another run or export, as far as they fit."""

import contextlib
import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util
from tiny import run, tiny_config
from workdirs import EVERY, STEPS, assert_same_arrays

from djepa_jax.checkpoints.checkpointer import Checkpoints
from djepa_jax.checkpoints.restore import find_model, placed_params, warm_start
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.stored import to_stored
from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainState
from djepa_jax.training.initial_state import abstract_state, restore_or_initialise

EXPORTED = pathlib.Path(__file__).parents[1] / "fixtures" / "exported"


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def begin(source, experiment: Experiment) -> tuple[TrainState, TrainState, str]:
    """A state like a fresh one, the one that begins with a source, and what was said."""
    said, rng = [], np.random.default_rng(0)
    fresh = jax.tree.map(
        lambda x: jax.device_put(rng.integers(-9, 9, x.shape).astype(x.dtype), x.sharding),
        abstract_state(experiment, sharding.make_mesh((1, 1, 1), jax.devices()[:1])),
    )
    return fresh, warm_start(str(source), experiment, fresh, said.append), said[0]


def stored(source) -> dict[str, np.ndarray]:
    """The moving average that a source holds."""
    model, mesh = find_model(source), sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    return flat(model.restore(placed_params(model.config, mesh)))


@pytest.mark.parametrize("form", ["orbax", "official", "step"])
def test_the_same_model_begins_where_the_other_ended(form, saved_run):
    """So that a grid before any step is the one of the other; everything else is fresh."""
    source = f"{saved_run}@{EVERY}" if form == "step" else EXPORTED / form
    fresh, state, said = begin(source, find_model(source).config)
    assert find_model(source).step != STEPS
    assert_same_arrays(flat(state.params), stored(source))
    assert_same_arrays(flat(state.ema_params), stored(source))
    assert "100.0% of the parameters" in said and "afresh: nothing" in said
    for name in ("step", "opt_state", "skipped_steps", "bad_streak"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(fresh, name))


TOKENS = {"context_encoder/input_proj", "context_encoder/positions", "predictor/positions"}
TOKENS |= {"denoiser/input_proj", "denoiser/out"}
# what a config has otherwise -> the parts that begin afresh, or have layers that do
CHANGES = {
    "data.num_classes=12": {"context_encoder/class_embedding"},
    "data.patch_size=4": TOKENS,
    "data.modality=image_latents --config.data.image_size=16": {
        "context_encoder/positions",
        "predictor/positions",
    },
    "loss.name=x_prediction": {"denoiser/out"},
    "loss.name=shortcut": set(),
    "model.encoder_depth=3": {"context_encoder/stack[1:]"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_fits_is_taken_and_the_rest_is_named(change, saved_run):
    fresh, state, said = begin(saved_run, tiny_config(*f"--config.{change}".split()))
    source = stored(saved_run)
    assert {*said.rpartition(": ")[2].split(", ")} - {"nothing"} == CHANGES[change]
    assert f"{change.partition('=')[0]}: " in said
    for path, value in flat(state.params).items():
        new = flat(fresh.params)[path]
        taken = source.get(path, new)
        if path.startswith("denoiser/out/") and change.endswith("=x_prediction"):
            taken = new
        if value.shape == taken.shape:
            np.testing.assert_array_equal(value, taken)
        elif "/blocks/" in path:
            np.testing.assert_array_equal(value[:1], taken)
            np.testing.assert_array_equal(value[1:], new[1:])
        else:
            np.testing.assert_array_equal(value, new)
    assert_same_arrays(flat(state.params), flat(state.ema_params))


CONFIG = ("--config.data.patch_size=4", "--config.evaluation.kind=none")


def test_what_it_began_with_is_kept(saved_run, tmp_path):
    """To the bit, without the flag: after an end before the first save, and after one that was
    saved, when the other run may be gone.
    """
    config, said = tiny_config(*CONFIG), []
    abstract = abstract_state(config, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))

    def start(init_from: str = "") -> TrainState:
        with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
            return restore_or_initialise(config, abstract, checkpoints, said.append, init_from)[0]

    states = [start(str(saved_run)), start()]
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(states[1], to_stored(config), examples=0)
    states += [start(), start("runs/gone")]
    assert any("holds step 0 already" in line for line in said)
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
    source, blocks = stored(saved_run), "context_encoder/stack/blocks/attention/qkv/kernel"
    np.testing.assert_array_equal(flat(states[0].params)[blocks], source[blocks])


def test_weights_of_which_nothing_fits_are_refused(saved_run, tmp_path, capsys):
    flags = (*CONFIG, "--config.model.width=24", "--config.model.denoiser_width=8")
    assert run(*flags, f"--workdir={tmp_path / 'run'}", f"--init_from={saved_run}") == 2
    error = capsys.readouterr().err
    assert "no weights that fit" in error and "model.width: 16 -> 24" in error
    assert not {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
