"""What the page says of a job: the command and the lines of Python that make the same."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
from growing import GrowingModel, grow, make_studio
from tiny import load_config

import djepa_jax
from djepa_jax.config.stored import to_stored
from djepa_jax.main import parse
from djepa_jax.sampling import model as model_module
from djepa_jax.serving.studio import Studio, decoded, png_address

SETTINGS = {"seed": 3, "cfg_scale": 2.5, "order": "raster", "count": 4, "num_ar_steps": 8}


@pytest.mark.parametrize("labels", ["all", "7"])
@pytest.mark.parametrize("condition", ["classes", "nothing"])
def test_the_same_can_be_made_without_the_page(labels, condition, monkeypatch, tmp_path):
    workdir = tmp_path / "a run"
    workdir.mkdir()
    flags = ["--config.data.num_classes=10", f"--config.model.condition={condition}"]
    studio = make_studio(monkeypatch, *flags, workdir=str(workdir))
    (workdir / "config.json").write_text(json.dumps(to_stored(studio.stored)))
    job = studio.check({"settings": SETTINGS | ({"labels": labels} if studio.asks_for else {})})
    events = []
    studio.make(job, events.append)
    words = shlex.split(events[-1]["command"])
    words = words[next(i for i, word in enumerate(words) if word.startswith("--")) :]
    values, experiment = parse(["djepa", *words])
    assert values.mode == "sample" and values.workdir == str(workdir)
    assert dataclasses.asdict(experiment.sample) == dataclasses.asdict(job.experiment.sample)
    model = GrowingModel(*flags).watched(lambda config, inputs, steps: list(steps)[-1])
    monkeypatch.setattr(djepa_jax, "load", lambda path: model)
    names = {}
    exec(events[-1]["python"], names)
    assert names["pictures"].shape == (4, 8, 8, 1)
    shown = [studio.address(picture) for picture in names["pictures"]]
    assert shown == [sample["files"]["png"] for sample in events[-1]["done"]]


def test_names_that_several_classes_have_are_asked_for_by_number(monkeypatch):
    model, names = GrowingModel(), ("crane", "crane", *"cdefghij")
    model.config = model.config.updated({"data.class_names": names})
    studio = Studio(model, model.config, "runs/digits")
    classes = studio.describe()["classes"]
    assert classes[1:4] == [("0", "crane"), ("1", "crane"), ("c", "c")]
    for index, (word, _) in enumerate(classes[1:]):
        job = studio.check({"settings": {"labels": word, "count": 1}})
        np.testing.assert_array_equal(job.experiment.sample_conditions, [index])


def test_clips_are_painted_on_as_animations_and_sounds_are_not(monkeypatch):
    monkeypatch.setattr(model_module, "grow", grow)
    model = GrowingModel()
    changes = {"data.modality": "video_pixels", "data.options": {"num_frames": 4}}
    model.config = model.config.updated(changes)
    studio = Studio(model, model.config, "runs/clips")
    clip = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    address = studio.address(clip)
    assert address.startswith("data:image/webp") and studio.describe()["painted"] == (8, 8)
    job = studio.check({"picture": address, "mask": "0" * 32 + "1" * 32})
    np.testing.assert_array_equal(job.picture, clip)
    events = []
    studio.make(job, events.append)
    results = [studio.read_picture(decoded(x["files"]["webp"])) for x in events[-1]["done"]]
    assert len(results) == 4 and "gif" in events[-1]["done"][0]["files"]
    for result in results:
        np.testing.assert_array_equal(result[:, :4], clip[:, :4])
        assert (result[:, 4:] != clip[:, 4:]).any()
    with pytest.raises(ValueError, match="clips have 4"):
        studio.check({"picture": png_address(clip[0]), "mask": "1" * 64})

    model.config = load_config("spoken_digits", "--config.data.num_classes=10")
    studio = Studio(model, model.config, "runs/sounds")
    assert studio.describe()["painted"] is None
    with pytest.raises(ValueError, match="no pictures"):
        studio.check({"picture": address, "mask": "1" * 64})
