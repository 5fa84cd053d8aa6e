"""`sample.guide`: a weaker model to lead away from, by commands and from Python."""

import numpy as np
import pytest
from filled import save_model
from tiny import arrays_of, run, tiny_config

import djepa_jax
from djepa_jax.config.convert import ConfigError
from djepa_jax.core import sharding
from djepa_jax.evaluation.acceleration import ways
from djepa_jax.evaluation.evaluate import subject
from djepa_jax.evaluation.search import with_settings
from djepa_jax.sampling.generator import Generator
from djepa_jax.serving.studio import load_model

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
        [i % 10 for i in range(len(away))], guide_scale=3.0, guide=workdirs["weaker"]
    )
    np.testing.assert_array_equal(python, away)


def test_steps_without_guidance_run_the_model_alone(workdirs, tmp_path):
    """Also beside the other guidance, and when all steps are such."""
    guide = SCALE, f"--config.sample.guide={workdirs['weaker']}"
    steps = "--config.sample.num_denoise_steps=5"

    def drawn(cfg_scale: float, start: float) -> np.ndarray:
        flags = (
            f"--config.sample.cfg_scale={cfg_scale}",
            f"--config.sample.cfg_denoise_start={start}",
        )
        return sampled(workdirs, tmp_path, *guide, steps, *flags)

    alone = sampled(workdirs, tmp_path, steps, "--config.sample.cfg_scale=1")
    away, late = drawn(1.0, 0.0), drawn(1.0, 0.5)
    assert np.abs(late - alone).max() > 20 and np.abs(late - away).max() > 20
    assert all(np.abs(drawn(scale, 0.99) - alone).max() <= 1 for scale in (1.0, 2.0))
    both = drawn(2.0, 0.5)
    assert np.abs(both - late).max() > 20 and np.abs(both - alone).max() > 20


def test_ways_to_spend_less_are_ways_with_a_guide(workdirs):
    """Every row can be drawn; what a guide rules out is not among them."""
    flags = f"--config.sample.guide={workdirs['weaker']}", "--config.sample.cfg_scale=2.0"
    experiment = tiny_config(*flags)
    rows = ways(experiment)
    assert all(with_settings(experiment, row).sampler.halves == 3 for row in rows)
    assert {row["reuse_unconditional"] for row in rows} == {1}
    assert 0.5 in {row["cfg_start"] for row in rows}


def test_a_record_tells_guides_apart_at_one_place(workdirs, tmp_path):
    """By the weights, since what lies at a path may change."""
    config, found = tiny_config(f"--config.sample.guide={tmp_path / 'guide'}"), []
    for seed in (1, 2):
        save_model(tmp_path / "guide", tiny_config(), seed, step=seed)
        generator = Generator(config, sharding.make_mesh((-1, 1, 1)))
        params = generator.guide.params
        found.append(subject(config, generator, params, None, 7)["guide_norm"])
    assert found[0] != found[1]


def test_exports_do_not_name_a_path_of_this_machine(workdirs, tmp_path):
    out, guide = tmp_path / "out", f"--config.sample.guide={workdirs['weaker']}"
    assert run("--mode=export", f"--workdir={workdirs['model']}", f"--out={out}", guide) == 0
    assert djepa_jax.load(out).config.sample.guide == ""


def test_the_page_refuses_before_it_is_served(workdirs, tmp_path):
    with pytest.raises(ConfigError, match="config.sample.guide"):
        load_model(tiny_config(f"--config.sample.guide={tmp_path}"), workdirs["model"])


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
