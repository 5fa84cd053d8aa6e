"""Sound as tokens: windows of a logarithmic mel spectrogram, and the way back to a wave.

1. Frames `hop` samples apart, each under a periodic Hann window of `n_fft` samples.
2. Magnitudes of their spectra, summed up in overlapping triangles on the mel scale of HTK.
3. The logarithm, brought to mean 0 and deviation 1, cut into windows of bands and frames.

Phases are lost, so a wave has to be found that fits: magnitudes by multiplicative updates, which
keep them positive (Lee and Seung 2000), phases by the fast Griffin-Lim algorithm (Perraudin et al.
2013).

Shape letters: B batch, S samples, T frames, F frequencies, M mel bands.
"""

import dataclasses
import functools
import math
import os
import wave

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from djepa_jax.core.bounds import AboveZero, Finite, Positive, check_bounds

FULL_SCALE = 32768.0  # of int16
MEL_ROUNDS, PHASE_ROUNDS, MOMENTUM = 30, 60, 0.99
WHITE = 3.5  # deviations above the mean; black is the floor


@dataclasses.dataclass(frozen=True)
class AudioMel:
    """Mono int16 waves of `frames * hop` samples as windows of a log-mel spectrogram.

    The defaults are for spoken digits at 8 kHz; `mean` and `deviation` are those of their log-mel
    values, silence that fills up the clips included.
    """

    rate: Positive = 8000  # samples a second
    n_fft: Positive = 256
    hop: Positive = 64
    mels: Positive = 40
    frames: Positive = 128
    patch_mels: Positive = 8
    patch_frames: Positive = 4
    floor: AboveZero = 100.0  # of magnitudes; about one level of a wave
    mean: Finite = 6.05
    deviation: AboveZero = 2.12

    example_dtype = np.dtype(np.int16)
    needs_decoder = False
    factorised_positions = True

    def __post_init__(self):
        try:
            check_bounds(self)
        except ValueError as error:
            raise ValueError(f"data.options.{error}") from error
        if self.mels % self.patch_mels or self.frames % self.patch_frames:
            raise ValueError(
                f"data.options has {self.mels} mels and {self.frames} frames in patches of "
                f"{self.patch_mels} x {self.patch_frames}; choose patches that divide them."
            )
        if self.n_fft % (2 * self.hop):  # windows add up to a constant
            raise ValueError(
                f"data.options has n_fft {self.n_fft} and hop {self.hop}; n_fft must be a multiple "
                "of twice the hop."
            )
        if not self.filters.any(axis=1).all():
            raise ValueError(
                f"data.options has {self.mels} mels for {self.n_fft // 2 + 1} frequencies, so that "
                "some bands are empty; choose fewer mels, or a larger n_fft."
            )

    @classmethod
    def from_settings(cls, data) -> "AudioMel":
        """All of it is in `data.options`."""
        return cls(**data.options)

    @property
    def grid(self) -> tuple[int, int]:
        """Windows along frequency and time."""
        return (self.mels // self.patch_mels, self.frames // self.patch_frames)

    @property
    def token_dim(self) -> int:
        """Values per window."""
        return self.patch_mels * self.patch_frames

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Samples."""
        return (self.frames * self.hop,)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """Of a spectrogram that `preview` shows."""
        return (self.mels, self.frames, 1)

    @functools.cached_property
    def filters(self) -> np.ndarray:
        """Weights of frequencies in mel bands: `[M, F]` float32."""
        return mel_filters(self.rate, self.n_fft, self.mels)

    def check_example(self, example: np.ndarray) -> None:
        """Raise ValueError unless an example is a wave of this length."""
        if tuple(example.shape) != self.example_shape or example.dtype != self.example_dtype:
            raise ValueError(
                f"the data holds {example.dtype} examples of shape {tuple(example.shape)}, the "
                f"config expects int16 waves of shape {self.example_shape}; convert the data, or "
                "set data.options.frames and hop to match."
            )

    def tokenize(self, examples: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """int16 waves `[B, S]` -> tokens `[B, N, C]`."""
        windowed = cut_frames(examples.astype(jnp.float32), self.n_fft, self.hop)
        magnitudes = jnp.abs(jnp.fft.rfft(windowed))  # [B, T, F]
        precision = jax.lax.Precision.HIGHEST  # true float32
        mel = jnp.einsum("btf,mf->bmt", magnitudes, self.filters, precision=precision)
        values = (jnp.log(jnp.maximum(mel, self.floor)) - self.mean) / self.deviation
        sizes = {"p": self.patch_mels, "q": self.patch_frames}
        return rearrange(values, "b (m p) (t q) -> b (m t) (p q)", **sizes)

    def detokenize(self, tokens: jax.Array) -> jax.Array:
        """Tokens `[B, N, C]` -> logarithms of mel magnitudes `[B, M, T]`."""
        sizes = {"m": self.grid[0], "p": self.patch_mels, "q": self.patch_frames}
        values = rearrange(tokens, "b (m t) (p q) -> b (m p) (t q)", **sizes)
        return values * self.deviation + self.mean

    def export(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """{"log_mel": float32 `[B, M, T]`, "sound": float32 waves `[B, S]` in [-1, 1]}."""
        log_mel = self.detokenize(jnp.asarray(tokens))
        loudest = math.log(FULL_SCALE * self.n_fft)  # no wave has more
        mel = jnp.exp(jnp.minimum(log_mel, loudest)).swapaxes(1, 2)  # [B, T, M]
        mel = jnp.maximum(mel - self.floor, 0)  # what is at the floor is silence
        sound = find_wave(mel, self.filters, self.n_fft, self.hop) / FULL_SCALE
        return {"log_mel": log_mel, "sound": jnp.clip(sound, -1, 1)}

    def tokens_at(self, places: np.ndarray) -> np.ndarray:
        """Which tokens `[B, N]` show any of some samples `[B, S]`, each those of its own frames."""
        bands, spans = self.grid
        return np.tile(reduce(places, "b (t s) -> b t", "max", t=spans), (1, bands))

    def put_back(self, examples: np.ndarray, arrays: dict, mask: np.ndarray) -> np.ndarray:
        """int16 waves `[B, S]` as they were but for samples `[B, S]` of a mask, made of `sound`.

        At its borders the kept sound, mirrored, fades out inside the mask, over a hop at most, so
        that there is no click; what was hidden is not heard.
        """
        drawn = np.asarray(arrays["sound"], np.float64) * (FULL_SCALE - 1)
        mask, joined = np.broadcast_to(mask, drawn.shape), np.where(mask, drawn, examples)
        forwards = zip(joined, mask, strict=True)
        backwards = zip(joined[:, ::-1], mask[:, ::-1], strict=True)
        for values, hidden in (*forwards, *backwards):
            for start in np.flatnonzero(hidden[1:] & ~hidden[:-1]) + 1:
                room = np.argmin(np.append(hidden[start:], False))
                size = min(self.hop, start, room // 2)
                fade = np.arange(size, 0, -1) / (size + 1)
                kept, new = values[start - size : start][::-1], values[start : start + size]
                new += fade * (kept - new)
        return np.round(joined).astype(np.int16)

    def preview(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Spectrograms in grey, low frequencies at the bottom: uint8 `[n, M, T, 1]`.

        Without `log_mel`, those of int16 waves `sound`.
        """
        if "log_mel" not in arrays:
            arrays = {"log_mel": self.detokenize(self.tokenize(arrays["sound"]))}
        black, white = math.log(self.floor), self.mean + WHITE * self.deviation
        shade = (np.asarray(arrays["log_mel"]) - black) / (white - black)
        return np.clip(np.round(shade * 255), 0, 255).astype(np.uint8)[:, ::-1, :, None]

    def save(self, arrays: dict[str, np.ndarray], index: int, stem: os.PathLike) -> None:
        """Write a wave as a 16-bit wav file; int16 as it is."""
        values = arrays["sound"][index]
        if values.dtype != np.int16:
            values = np.round(values * (FULL_SCALE - 1))
        values = values.astype("<i2")
        with wave.open(f"{os.fspath(stem)}.wav", "wb") as file:
            file.setparams((1, 2, self.rate, len(values), "NONE", ""))
            file.writeframes(values.tobytes())


def mel_filters(rate: int, n_fft: int, mels: int) -> np.ndarray:
    """Triangles of height 1 whose corners are evenly spaced on HTK's mel scale: `[M, F]` float32.

    Each begins and ends where its neighbours have their tops; the scale is 2595 log10(1 + f / 700).
    """
    top = np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** np.linspace(0, top, mels + 2) - 1)  # in Hz
    frequencies = np.arange(n_fft // 2 + 1) * rate / n_fft
    distance = frequencies - corners[:, None]  # [M + 2, F]
    width = np.diff(corners)[:, None]
    rising, falling = distance[:-2] / width[:-1], -distance[2:] / width[1:]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def hann(n_fft: int) -> np.ndarray:
    """The periodic Hann window `[n_fft]` float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def cut_frames(waves: jax.Array, n_fft: int, hop: int) -> jax.Array:
    """Windowed frames `[..., S / hop, n_fft]` of waves `[..., S]` with silence around them.

    A frame is put together of pieces as long as the hop.
    """
    around = (n_fft - hop) // 2
    padding = [(0, 0)] * (waves.ndim - 1) + [(around, n_fft - hop - around)]
    pieces = jnp.pad(waves, padding).reshape(*waves.shape[:-1], -1, hop)
    count, overlap = waves.shape[-1] // hop, n_fft // hop
    shifted = [pieces[..., start : start + count, :] for start in range(overlap)]
    return jnp.concatenate(shifted, -1) * hann(n_fft)


def join_frames(frames: jax.Array, hop: int) -> jax.Array:
    """The waves `[..., S]` whose windowed frames are nearest to given ones `[..., S / hop, n_fft]`.

    Frames are windowed again and added up (Griffin and Lim 1984).
    """
    count, n_fft = frames.shape[-2:]
    around, overlap = (n_fft - hop) // 2, n_fft // hop

    def add_up(frames):  # [..., T, n_fft] -> [..., S]
        pieces = frames.reshape(*frames.shape[:-1], overlap, hop)
        whole = jnp.zeros((*frames.shape[:-2], count + overlap - 1, hop))
        for start in range(overlap):
            whole = whole.at[..., start : start + count, :].add(pieces[..., start, :])
        joined = whole.reshape(*whole.shape[:-2], -1)
        return joined[..., around : around + count * hop]

    weight = add_up(jnp.broadcast_to(jnp.square(hann(n_fft)), (count, n_fft)))  # [S]
    return add_up(frames * hann(n_fft)) / jnp.maximum(weight, 1e-3)


def find_magnitudes(mel: jax.Array, filters: np.ndarray) -> jax.Array:
    """Magnitudes `[..., F]`, none negative, whose mel bands `[..., M]` are near given ones."""
    target, gram = mel @ filters, filters.T @ filters  # [..., F], [F, F]

    def update(_, found):
        return found * target / (found @ gram + 1e-6)

    return jax.lax.fori_loop(0, MEL_ROUNDS, update, target)


@functools.partial(jax.jit, static_argnums=(2, 3))
def find_wave(mel: jax.Array, filters: np.ndarray, n_fft: int, hop: int) -> jax.Array:
    """Waves `[B, S]` whose mel bands `[B, T, M]` are near given ones."""
    magnitudes = find_magnitudes(mel, filters)  # [B, T, F]

    def wave_of(phase):
        return join_frames(jnp.fft.irfft(magnitudes * phase, n_fft), hop)

    def update(_, carry):
        phase, before = carry
        found = jnp.fft.rfft(cut_frames(wave_of(phase), n_fft, hop))
        ahead = found + MOMENTUM * (found - before)
        return ahead / jnp.maximum(jnp.abs(ahead), 1e-9), found

    # The same for all, so that a sound does not depend on those beside it
    turns = jax.random.uniform(jax.random.key(0), magnitudes.shape[1:])
    phase = jnp.broadcast_to(jnp.exp(2j * jnp.pi * turns), magnitudes.shape)
    phase, _ = jax.lax.fori_loop(0, PHASE_ROUNDS, update, (phase, jnp.zeros_like(phase)))
    return wave_of(phase)
