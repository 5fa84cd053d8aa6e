"""Speech judged by the words that a recogniser hears."""

import types

import numpy as np
import pytest

from djepa_jax.core.modalities.audio import AudioMel
from djepa_jax.core.models.text import Text
from djepa_jax.data.arrays import load_digits
from djepa_jax.data.captions import Captioned
from djepa_jax.data.sounds import Sounds
from djepa_jax.evaluation.metrics import METRICS, speech
from djepa_jax.evaluation.metrics.speech import words_heard

SMALL = AudioMel(frames=32, patch_frames=8)
TEXTS = ["Once upon a time", "the end."]


class Ear:
    """In place of the recogniser: loud sounds say the first text, soft ones that it misses."""

    def start_utt(self):
        pass

    def process_raw(self, samples, full_utt):
        loud = np.abs(np.frombuffer(samples, "<i2").astype(int)).max() > 8000
        self._said = "once a a time" if loud else "the"

    def end_utt(self):
        pass

    def hyp(self):
        return types.SimpleNamespace(hypstr=self._said)


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setattr(speech, "open_recogniser", Ear)
    tone = np.sin(np.arange(*SMALL.example_shape))
    waves = np.stack([20_000 * tone, 3_000 * tone]).astype(np.int16)
    sounds = Sounds(waves, [np.zeros(2, int)], SMALL, [])
    reader = Text(2, length=20, width=8, num_heads=2)
    return Captioned(sounds, TEXTS, reader, 0.0, "here")


def test_words_count_once_and_in_their_order(source):
    loud = np.full(SMALL.example_shape, 0.5)
    texts = ["once upon a time", "Time, once!", "a a", "nothing"]
    assert words_heard([loud] * 4, texts, SMALL.rate).tolist() == [0.75, 0.5, 1, 0]


def test_samples_stand_beside_recordings_and_those_made_of_tokens(source):
    metric, other = (METRICS["speech"].from_data(source) for _ in range(2))
    soft, loud = source.source.images[::-1] / 2**15
    for each, sound, text in ((metric, loud, TEXTS[0]), (other, soft, TEXTS[0])):
        each.update({"sound": sound[None]}, source.reader.encode(text)[None])
    metric.merge(other)
    figures = metric.result()
    assert figures["words"] == pytest.approx(0.75 / 2)
    assert figures["words_low"] <= figures["words"] <= figures["words_high"]
    assert figures["words_real"] == figures["words_codec"] == 0.75, "of the caption asked for"


def test_other_data_are_refused(source):
    for other in (load_digits(), source.source):
        with pytest.raises(ValueError, match="recordings with captions"):
            METRICS["speech"].from_data(other)
