"""From recordings to a model, and from the model to wav files."""

import dataclasses
import wave

import numpy as np
import pytest
from scipy.io import wavfile
from tiny import TINY, arrays_of

import djepa_jax
from djepa_jax.main import main
from djepa_jax.sampling import generator
from djepa_jax.training import compile_step


def count(state, batch, values):
    """In place of a training step: nothing is learned."""
    state = dataclasses.replace(state, step=state.step + 1)
    return state, {"loss": 0.0, "bad_streak": state.bad_streak}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sound"), np.random.default_rng(0)
    samples = rng.integers(-9000, 9000, 20 * 700).astype(np.int16)
    labels = {"digit": np.arange(20) % 10, "speaker": np.arange(20) // 10}
    np.savez(folder / "x.npz", samples=samples, offsets=np.arange(21) * 700, **labels)
    flags = {
        "data.source": "npz",
        "data.path": folder / "x.npz",
        "data.options.frames": 16,
        "data.options.patch_frames": 4,  # 4 windows of 256 samples along time
        "loss.name": "flow_matching",  # without training, samples are their noise, and differ
        "model.condition_options.second_classes": 2,
        "sample.count": 4,
        "sample.batch_size": 4,
        "evaluation.kind": "none",
    }
    flags = [f"--config.{key}={value}" for key, value in flags.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_step, "make_train_step", lambda config: count)
        run = f"--workdir={folder / 'run'}"
        assert main(["djepa", "--config=spoken_digits", run, *TINY, *flags]) == 0
    return folder / "run"


def test_training_draws_spectrograms_and_keeps_the_sound(workdir):
    arrays = arrays_of(workdir / "samples" / "step_00000003.npz")
    assert arrays["sound"].shape == (4, 1024) and arrays["log_mel"].shape == (4, 40, 16)
    assert arrays["arr_1"].tolist() == [0, 1, 2, 3] and arrays["condition_1"].tolist() == [0] * 4
    assert (workdir / "samples" / "step_00000003.png").exists()


def test_samples_become_wav_files(workdir, tmp_path):
    flags = ["--mode=sample", f"--workdir={workdir}", "--config.sample.labels=3"]
    assert main(["djepa", *flags, f"--out={tmp_path / 'three.wav'}"]) == 0
    arrays = arrays_of(tmp_path / "three.npz")
    assert arrays["arr_1"].tolist() == [3] * 4 and arrays["condition_1"].tolist() == [0, 1, 0, 1]
    with wave.open(str(tmp_path / "three.wav")) as file:
        assert file.getframerate() == 8000 and file.getnframes() == 4 * 1024
        values = np.frombuffer(file.readframes(4 * 1024), np.int16)
    np.testing.assert_allclose(values / 32767, arrays["sound"].ravel(), atol=1e-4)
    assert main(["djepa", *flags, f"--out={tmp_path / 'each'}/"]) == 0
    names = sorted(path.name for path in (tmp_path / "each").glob("*.wav"))
    assert names == [f"{i:06d}_3_{i % 2}.wav" for i in range(4)]


def test_the_python_interface_gives_sound(workdir):
    model = djepa_jax.load(workdir)
    labels = [3, None, "7", 0]
    sound = model.sample(labels)
    assert sound.shape == (4, 1024) and sound.dtype == np.float32 and np.abs(sound).max() <= 1
    pairs = (np.array([3, 10, 7, 0], np.int32), np.array([0, 1, 0, 1], np.int32))
    np.testing.assert_array_equal(model.sample(conditions=pairs), sound)


def test_pictures_are_no_sound(tmp_path, capsys):
    flags = ["--mode=sample", "--config=digits", f"--workdir={tmp_path}"]
    assert main(["djepa", *flags, "--out=x.wav"]) == 2
    assert "makes no sound" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(workdir):
    return djepa_jax.load(workdir)


WAVE = np.random.default_rng(1).integers(-9000, 9000, 1024).astype(np.int16)
GAP = np.zeros(1024, bool)
GAP[300:400] = True  # in the second window


def test_samples_outside_a_gap_stay_to_the_bit(model):
    for mask in (GAP, ~GAP):
        edited = model.edit(WAVE, mask, [3, 3, 7], seed=1)
        assert edited.shape == (3, 1024) and edited.dtype == np.int16
        np.testing.assert_array_equal(edited[:, ~mask], np.stack([WAVE[~mask]] * 3))
        assert (edited[0] != edited[1]).any(), "two of one class differ"
    np.testing.assert_array_equal(model.edit(WAVE, "middle:0", 3), WAVE[None])
    everything = model.edit(WAVE, "all", [3, 4, 3], seed=5)
    expected = model.sample([3, 4, 3], seed=5) * 32767
    np.testing.assert_allclose(everything, expected, atol=1)


def test_a_filled_gap_depends_on_its_seed_and_number_alone(model):
    many = model.edit(WAVE, GAP, [1, 2, 3, 4], seed=2)
    np.testing.assert_array_equal(model.edit(WAVE, GAP, [1, 2, 3], seed=2), many[:3])
    assert (model.edit(WAVE, GAP, [1, 2, 3], seed=3)[0] != many[0]).any()
    for wrong in (WAVE[:512], WAVE / 32768):
        with pytest.raises(ValueError, match="expected int16"):
            model.edit(wrong, GAP, 3)


def test_the_command_fills_a_gap_of_a_recording(workdir, model, tmp_path, capsys):
    source, out = tmp_path / "in.wav", tmp_path / "out.wav"
    wavfile.write(source, 8000, np.concatenate([WAVE, WAVE]))  # longer than the model's
    flags = ["djepa", "--mode=edit", f"--workdir={workdir}", f"--out={out}"]
    flags += ["--config.sample.labels=3", "--config.sample.count=3"]
    mask = "--mask=seconds:0.0375-0.05"  # from sample 300 to 400
    assert main([*flags, f"--source={source}", mask]) == 0
    expected = model.edit(WAVE, GAP, conditions=(np.full(3, 3), np.array([0, 1, 0])))
    assert arrays_of(tmp_path / "out.npz")["sound"].dtype == np.int16
    np.testing.assert_array_equal(arrays_of(tmp_path / "out.npz")["sound"], expected)
    np.testing.assert_array_equal(wavfile.read(out)[1], expected.ravel())
    assert (tmp_path / "out.png").exists()
    for words in (["--source=none.wav", mask], [f"--source={source}", "--mask=seconds:0.1-0.2"]):
        assert main([*flags, *words]) == 2
        assert "none.wav" in (said := capsys.readouterr().err) or "0 to 0.128" in said


def test_an_export_is_the_same_model(workdir, model, tmp_path, monkeypatch):
    out = f"--out={tmp_path / 'out'}"
    assert main(["djepa", "--mode=export", f"--workdir={workdir}", out]) == 0
    exported = djepa_jax.load(tmp_path / "out")
    sound = model.sample([3, 4, 7, 0])
    np.testing.assert_array_equal(exported.sample([3, 4, 7, 0]), sound)
    features = exported.encode(WAVE[None], 3)
    assert features.shape == (1, 8, 16)  # 2 windows of bands by 4 of frames
    np.testing.assert_array_equal(features, model.encode(WAVE[None], 3))
    tokens = np.asarray(model.config.modality.tokenize(WAVE[None]))  # [1, N, C]
    steps = iter([0 * tokens, tokens])
    monkeypatch.setattr(generator, "grow", lambda config, params, inputs: steps)
    grown = list(exported.stream(3))
    assert [step.shape for step in grown] == [(1, 1024)] * 2
    expected = model.config.modality.export(tokens)["sound"]
    np.testing.assert_allclose(grown[1], expected, atol=1e-4)
