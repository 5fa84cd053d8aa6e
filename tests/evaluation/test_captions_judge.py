"""The judge of captions: right pictures, wrong ones, and those of other captions are told apart."""

import types

import numpy as np
import pytest

from djepa_jax.core.models.text import Embeddings, Text
from djepa_jax.data.arrays import ArraySource
from djepa_jax.data.captions import Captioned
from djepa_jax.data.records import DataError
from djepa_jax.evaluation.features import classifier
from djepa_jax.evaluation.metrics import METRICS, captions
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.captions import Captions, ranks, vectors_of

INK = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
PLACES = {"top": (0, 3), "bottom": (7, 3), "left": (3, 0), "right": (3, 7), "middle": (3, 3)}
NAMES = [f"{colour} {place}" for colour in INK for place in PLACES]
READER = Text(2, length=16, width=8, num_heads=2)


def drawn(names) -> np.ndarray:
    """A blot of the colour at the place that each name says, on grey: uint8 `[n, 8, 8, 3]`."""
    images = np.full((len(names), 8, 8, 3), 100, np.uint8)
    for image, name in zip(images, names, strict=True):
        colour, place = name.split()
        row, column = PLACES[place]
        image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = INK[colour]
    return images


def source(held_out=0.4, reader=READER, images=None, names=NAMES):
    images = drawn(names) if images is None else images
    return Captioned(ArraySource(images, np.zeros(len(images))), names, reader, held_out, "here")


def settings(path="") -> types.SimpleNamespace:
    return types.SimpleNamespace(captions=str(path))


def judged(images, asked, folder) -> tuple[dict, Captions]:
    opened = METRICS["captions"].from_settings
    metric, other = (opened(source(), settings(), folder) for _ in range(2))
    for part, rows in ((metric, slice(0, 9)), (other, slice(9, None))):
        told = np.stack([READER.encode(name) for name in asked[rows]])
        part.update({"images": images[rows]}, told)
    metric.merge(other)
    return metric.result(), metric


def test_right_pictures_are_told_from_wrong_ones(tmp_path, monkeypatch):
    small = classifier.Recipe(widths=(32, 32), steps_per_root=30, held_out_every=0)
    monkeypatch.setattr(classifier, "recipe_of", lambda *given: small)
    data, names = source(), np.array(NAMES)
    hidden, asked = names[data.held_out], NAMES * 2
    assert 3 <= len(hidden) <= 12
    figures, metric = judged(drawn(asked), asked, tmp_path)
    for name in ("recall_1", "recall_1_real", "recall_1_seen", "recall_1_colours", "recall_5"):
        assert figures[name] > 0.8, name
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
    assert figures["recall_1_shuffled"] < 0.5 and figures["nearest_real_copies"] > 0.5
    details = metric.details()
    assert details["samples"]["recall"] == 2 * len(hidden) and details["caveats"]
    assert details["samples"]["recall_seen"] == len(asked) - 2 * len(hidden)
    monkeypatch.delattr(classifier, "_fit")  # what it has learnt is kept
    others = [NAMES[(number + 7) % 20] for number in range(20)] * 2
    wrong, _ = judged(drawn(others), asked, tmp_path)
    assert wrong["recall_1"] < 0.3 and wrong["recall_1_real"] == figures["recall_1_real"]


def test_it_can_learn_from_other_pictures(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", images=drawn(NAMES[:3]), captions=np.array(NAMES[:3]))
    metric = METRICS["captions"].from_settings(source(), settings(tmp_path / "x.npz"), "folder")
    learnt = []
    judge = types.SimpleNamespace(sha256="0")
    monkeypatch.setattr(
        captions.Classifier, "for_data", lambda *given, **how: learnt.append((given, how)) or judge
    )
    metric.update({"images": drawn(NAMES[:1])}, READER.encode(NAMES[0])[None])
    ((images, labels, folder), how), *more = learnt
    assert (images == drawn(NAMES[:3])).all() and folder == "folder" and not more
    assert (how["vectors"][labels] == vectors_of(NAMES[:3])).all()
    assert not metric.details()["caveats"]


def test_composed_names_are_of_words_that_were_learnt():
    names = ["red top", "red left", "blue left", "blue top", "new top", "black"]
    data = source(names=names, images=drawn(NAMES[:6]))
    data.rows, data.held_out = np.array([0, 1, 2]), np.array([3, 4, 5])
    metric = Captions(data, None, "")
    metric._asked = ["blue top", "new top", "black", "red left"]
    found = {end: group.tolist() for end, group in metric.groups().items()}
    yes, no = True, False
    assert found[""] == [yes, yes, yes, no] and found["_seen"] == [no, no, no, yes]
    assert found["_composed"] == found["_colours"] == [yes, no, no, no]


def test_ranks_are_among_a_hundred_others():
    names = [f"word{number} thing" for number in range(300)]
    vectors = vectors_of(names)
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert vectors[0] @ vectors[1] > 0.3 > vectors_of(["word0", "other"]).prod(0).sum()
    assert not ranks(vectors[:50], names[:50], names).any()
    chance = ranks(vectors[:200], names[100:], names)
    assert 20 < chance.mean() < 80 and chance.max() < captions.AMONG
    assert (ranks(np.zeros((3, captions.DIM)), names[:3], names) == 99).all()  # no opinion


def test_what_it_cannot_judge_is_refused(tmp_path):
    latents = source(images=np.zeros((20, 4, 4, 16), np.float32))
    vectors = source(
        names=np.zeros((20, 3, 5)), images=drawn(NAMES), reader=Embeddings(2, channels=5)
    )
    for wrong in (latents, vectors, ArraySource(drawn(NAMES), np.arange(20))):
        with pytest.raises(ValueError, match='evaluation.kind "captions"'):
            METRICS["captions"].from_settings(wrong, settings(), tmp_path)
    np.savez(tmp_path / "x.npz", images=drawn(NAMES))
    with pytest.raises(DataError, match='no array "captions"'):
        METRICS["captions"].from_settings(source(), settings(tmp_path / "x.npz"), tmp_path)
    np.savez(tmp_path / "x.npz", images=drawn(NAMES)[..., :1], captions=np.array(NAMES))
    with pytest.raises(MetricError, match="as the data are"):
        METRICS["captions"].from_settings(source(), settings(tmp_path / "x.npz"), tmp_path)
