"""Pictures from words, judged by retrieval: is a picture nearer to its caption than to 99 others?

The judge is a convolutional network that learns to give a picture the vector of its caption: a sum
of fixed random vectors, one for each word. It learns from other pictures than the generator
(`evaluation.captions`), or from all of the data, held-out pairs too; the generator never sees it.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from djepa_jax.core.models.text import Text
from djepa_jax.data.arrays import load_npz
from djepa_jax.data.captions import captioned, of_arrays
from djepa_jax.evaluation.features.classifier import Classifier
from djepa_jax.evaluation.metrics import intervals
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.neighbours import memorising
from djepa_jax.evaluation.metrics.pictures import MAX_REAL, is_picture

AMONG = 100  # captions of which one is right
DIM = 256  # of the vectors
YARDSTICK = 1000  # pictures of the data whose distance to the others is measured
COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey"}
COLOURS |= {"gray", "pink"}


@functools.cache
def _of_word(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(DIM)


def vectors_of(captions: Sequence[str]) -> np.ndarray:
    """Unit vectors of captions, alike where they share words: float32 `[n, D]`."""
    sums = np.stack([sum(map(_of_word, caption.lower().split())) for caption in captions])
    return np.float32(sums / np.linalg.norm(sums, axis=1, keepdims=True))


def ranks(pictures: np.ndarray, captions: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """How many of `AMONG` - 1 others, drawn for each picture, are as near as its caption: `[n]`."""
    rng, vectors, found = np.random.default_rng(0), vectors_of(others), []
    for picture, caption, right in zip(pictures, captions, vectors_of(captions), strict=True):
        drawn = rng.choice(len(others), min(AMONG, len(others)), replace=False)
        drawn = [number for number in drawn if others[number] != caption][: AMONG - 1]
        found.append((vectors[drawn] @ picture >= right @ picture).sum())
    return np.array(found)


class Captions:
    """Recall of the right caption among 100, first or among five, of samples of held-out captions.

    Beside it stand real pictures of the same captions (`_real`), samples against each other's
    captions (`_shuffled`), and samples of captions that were learnt (`_seen`), of held-out ones
    whose words all were learnt (`_composed`), and of a colour among these (`_colours`). Distances
    to the nearest learnt picture tell copies.
    """

    def __init__(self, pairs, other: tuple[np.ndarray, list[str]] | None, folder):
        self._pairs, self._other, self._folder = pairs, other, folder
        self._names = [self._read(caption) for caption in pairs.captions]
        self._judge: Classifier | None = None
        self._images: list[np.ndarray] = []
        self._asked: list[str] = []

    @classmethod
    def from_settings(cls, source, settings, folder) -> "Captions":
        """Against captioned pictures, by a network that is kept in a folder.

        Raises:
            ValueError: the data are none.
            DataError, MetricError: `evaluation.captions` names no such pictures.
        """
        pairs = captioned(source)
        if (
            pairs is None
            or not isinstance(pairs.reader, Text)
            or not is_picture(example := source[0]["example"])
        ):
            raise ValueError(
                'evaluation.kind "captions" judges uint8 pictures with captions (model.condition '
                '"text"), these data are none; use efficientnet_lite0 or classifier.'
            )
        other = None
        if path := settings.captions:
            where = f'evaluation.captions "{path}"'
            images = load_npz(path, where, ()).images
            if not is_picture(images[0]) or images.shape[-1] != example.shape[-1]:
                raise MetricError(
                    f"{where} holds {images.dtype} {list(images.shape)}; it needs uint8 pictures "
                    f"[n, H, W, {example.shape[-1]}], as the data are."
                )
            other = images, of_arrays(path, where, "", len(images), pairs.reader)
        return cls(pairs, other, folder)

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Keep samples `images` `[n, H, W, C]` and their captions; the judge learns at first."""
        if self._judge is None:
            images, captions = self._other or self._some(np.arange(len(self._names)))
            names, labels = np.unique(captions, return_inverse=True)
            vectors = vectors_of(names.tolist())
            self._judge = Classifier.for_data(images, labels, self._folder, vectors=vectors)
        self._images.append(np.asarray(arrays["images"]))
        self._asked += [self._pairs.reader.decode(row) for row in conditions]

    def merge(self, other: "Captions") -> None:
        """Take in the samples of another one."""
        self._images += other._images
        self._asked += other._asked

    def _read(self, caption: str) -> str:
        """A caption as a model reads it, which may be cut."""
        return self._pairs.reader.decode(self._pairs.reader.encode(caption))

    def _some(self, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """At most `MAX_REAL` pictures of some rows, and their captions."""
        rows = np.random.default_rng(0).permutation(rows)[:MAX_REAL]
        images, captions = self._pairs.pairs(rows)
        return images, [self._read(caption) for caption in captions]

    def groups(self) -> dict[str, np.ndarray]:
        """Which samples are of captions of each kind, by the ends of the figures' names."""
        seen = {self._names[row] for row in self._pairs.rows}
        words = {word for name in seen for word in name.split()}
        new = np.array([name not in seen for name in self._asked])
        said = [name.split() for name in self._asked]
        composed = new & [len(each) > 1 and words.issuperset(each) for each in said]
        colours = composed & [each[0] in COLOURS for each in said]
        if not new.any():
            return {"": ~new}
        return {"": new, "_seen": ~new, "_composed": composed, "_colours": colours}

    def result(self) -> dict[str, float]:
        """The figures."""
        seen, groups = self._judge(np.concatenate(self._images)), self.groups()
        others = sorted({*self._names})
        found = ranks(seen["logits"], self._asked, others)  # [n]
        rows = {end: found[group] for end, group in groups.items() if group.any()}
        held_out = self._pairs.held_out if len(groups) > 1 else self._pairs.rows
        images, captions = self._some(held_out)
        rows["_real"] = ranks(self._judge(images)["logits"], captions, others)
        asked = [name for name, new in zip(self._asked, groups[""], strict=True) if new]
        shuffled = seen["logits"][groups[""]], np.roll(asked, 1).tolist()
        rows["_shuffled"] = ranks(*shuffled, others)
        figures = {}
        for end, found in rows.items():
            for first in (1, 5):
                name, right = f"recall_{first}{end}", found < first
                figures[name] = float(right.mean())
                figures[f"{name}_low"], figures[f"{name}_high"] = intervals.bootstrap(right)
        learnt = self._judge(self._some(self._pairs.rows)[0])["pool"]
        return figures | memorising(seen["pool"], learnt, learnt[:YARDSTICK])

    def details(self) -> dict:
        """How many samples the figures are of, and what a reader of them is to know."""
        count = {f"recall{end}": int(group.sum()) for end, group in self.groups().items()}
        caveats = []
        if self._other is None:
            caveats.append(
                "the judge of captions learnt the real pictures, too, so that recall_real is of "
                "what it remembers; evaluation.captions names others"
            )
        return {"samples": count, "sha256": self._judge.sha256, "caveats": caveats}
