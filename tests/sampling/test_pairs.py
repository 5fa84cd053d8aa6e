"""Pairs of pictures and sounds: both sampled, and each made for the other."""

import json

import numpy as np
import pytest
from filled import save_model
from pairs import pairs_config, pairs_flags, write_files
from PIL import Image
from scipy.io import wavfile
from tiny import arrays_of

import djepa_jax
from djepa_jax.config.stored import to_stored
from djepa_jax.data.sources import open_data
from djepa_jax.main import main
from djepa_jax.sampling import generator

FEW = ("--config.sample.count=2", "--config.sample.batch_size=2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory) -> str:
    experiment, folder = pairs_config(files, *FEW), tmp_path_factory.mktemp("filled")
    (folder / "config.json").write_text(json.dumps(to_stored(experiment)))
    return save_model(folder, experiment)


@pytest.fixture(scope="module")
def model(workdir) -> djepa_jax.Model:
    return djepa_jax.load(workdir)


def command(workdir, *arguments) -> int:
    return main(["djepa", f"--workdir={workdir}", *map(str, arguments)])


def test_sampling_gives_both(workdir, model, tmp_path):
    found = model.sample([None] * 2)
    assert found["images"].shape == (2, 8, 8, 1) and found["images"].dtype == np.uint8
    assert found["sound"].shape == (2, 512) and found["sound"].dtype == np.float32
    assert command(workdir, "--mode=sample", f"--out={tmp_path}/") == 0
    arrays = arrays_of(tmp_path / "samples.npz")
    np.testing.assert_array_equal(arrays["arr_0"], found["images"])
    for number, picture in enumerate(found["images"]):
        stem = tmp_path / f"{number:06d}_{number}"
        np.testing.assert_array_equal(np.asarray(Image.open(f"{stem}.png")), picture[..., 0])
        assert len(wavfile.read(f"{stem}.wav")[1]) == 512
    assert command(workdir, "--mode=sample", f"--out={tmp_path}/x.wav") == 2


def test_each_is_made_for_the_other(workdir, model, files, tmp_path):
    modality, source = model.config.modality, open_data(pairs_config(files))
    example = source[3]["example"]
    given, other = (modality.named(source[number]["example"][None]) for number in (3, 4))
    for word, kept, new in (("first", "sound", "images"), ("second", "images", "sound")):
        found = model.edit(example, word, [None] * 2, seed=1)
        np.testing.assert_array_equal(found[kept], np.repeat(given[kept], 2, 0))
        assert found[new].dtype == given[new].dtype and (found[new][0] != found[new][1]).any()
        hidden = given | {new: other[new]}  # of no account
        again = model.edit(modality.join(*hidden.values())[0], word, [None] * 2, seed=1)
        np.testing.assert_array_equal(again[new], found[new])
    out, asked = tmp_path / "out", ("--mode=edit", "--mask=first", "--config.sample.seed=1")
    assert command(workdir, *asked, "--source=real:3", f"--out={out}/") == 0
    expected = model.edit(example, "first", [None] * 2, seed=1)
    np.testing.assert_array_equal(arrays_of(out / "samples.npz")["arr_0"], expected["images"])
    np.testing.assert_array_equal(wavfile.read(out / "000001_1.wav")[1], given["sound"][0])
    assert (out / "000001_1.png").exists() and (out / "samples.png").exists()
    wavfile.write(tmp_path / "in.wav", 8000, given["sound"][0])
    assert command(workdir, *asked, f"--source={tmp_path}/in.wav", f"--out={out}.png") == 0
    np.testing.assert_array_equal(arrays_of(f"{out}.npz")["arr_0"], expected["images"])


def test_what_is_not_given_cannot_be_kept(workdir, tmp_path, capsys):
    wavfile.write(tmp_path / "in.wav", 8000, np.full(700, 9, np.int16))
    flags = ("--mode=edit", f"--source={tmp_path}/in.wav")
    for further, said in (
        (("--mask=second",), "pair of images and sound"),
        (("--mask=first", "--keep=0.5"), "without --keep"),
        (("--mask=left", "--source=real:3"), "first, second, all"),
        ((f"--mask={tmp_path}/in.wav", "--source=real:3"), "first, second, all"),
    ):
        assert command(workdir, *flags, *further) == 2
        assert said in capsys.readouterr().err


def test_judges_of_other_examples_say_so(workdir, capsys):
    for kind, said in (("none", "evaluation.kind=say_and_draw"), ("spoken_digits", "are none")):
        assert command(workdir, "--mode=evaluate", f"--config.evaluation.kind={kind}") == 2
        assert said in capsys.readouterr().err


def test_the_flags_of_parts_are_flags(files):
    assert "--config.data.options.second.frames=8" in pairs_flags(files)
    assert pairs_config(files).network.grid == ((2, 2), (2, 2))


def test_an_export_is_the_same_model(workdir, model, files, tmp_path, monkeypatch):
    assert command(workdir, "--mode=export", f"--out={tmp_path / 'out'}") == 0
    exported, expected = djepa_jax.load(tmp_path / "out"), model.sample([None] * 2)
    found = exported.sample([None] * 2)
    assert found.keys() == expected.keys() == {"images", "sound"}
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    example = open_data(pairs_config(files))[3]["example"][None]
    features = exported.encode(example)
    assert features.shape == (1, 8, 16)
    np.testing.assert_array_equal(features, model.encode(example))
    tokens = np.asarray(model.config.modality.tokenize(example))  # [1, N, C]
    steps = iter([0 * tokens, tokens])
    monkeypatch.setattr(generator, "grow", lambda config, params, inputs: steps)
    *_, grown = exported.stream()
    np.testing.assert_array_equal(grown["images"], model.config.modality.named(example)["images"])
    assert grown["sound"].shape == (1, 512)


def test_a_report_shows_pairs(workdir):
    assert command(workdir, "--mode=report") == 0
    with open(f"{workdir}/report.html") as file:
        assert "8 x 8 x 1 and 512" in file.read()
