"""The classifier that learns the data themselves, on pictures that are easy to tell apart."""

import functools

import numpy as np
import pytest
from damage import cut

from djepa_jax.evaluation.features import classifier as module
from djepa_jax.evaluation.features.classifier import Classifier, Recipe, split_rows
from djepa_jax.runtime.storage import PathError

COUNT = 60


def bars_and_dots() -> tuple[np.ndarray, np.ndarray]:
    """Noisy 8 x 8 pictures: labels 0 upright bars, 1 lying bars, 3 dots; 2 is nobody's."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (COUNT, 8, 8, 1)).astype(np.uint8)
    labels = np.array([0, 1, 3])[np.arange(COUNT) % 3]
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(1, 7, 2)
        places = {0: np.s_[:, column], 1: np.s_[row, :], 3: np.s_[row, column]}
        image[places[int(label)]] = 255
    return images, labels


IMAGES, LABELS = bars_and_dots()


@pytest.fixture(scope="module", autouse=True)
def small():
    """Narrow networks, which compile and learn sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Recipe", functools.partial(Recipe, widths=(16, 16)))
        yield


@pytest.fixture(scope="module")
def kept(small, tmp_path_factory):
    """The classifier of bars and dots, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("kept")
    return Classifier.for_data(IMAGES, LABELS, folder), folder


@pytest.fixture
def untrainable(monkeypatch):
    """Training fails, if anything asks for it."""

    def refuse(*_):
        raise AssertionError("it was trained")

    monkeypatch.setattr(module, "_fit", refuse)


def test_it_learns_and_its_features_have_the_shapes_of_the_interface(kept):
    classifier, _ = kept
    assert classifier.name == "classifier" and classifier.held_out_accuracy == 1
    many = np.concatenate([IMAGES] * 3)  # more than a batch
    features = classifier(many)
    assert features["pool"].shape == (len(many), 16) and features["logits"].shape == (180, 4)
    assert {values.dtype for values in features.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(features["logits"].argmax(-1), np.tile(LABELS, 3))
    for name, values in classifier(many[-7:]).items():
        np.testing.assert_allclose(values, features[name][-7:], atol=1e-5)
    assert classifier(many[:0])["pool"].shape == (0, 16)
    doubled = np.kron(IMAGES, np.ones((1, 2, 2, 1), np.uint8))  # another size
    assert (classifier(doubled)["logits"].argmax(-1) == LABELS).mean() > 0.7


def test_other_pictures_than_it_can_take_are_refused(kept):
    classifier, _ = kept
    for wrong in (np.zeros((2, 8, 8, 3), np.uint8), IMAGES / 255, IMAGES[0]):
        with pytest.raises(ValueError, match=r"uint8 pictures \[n, H, W, 1\]"):
            classifier(wrong)
    with pytest.raises(ValueError, match="uint8 pictures"):
        Classifier.train(IMAGES / 255, LABELS)


def test_a_kept_one_is_read_and_not_trained(kept, untrainable):
    classifier, folder = kept
    again = Classifier.for_data(IMAGES, LABELS.astype(np.int64), folder)
    assert again.sha256 == classifier.sha256 and again.held_out_accuracy == 1
    assert len(list(folder.iterdir())) == 1
    changed = IMAGES.copy()
    changed[0, 0, 0, 0] ^= 1
    for other in [(changed, LABELS, 0, False), (IMAGES, LABELS[::-1], 0, False)]:
        with pytest.raises(AssertionError, match="it was trained"):
            Classifier.for_data(*other[:2], folder)
    for settings in [{"seed": 1}, {"flip": True}]:
        with pytest.raises(AssertionError, match="it was trained"):
            Classifier.for_data(IMAGES, LABELS, folder, **settings)


def test_every_kind_of_damage_is_found(kept, tmp_path, untrainable):
    classifier, folder = kept
    (file,) = folder.iterdir()
    whole, path = file.read_bytes(), tmp_path / file.name
    header = 8 + int.from_bytes(whole[:8], "little")
    accuracy = whole.index(b'"held_out_accuracy":"1.0"') + len('"held_out_accuracy":"')
    damages = [b"", whole[:100], whole[:-1], b"\xff" * 64]
    for place in (0, 9, accuracy, header + 5, len(whole) - 1):
        damages.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(AssertionError, match="it was trained"):
            Classifier.for_data(IMAGES, LABELS, tmp_path)


def test_a_damaged_one_is_trained_anew_to_the_same_weights_and_says_so(kept, tmp_path, capsys):
    classifier, folder = kept
    (file,) = folder.iterdir()
    (tmp_path / file.name).write_bytes(file.read_bytes())
    cut(tmp_path / file.name)
    assert Classifier.for_data(IMAGES, LABELS, tmp_path).sha256 == classifier.sha256
    said = capsys.readouterr().out
    assert file.name in said and "training it anew" in said
    assert Classifier.for_data(IMAGES, LABELS, tmp_path).sha256 == classifier.sha256
    assert not capsys.readouterr().out


@pytest.mark.parametrize("labels", [np.zeros(COUNT), np.full(COUNT, 7), LABELS - 1])
def test_data_without_classes_are_refused_before_anything_is_written(labels, tmp_path):
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        Classifier.for_data(IMAGES, labels.astype(int), tmp_path / "new")
    with pytest.raises(ValueError, match="efficientnet_lite0"):
        Classifier.train(IMAGES, labels.astype(int))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path, untrainable):
    (tmp_path / "file").touch()
    with pytest.raises(PathError, match="file"):
        Classifier.for_data(IMAGES, LABELS, tmp_path / "file" / "below")


def test_the_held_out_tenth_has_the_shares_of_the_classes():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 300, 650]))
    rows, held_out = split_rows(labels, Recipe())
    np.testing.assert_array_equal(np.sort(np.concatenate([rows, held_out])), np.arange(1000))
    assert np.bincount(labels[held_out]).tolist() == [5, 30, 65]
    assert (split_rows(labels, Recipe(seed=1))[1] != held_out).any()
