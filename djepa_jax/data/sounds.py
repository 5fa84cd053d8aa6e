"""Recordings as a source: wav files, or an npz file with many, as waves of one length in memory."""

import itertools
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from djepa_jax.config.class_names import in_order
from djepa_jax.data.arrays import ArraySource
from djepa_jax.data.records import DataError, counted, match_classes

QUIET = 0.01  # of the largest value of a recording: what is below it at both ends is cut off
RATES = (1_000, 400_000)  # samples a second that a file may have


class Sounds(ArraySource):
    """Waves int16 `[n, S]`, one or two labels of each, and what was done to the recordings."""

    def __init__(self, waves, labels: Sequence[np.ndarray], modality, notes: list[str], files=()):
        super().__init__(waves, *labels)
        self.modality, self.notes, self._files = modality, notes, files

    def key(self, index: int) -> str:
        """The name of a file below its folder; the number of a recording of an npz file."""
        return self._files[index].as_posix() if self._files else str(index)


def load_sounds(path: str, where: str, names: Sequence[str], modality) -> Sounds:
    """Recordings of an npz file: int16 `samples` end to end, of which number i begins at
    `offsets[i]` and ends at `offsets[i + 1]`; labels by name; and `rate`, if it is another.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            samples, offsets = file["samples"], file["offsets"]
            labels = [file[name] for name in names]
            rate = int(file["rate"]) if "rate" in file else modality.rate
    except Exception as error:  # damaged files make numpy fail in ways that nobody has listed
        raise DataError(
            f'{where} is no npz file with arrays "samples", "offsets" and '
            f"{' and '.join(names)} (config.data.labels): {error}"
        ) from error
    count = len(offsets) - 1 if offsets.ndim == 1 else 0
    whole = offsets.dtype.kind in "iu" and all(each.dtype.kind in "iu" for each in labels)
    shapes = {each.shape for each in labels}
    if samples.dtype != np.int16 or samples.ndim != 1 or not whole or shapes != {(count,)}:
        raise DataError(
            f"{where} holds {samples.dtype} samples {samples.shape}, offsets {offsets.shape} and "
            f"labels of shapes {sorted(shapes)}; it needs int16 samples [m], whole offsets "
            "[n + 1], and whole numbers as labels [n]."
        )
    offsets = offsets.astype(np.int64)
    if not count or (np.diff(offsets) < 1).any() or offsets[0] < 0 or offsets[-1] > len(samples):
        raise DataError(
            f"{where} has offsets out of order; each must be larger than the one before, from 0 to "
            f"at most the number of samples, {len(samples)}."
        )
    _check_rate(rate, where)
    recordings = ((rate, samples[a:b]) for a, b in itertools.pairwise(offsets))
    numbers = [labels[0], *(np.unique(each, return_inverse=True)[1] for each in labels[1:])]
    return _fitted(recordings, numbers, where, modality)


def open_wavs(path: str, where: str, names: Sequence[str], class_names, num_classes, modality):
    """All wav files below a folder.

    The folder inside it that a file lies in is its class; with `names`, the parts of the file's own
    name are its labels, as many as there are names: 7_jackson_32.wav.
    """
    root = pathlib.Path(path)
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() == ".wav")
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise DataError(f"{where} is no folder with wav files in it; name one.")
    below = [file.relative_to(root) for file in files]
    said = [_said(file, names, where) for file in below]
    kinds = [in_order(set(each)) for each in zip(*said, strict=True)]
    if "" in kinds[0] and len(kinds[0]) > 1:
        raise DataError(
            f"{where} holds wav files beside the folders of classes, such as "
            f'"{files[said.index(("",))].name}"; move them into folders.'
        )
    numbers = [
        np.array([kind.index(label) for label in each], np.int64)
        for kind, each in zip(kinds, zip(*said, strict=True), strict=True)
    ]
    own, _ = match_classes(tuple(kinds[0]), num_classes, class_names, where)
    sounds = _fitted((read_wav(file) for file in files), numbers, where, modality, below)
    sounds.class_names = own
    return sounds


def _said(file: pathlib.Path, names: Sequence[str], where: str) -> tuple[str, ...]:
    if not names:
        return (file.parts[0] if len(file.parts) > 1 else "",)
    parts = file.stem.split("_")
    if len(parts) < len(names):
        raise DataError(
            f'{where} holds "{file}", whose name does not say {", ".join(names)} '
            f"(config.data.labels); call it {'_'.join(names)}_NUMBER.wav."
        )
    return tuple(parts[: len(names)])


def read_wav(path: pathlib.Path) -> tuple[int, np.ndarray]:
    """Rate and values of a wav file on the scale of int16, `[S]` or `[S, channels]`."""
    from scipy.io import wavfile  # half a second of import that other sources do not need

    try:
        rate, values = wavfile.read(path, mmap=False)
    except Exception as error:  # damaged files make it fail in ways that nobody has listed
        raise DataError(f"{path} is no wav file that can be read: {error}; remove it.") from error
    _check_rate(rate, str(path))
    if not values.size or not np.isfinite(values).all():
        what = "values that are not finite" if values.size else "no sound"
        raise DataError(f"{path} holds {what}; remove it.")
    if values.dtype == np.uint8:
        values = (values.astype(np.int16) - 128) * 256
    elif values.dtype == np.int32:  # of 24 bits, too
        values = values / 2.0**16
    elif values.dtype.kind == "f":
        values = values * 2.0**15
    return rate, values


def _check_rate(rate: int, what: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise DataError(
            f"{what} has {rate} samples a second; it must be from {RATES[0]:,} to {RATES[1]:,}."
        )


def _fitted(recordings: Iterable, labels, where: str, modality, files=()) -> Sounds:
    """Recordings, (rate, values) each, as waves of the length that a modality has."""
    done, (length,) = Counter(), modality.example_shape
    waves = np.zeros((len(labels[0]), length), np.int16)
    for row, (rate, values) in enumerate(recordings):
        wave = fit(rate, values, modality.rate, done)
        done["cut at their end"] += len(wave) > length
        done["filled up with silence"] += len(wave) < length
        waves[row] = of_length(wave, length)
    seconds = f"{length / modality.rate:.3g} s at {modality.rate:,} Hz"
    note = f"{where}: {len(waves):,} sounds of {seconds}; {counted(+done) or 'as they were'}"
    return Sounds(waves, labels, modality, [note], files)


def of_length(wave: np.ndarray, length: int) -> np.ndarray:
    """int16 `[length]`, cut at its end or filled up with silence."""
    wave = np.pad(wave[:length], (0, max(length - len(wave), 0)))
    return np.clip(np.round(wave), -(2**15), 2**15 - 1).astype(np.int16)


def fit(rate: int, values: np.ndarray, wanted: int, done: Counter) -> np.ndarray:
    """One channel at a wanted rate, without silence at its ends; what is done is counted."""
    values = resampled(rate, values, wanted, done)
    size = np.abs(values.astype(np.float32))
    heard = np.flatnonzero(size >= QUIET * size.max())
    done["rid of silence at the ends"] += heard[-1] + 1 - heard[0] < len(values)
    return values[heard[0] : heard[-1] + 1]


def resampled(rate: int, values: np.ndarray, wanted: int, done: Counter) -> np.ndarray:
    """One channel `[S]` at a wanted rate; what is done is counted."""
    if values.ndim > 1:
        done["averaged over channels"] += values.shape[1] > 1
        values = values.mean(axis=1)
    if rate != wanted:
        from scipy.signal import resample_poly

        done["resampled"] += 1
        common = math.gcd(rate, wanted)
        values = resample_poly(values.astype(np.float64), wanted // common, rate // common)
    return values
