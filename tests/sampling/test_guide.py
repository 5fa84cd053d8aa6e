"""`sample.guide`: a weaker model to lead away from, by commands and from Python."""

import numpy as np
import pytest
from filled import save_model
from tiny import arrays_of, run, tiny_config

import djepa_jax
from djepa_jax.config.convert import ConfigError

SCALE = "--config.sample.guide_scale=3.0"


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> dict[str, str]:
    """A model, a weaker one, and one of another shape."""
    folder, config = tmp_path_factory.mktemp("guide"), tiny_config()
    wide = config.updated({"model.width": 32})
    kinds = {"model": (config, 1), "weaker": (config, 2), "wide": (wide, 1)}
    return {name: save_model(folder / name, *kind) for name, kind in kinds.items()}


def sampled(workdirs, tmp_path, *flags: str) -> np.ndarray:
    target = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
    assert run("--mode=sample", f"--workdir={workdirs['model']}", f"--out={target}", *flags) == 0
    return arrays_of(target)["arr_0"].astype(int)


def test_a_command_leads_away_from_the_weaker_model(workdirs, tmp_path):
    """And from itself nowhere: then the scale is without effect, but for a level of rounding."""
    guide = f"--config.sample.guide={workdirs['weaker']}"
    alone = sampled(workdirs, tmp_path)
    away = sampled(workdirs, tmp_path, SCALE, guide)
    step = sampled(workdirs, tmp_path, SCALE, f"{guide}/checkpoints/7")
    itself = sampled(workdirs, tmp_path, SCALE, f"--config.sample.guide={workdirs['model']}")
    assert np.abs(itself - alone).max() <= 1
    assert np.abs(away - alone).max() > 50
    np.testing.assert_array_equal(step, away)
    python = djepa_jax.load(workdirs["model"]).sample(
        count_labels(len(away)), guide_scale=3.0, guide=workdirs["weaker"]
    )
    np.testing.assert_array_equal(python, away)


def count_labels(count: int) -> list[int]:
    return [i % 10 for i in range(count)]


@pytest.mark.parametrize(
    "guide, told", [("nowhere", "nowhere.* does not exist"), ("wide", "model.width: 32 -> 16")]
)
def test_what_cannot_guide_is_refused(guide, told, workdirs):
    with pytest.raises(ConfigError, match=f"config.sample.guide: .*{told}"):
        djepa_jax.load(workdirs["model"]).sample(3, guide=workdirs.get(guide, guide))


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--mode=sample", "--config.sample.reuse_unconditional=2"], ["reuse_unconditional", "1"]),
        (["--mode=export", "--format=stablehlo"], ["guide"]),
        (["--config.num_steps=9"], ["sample.guide", "exist"]),
    ],
)
def test_commands_refuse_before_they_write(flags, told, tmp_path, workdirs, capsys):
    guide = str(tmp_path / "nowhere")
    workdir = workdirs["model"] if "--mode" in flags[0] else str(tmp_path / "new")
    out = [f"--out={tmp_path / 'out'}"] if "--mode" in flags[0] else []
    assert run(*flags, *out, f"--workdir={workdir}", f"--config.sample.guide={guide}") != 0
    error = capsys.readouterr().err
    assert all(word in error for word in told)
    assert not list(tmp_path.iterdir())
