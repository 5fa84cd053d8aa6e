"""Pictures and sounds of the same classes, drawn into pairs on the fly: what is seen and heard."""

import os

import numpy as np

from djepa_jax.data.arrays import ArraySource, load_npz
from djepa_jax.data.records import ANY_CLASS, DataError, Source, checksum
from djepa_jax.data.sounds import load_sounds, open_wavs

SEED, OTHER_SEED = 0, 1
HELD_OUT_EVERY = 10  # pictures and sounds, which are in no pair of the source


class Paired(Source):
    """Pairs for the modality `joint`; pair i is a function of (0, i), the data and options alone.

    Args:
        path: not used.
        modality: of the pairs, pictures and then sounds.
        num_classes: not used; a model of pairs is told no class.
        pictures: an npz file of `images` and `labels`; small pictures get black edges.
        sounds: an npz file of recordings, or a folder of wav files (`data.sounds`).
        sound_labels: the array that has their classes, or the first part of the names of wav files;
            "" is `labels`, or the folder.
        num_pairs: how many there are.
    """

    def __init__(
        self,
        path,
        modality,
        num_classes=0,
        *,
        pictures="",
        sounds="",
        sound_labels="",
        num_pairs=60_000,
    ):
        if getattr(modality, "names", ()) != ("images", "sound"):
            raise DataError(
                'the source "paired" gives pictures with sounds; set --config.data.modality=joint, '
                "with pictures as its first part and audio_mel as its second."
            )
        if not (pictures and sounds and type(num_pairs) is int and num_pairs > 0):
            raise DataError(
                f'data.source_options has pictures "{pictures}", sounds "{sounds}" and num_pairs '
                f"{num_pairs!r}; name both files with --config.data.source_options.pictures=FILE "
                "and .sounds=FILE, and a number above 0."
            )
        self.modality, self._count = modality, num_pairs
        self.pictures = _pictures(os.path.expanduser(pictures), modality.first)
        self.sounds = _sounds(os.path.expanduser(sounds), sound_labels, modality.second)
        self.notes, both = self.sounds.notes, (self.pictures, self.sounds)
        self._rows = {out: [rows_of(each, out) for each in both] for out in (False, True)}
        for rows in self._rows.values():
            seen, heard = (set(s.labels[r].tolist()) for s, r in zip(both, rows, strict=True))
            if seen != heard:
                raise DataError(
                    f'data.source_options.pictures "{pictures}" holds the classes {sorted(seen)}, '
                    f'and sounds "{sounds}" {sorted(heard)}, of those that are held out (every '
                    "tenth) or not; name data of the same classes."
                )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        example, label = self._pair(np.random.default_rng((SEED, index)), False)
        return {"example": example, "condition": np.int32(label)}

    def held_out(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Pairs `[n, K]` of pictures and sounds that are in no other, and their classes `[n]`."""
        rngs = (np.random.default_rng((OTHER_SEED, index)) for index in range(count))
        examples, labels = zip(*(self._pair(rng, True) for rng in rngs), strict=True)
        return np.stack(examples), np.array(labels)

    def _pair(self, rng: np.random.Generator, held_out: bool) -> tuple[np.ndarray, int]:
        pictures, sounds = self._rows[held_out]
        picture = rng.choice(pictures)
        label = self.pictures.labels[picture]
        sound = rng.choice(sounds[self.sounds.labels[sounds] == label])
        return self.modality.join(self.pictures.images[picture], self.sounds.images[sound]), label

    def digest(self) -> str:
        """A checksum of all that decides the pairs."""
        return checksum(self.pictures.digest(), self.sounds.digest(), str(self._count))


def rows_of(source: ArraySource, held_out: bool) -> np.ndarray:
    """The rows of a source that are held out, or the others."""
    return np.flatnonzero((np.arange(len(source)) % HELD_OUT_EVERY == 0) == held_out)


def _pictures(path: str, modality) -> ArraySource:
    where = f'data.source_options.pictures "{path}"'
    source = load_npz(path, where)
    height, width, channels = modality.example_shape
    images = source.images
    if images.dtype != np.uint8 or images.shape[3] != channels or max(images.shape[1:3]) > height:
        raise DataError(
            f"{where} holds {images.dtype} images of shape {images.shape}, the config expects "
            f"uint8 of at most {modality.example_shape}; set data.image_size and data.channels to "
            "match."
        )
    tall, wide = height - images.shape[1], width - images.shape[2]
    edges = [(0, 0), (tall // 2, tall - tall // 2), (wide // 2, wide - wide // 2), (0, 0)]
    return ArraySource(np.pad(images, edges), source.labels)


def _sounds(path: str, labels: str, modality):
    where = f'data.source_options.sounds "{path}"'
    names = [labels] if labels else []
    if os.path.isdir(path):
        return open_wavs(path, where, names, "", ANY_CLASS, modality)
    return load_sounds(path, where, names or ["labels"], modality)
