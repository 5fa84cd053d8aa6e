"""Recordings as a source: npz files, folders of wav files, and what is done to both."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from scipy.io import wavfile
from tiny import load_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.modalities.audio import AudioMel
from djepa_jax.data.records import DataError
from djepa_jax.data.sounds import fit, read_wav
from djepa_jax.data.sources import open_data, open_source, open_training_data

OPTIONS = ("--config.data.options.frames=32", "--config.sample.num_ar_steps=2")
LENGTH = 32 * 64


def tone(length: int, size: float = 8000.0, rate: int = 8000) -> np.ndarray:
    """A sine of 500 Hz whose ends are loud."""
    return np.round(size * np.cos(np.pi * 1000 / rate * np.arange(length))).astype(np.int16)


def spoken(source: str, path, *flags: str):
    place = (f"--config.data.source={source}", f"--config.data.path={path}")
    second = ("--config.model.condition_options.second_classes=2",)
    return load_config("spoken_digits", *OPTIONS, *place, *second, *flags)


def write_npz(path, lengths=(900, 2048, 3000), **changes):
    count = len(lengths)
    arrays = {
        "samples": np.concatenate([tone(length) for length in lengths]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "digit": np.arange(count, dtype=np.uint8),
        "speaker": np.array([5, 2, 5], np.uint8)[:count],
    }
    np.savez(path, **{name: a for name, a in (arrays | changes).items() if a is not None})
    return path


def write_wavs(root):
    for name, length in (("0_eva_1", 900), ("3_eva_0", 2048), ("1_adam_0", 3000)):
        root.mkdir(exist_ok=True)
        wavfile.write(root / f"{name}.wav", 8000, tone(length))
    return root


def test_an_npz_file_gives_waves_of_one_length_with_two_labels(tmp_path):
    source = open_data(spoken("npz", write_npz(tmp_path / "x.npz")))
    assert (
        len(source) == 3 and source[0]["condition"] == (0, 1) and source[1]["condition"] == (1, 0)
    )
    assert all(item["example"].shape == (LENGTH,) for item in source)
    np.testing.assert_array_equal(source[0]["example"][:900], tone(900))
    assert not source[0]["example"][900:].any()
    np.testing.assert_array_equal(source[2]["example"], tone(3000)[:LENGTH])
    assert "1 cut at their end" in source.notes[0] and "1 filled up" in source.notes[0]


def test_one_label_is_enough_for_classes(tmp_path):
    values = spoken("npz", write_npz(tmp_path / "x.npz"), "--config.data.labels=digit").to_dict()
    values["model"] |= {"condition": "classes", "condition_options": {}}
    source = open_data(Experiment.from_dict(values))
    assert [item["condition"] for item in source] == [0, 1, 2]


def test_file_names_tell_labels_and_their_names(tmp_path):
    experiment = spoken("folder", write_wavs(tmp_path / "x"), "--config.data.num_classes=0")
    source, experiment = open_training_data(experiment)
    assert experiment.class_names == ("0", "1", "3")
    assert [item["condition"] for item in source] == [(0, 1), (1, 0), (2, 1)]
    first, second = experiment.sample_conditions
    assert first[:4].tolist() == [0, 1, 2, 0] and second[:4].tolist() == [0, 0, 0, 1]
    assert experiment.titles((first, second))[:4] == ["0/0", "1/0", "3/0", "0/1"]
    asked = experiment.updated({"sample.labels": "3", "sample.count": 3})
    assert asked.titles(asked.sample_conditions) == ["3/0", "3/1", "3/0"]


def test_folders_are_classes(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        wavfile.write(tmp_path / name / "a.wav", 8000, tone(500))
    data = load_config("spoken_digits", "--config.data.num_classes=0", "--config.data.labels=").data
    source = open_source("data", _at(data, tmp_path), _at(data, tmp_path), AudioMel())
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [0, 1]
    wavfile.write(tmp_path / "lost.wav", 8000, tone(500))
    with pytest.raises(DataError, match=r'beside the folders of classes.*"lost.wav"'):
        open_source("data", _at(data, tmp_path), _at(data, tmp_path), AudioMel())


def _at(data, path):
    return dataclasses.replace(data, path=str(path))


def test_pictures_may_have_two_labels(tmp_path):
    images = np.zeros((4, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, a=[0, 1, 0, 1], b=[7, 7, 9, 9])
    values = load_config("digits").to_dict()
    values["model"] |= {"condition": "class_pair", "condition_options": {"second_classes": 2}}
    values["data"] |= {"source": "npz", "path": str(tmp_path / "x.npz"), "labels": "a,b"}
    source = open_data(Experiment.from_dict(values))
    assert [item["condition"] for item in source] == [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_wav_files_of_all_kinds_are_read_alike(tmp_path, kind):
    wave = tone(400).astype(np.float64) / 2**15
    scale = {"u": 2**7, "i": 2 ** (8 * np.dtype(kind).itemsize - 1), "f": 1}[np.dtype(kind).kind]
    values = np.round(wave * scale) + 128 * (kind is np.uint8) if scale > 1 else wave
    wavfile.write(tmp_path / "x.wav", 8000, values.astype(kind))
    rate, found = read_wav(tmp_path / "x.wav")
    assert rate == 8000
    np.testing.assert_allclose(found, tone(400), atol=129 if kind is np.uint8 else 1)


def test_channels_rates_and_silence_are_brought_to_one_form():
    done, loud = Counter(), tone(4410, rate=44100).astype(np.float64)
    silence = np.full(44100, 60.0)
    stereo = np.stack([np.concatenate([silence, loud, silence])] * 2, axis=1)
    wave = fit(44100, stereo, 8000, done)
    assert len(wave) == pytest.approx(800, abs=40)  # a filter rings at both ends
    spectrum = np.abs(np.fft.rfft(wave[100:740]))
    assert spectrum.argmax() == 640 * 500 // 8000
    assert spectrum.max() / 320 == pytest.approx(8000, rel=0.02)
    assert {"averaged over channels", "resampled", "rid of silence at the ends"} == {*+done}
    assert len(fit(8000, np.zeros(50, np.int16), 8000, done)) == 50, "silent all along"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"offsets": np.array([0, 900, 800, 1000])}, "offsets out of order"),
        ({"offsets": np.array([0, 900, 2948, 9999])}, "offsets out of order"),
        ({"offsets": np.array([0, 900])}, r"labels of shapes"),
        ({"offsets": np.array([0, 9, 9, 10], np.uint64)}, "offsets out of order"),
        ({"samples": np.zeros(9999, np.float32)}, "int16 samples"),
        ({"speaker": None}, "digit and speaker .config.data.labels"),
        ({"rate": np.array(3)}, "3 samples a second"),
        ({"speaker": np.array([4, 4, 4])}, "1 second labels.*second_classes is 2; set it to 1"),
        ({"digit": np.array([0, 10, 1])}, "of class 10; labels must be"),
    ],
)
def test_npz_files_that_cannot_be_used_are_refused_in_one_line(tmp_path, changes, told):
    with pytest.raises(DataError, match=told) as caught:
        open_data(spoken("npz", write_npz(tmp_path / "x.npz", **changes)))
    assert "\n" not in str(caught.value)


def test_wav_files_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    bad = write_wavs(tmp_path / "x") / "4_adam_9.wav"
    nan = np.array([0.1, np.nan], np.float32)
    for write, told in (
        (lambda: bad.write_bytes(b"RIFF and nothing"), "no wav file that can be read"),
        (lambda: bad.write_bytes(b""), "no wav file that can be read"),
        (lambda: wavfile.write(bad, 8000, nan), "not finite"),
        (lambda: wavfile.write(bad, 8000, np.zeros(0, np.int16)), "no sound"),
        (lambda: wavfile.write(bad, 5, tone(9)), "5 samples a second"),
    ):
        write()
        with pytest.raises(DataError, match=f"4_adam_9.wav.*{told}") as caught:
            open_data(spoken("folder", tmp_path / "x", "--config.data.num_classes=4"))
        assert "\n" not in str(caught.value)
    bad.rename(tmp_path / "x" / "4.wav")
    with pytest.raises(DataError, match=r'"4.wav", whose name does not say digit, speaker'):
        open_data(spoken("folder", tmp_path / "x"))
    with pytest.raises(DataError, match="no folder with wav files"):
        open_data(spoken("folder", tmp_path / "none"))


def test_labels_and_model_must_agree(tmp_path):
    path = write_npz(tmp_path / "x.npz")
    with pytest.raises(DataError, match='data.labels is "digit", and model.condition takes 2'):
        open_data(spoken("npz", path, "--config.data.labels=digit"))
    with pytest.raises(DataError, match="random_flip is for pictures"):
        open_data(spoken("npz", path, "--config.data.random_flip=True"))
    with pytest.raises(DataError, match="for npz files and sounds"):
        open_data(load_config("digits", "--config.data.labels=a"))
    with pytest.raises(ConfigError, match="second_classes is 0; it must be at least 1"):
        spoken("npz", path, "--config.model.condition_options.second_classes=0")
