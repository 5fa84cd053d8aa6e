"""Sound as tokens: the mel matrix, the round trip, and the way back to a wave."""

import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djepa_jax.core.modalities import MODALITIES
from djepa_jax.core.modalities.audio import AudioMel, cut_frames, hann, join_frames, mel_filters

SMALL = AudioMel(frames=32, patch_frames=8)


def sine(frequency: float, modality: AudioMel = SMALL) -> np.ndarray:
    time = np.arange(*modality.example_shape) / modality.rate
    return np.round(8000 * np.sin(2 * np.pi * frequency * time)).astype(np.int16)


def voice() -> np.ndarray:
    """Harmonics of a voice that rises from 120 to 180 Hz and fades."""
    time = np.arange(*SMALL.example_shape) / SMALL.rate
    phase = 2 * np.pi * np.cumsum(np.linspace(120, 180, len(time))) / SMALL.rate
    tones = sum(np.sin(k * phase) / k for k in range(1, 12))
    return np.round(4000 * tones * np.linspace(1, 0.2, len(time))).astype(np.int16)


def spectra(waves) -> np.ndarray:
    return np.abs(np.fft.rfft(np.asarray(cut_frames(jnp.asarray(waves, jnp.float32), 256, 64))))


def test_mel_bands_are_triangles_that_add_up_to_one():
    filters, frequencies = mel_filters(8000, 256, 40), np.arange(129) * 8000 / 256
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 42) / 2595) - 1)
    inside = (frequencies >= corners[1]) & (frequencies <= corners[-2])
    np.testing.assert_allclose(filters[:, inside].sum(0), 1, atol=1e-5)
    middle = np.interp(frequencies, corners[20:23], [0, 1, 0], left=0, right=0)
    np.testing.assert_allclose(filters[20], middle, atol=1e-6)


def test_1000_hz_are_almost_1000_mel():
    assert 2595 * np.log10(1 + 1000 / 700) == pytest.approx(1000, abs=0.1)
    band = np.argmax(mel_filters(8000, 256, 40)[:, 32])  # the frequency of number 32 is 1000 Hz
    assert band == round(1000 / (2595 * np.log10(1 + 4000 / 700)) * 41) - 1


@pytest.mark.parametrize("frequency", [250, 1000, 3000])
def test_a_sine_lands_in_its_band(frequency):
    log_mel = np.asarray(SMALL.detokenize(SMALL.tokenize(sine(frequency)[None])))[0]
    loudest = log_mel.argmax(0)[4:-4]  # away from the ends
    assert set(loudest) == {int(SMALL.filters[:, round(frequency / 8000 * 256)].argmax())}


def test_tokens_are_windows_of_the_spectrogram_and_give_it_back():
    tokens = jax.jit(SMALL.tokenize)(voice()[None])
    assert tokens.shape == (1, 5 * 4, SMALL.token_dim) and tokens.dtype == jnp.float32
    mel = spectra(voice()) @ SMALL.filters.T  # [T, M]
    log_mel = np.asarray(SMALL.detokenize(tokens))[0]
    np.testing.assert_allclose(log_mel, np.log(np.maximum(mel, SMALL.floor)).T, atol=1e-3)
    window = (log_mel[8:16, 16:24] - SMALL.mean) / SMALL.deviation
    np.testing.assert_allclose(tokens[0, 1 * 4 + 2], window.ravel(), atol=1e-5)


def test_frames_are_joined_to_the_wave_that_they_were_cut_from():
    waves = np.random.default_rng(0).standard_normal((2, 1024)).astype(np.float32)
    frames = cut_frames(waves, 256, 64)
    assert frames.shape == (2, 16, 256)
    np.testing.assert_allclose(frames[0, 4], waves[0, 160:416] * hann(256), atol=1e-6)
    np.testing.assert_allclose(join_frames(frames, 64), waves, atol=1e-4)


def test_sound_comes_back_with_almost_the_same_spectrum():
    arrays = SMALL.export(SMALL.tokenize(np.stack([voice(), sine(440)])))
    found, wanted = spectra(arrays["sound"]), spectra(np.stack([voice(), sine(440)]) / 32768)
    error = np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    assert error.max() < 0.35
    again = SMALL.tokenize(np.round(np.asarray(arrays["sound"]) * 32767).astype(np.int16))
    difference = np.asarray(SMALL.detokenize(again) - arrays["log_mel"])
    assert np.median(np.abs(difference)) < 0.2, "of the logarithm"


def test_sound_does_not_depend_on_what_is_beside_it_and_stays_finite():
    tokens = np.array(SMALL.tokenize(np.stack([voice(), sine(440)])))
    alone = SMALL.export(tokens[:1])["sound"]
    tokens[1] = 1e6
    both = np.asarray(SMALL.export(tokens)["sound"])
    np.testing.assert_allclose(both[0], alone[0], atol=1e-3)
    assert np.isfinite(both).all() and np.abs(both).max() <= 1


def test_silence_stays_silent():
    silent = SMALL.export(SMALL.tokenize(np.zeros((1, *SMALL.example_shape), np.int16)))
    assert np.abs(silent["sound"]).max() < 1e-5, "a third of a level of 16 bits"


def test_spectrograms_have_low_frequencies_at_the_bottom_and_wavs_the_rate(tmp_path):
    arrays = {
        name: np.asarray(a) for name, a in SMALL.export(SMALL.tokenize(sine(250)[None])).items()
    }
    picture = SMALL.preview(arrays)
    assert picture.shape == (1, 40, 32, 1) and picture.dtype == np.uint8
    assert picture[0, 30:].max() > picture[0, :10].max()
    SMALL.save(arrays, 0, tmp_path / "tone")
    with wave.open(str(tmp_path / "tone.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8000, 1, 2)
        values = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    np.testing.assert_allclose(values / 32767, arrays["sound"][0], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patch_mels": 7}, "choose patches that divide"),
        ({"hop": 100}, "twice the hop"),
        ({"mels": 120}, "fewer mels"),
        ({"deviation": 0.0}, "data.options.deviation is 0.0"),
        ({"frames": 0}, "data.options.frames is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        AudioMel(**options)


def test_other_waves_are_refused():
    SMALL.check_example(voice())
    for wrong in (voice()[1:], voice().astype(np.float32)):
        with pytest.raises(ValueError, match="expects int16 waves"):
            SMALL.check_example(wrong)
    assert MODALITIES["audio_mel"] is AudioMel


def test_a_token_shows_the_samples_of_its_frames_in_all_bands():
    places = np.zeros((2, 2048), bool)
    places[0, [512, 1023]] = places[1, 511:513] = True  # windows are of 512 samples
    shown = SMALL.tokens_at(places).reshape(2, 5, 4)
    assert shown[:, 0].tolist() == [[False, True, False, False], [True, True, False, False]]
    assert (shown == shown[:, :1]).all()


def test_no_click_is_heard_where_kept_sound_meets_new():
    wave, mask = np.full((1, 2048), 8000, np.int16), np.zeros((1, 2048), bool)
    mask[0, 500:900] = mask[0, 1000:1010] = mask[0, 1900:] = True
    given = np.where(mask, np.int16(-32000), wave)  # what is hidden is not heard
    for level in (0, -0.25):
        joined = SMALL.put_back(given, {"sound": np.full((1, 2048), level)}, mask)
        np.testing.assert_array_equal(joined[~mask], wave[~mask])
        steps = np.abs(np.diff(joined[0].astype(int)))
        assert steps[np.r_[480:920, 1880:2047]].max() < 300, "over a hop of 64"
        assert (joined[0, 564:836] == round(level * 32767)).all()
