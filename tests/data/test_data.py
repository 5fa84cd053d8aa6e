"""Sources and the order of examples."""

import itertools
import time

import jax
import numpy as np
import pytest

from djepa_jax.core import sharding
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data.feed import local_rows, place_rows
from djepa_jax.data.loader import example_stream, read_in_order, row_batches
from djepa_jax.data.sources import ArraySource, load_digits, load_npz, open_source


@pytest.fixture
def numbered() -> ArraySource:
    """Ten 2 x 2 pictures; the label tells which."""
    images = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    return ArraySource(images, np.arange(10))


def take(stream, count, batch_size=4, **where):
    return list(itertools.islice(row_batches(stream, batch_size, **where), count))


def test_every_epoch_is_another_permutation(numbered):
    stream = example_stream(numbered, seed=0)
    epochs = [[int(stream[e * 10 + i]["condition"]) for i in range(10)] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_a_function_of_seed(numbered):
    def labels(seed):
        return [int(example_stream(numbered, seed)[i]["condition"]) for i in range(30)]

    assert labels(3) == labels(3) and labels(3) != labels(4)


@pytest.mark.parametrize("consumed", [4, 12, 24])  # 12 and 24 lie in the middle of an epoch
def test_resuming_gives_the_same_batches_and_flips(numbered, consumed):
    stream = example_stream(numbered, seed=1, random_flip=True)
    whole = take(stream, 10, consumed=0)
    resumed = take(stream, 10 - consumed // 4, consumed=consumed)
    for a, b in zip(whole[consumed // 4 :], resumed, strict=True):
        np.testing.assert_array_equal(a["example"], b["example"])
        np.testing.assert_array_equal(a["condition"], b["condition"])


@pytest.mark.parametrize("num_threads", [0, 1, 4])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_and_threads_gives_the_same_batches(numbered, hosts, num_threads):
    stream = example_stream(numbered, seed=1, random_flip=True)
    whole = take(stream, 5, consumed=8)
    shares = np.split(np.arange(4), hosts)
    parts = [take(stream, 5, consumed=8, rows=rows, num_threads=num_threads) for rows in shares]
    for step, batch in enumerate(whole):
        for name in ("example", "condition"):
            np.testing.assert_array_equal(
                np.concatenate([part[step][name] for part in parts]), batch[name]
            )


def test_flip_mirrors_about_half_of_the_images(numbered):
    plain, flipped = example_stream(numbered, 0), example_stream(numbered, 0, random_flip=True)
    mirrored = 0
    for i in range(200):
        a, b = plain[i]["example"], flipped[i]["example"]
        assert (a == b).all() or (a[:, ::-1] == b).all()
        mirrored += not (a == b).all()
    assert 60 < mirrored < 140


class Counted:
    """Numbers, and how many of them were asked for; some threads are slower than others."""

    def __init__(self, count: int, broken: int = -1):
        self.asked, self._count, self._broken = [], count, broken

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        time.sleep(0.002 * (index % 3 == 0))
        if index == self._broken:
            raise ValueError(f"{index} is broken")
        return index


@pytest.mark.parametrize("num_threads", [1, 5])
def test_reading_in_order_is_in_order_and_not_far_ahead(num_threads):
    source, ahead = Counted(60), 8
    for expected, found in enumerate(read_in_order(source, num_threads, ahead)):
        assert found == expected and len(source.asked) <= found + 1 + ahead + num_threads
    assert expected == 59 and sorted(source.asked) == list(range(60)), "each once"


def test_reading_in_order_comes_to_what_is_broken_in_its_turn():
    numbers = read_in_order(Counted(60, broken=20), 4, 30)
    assert [next(numbers) for _ in range(20)] == list(range(20))
    with pytest.raises(ValueError, match="20 is broken"):
        next(numbers)


def test_digits_are_the_real_ones():
    source = load_digits()
    assert (
        len(source) == 1797
        and source.images.shape == (1797, 8, 8, 1)
        and source.images.dtype == np.uint8
    )
    assert source.images.max() == 255 and np.bincount(source.labels).min() > 170
    assert len(np.unique(source.images)) == 17


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((3, 2, 2, 1), np.uint8)}, "labels"),
        (
            {"images": np.zeros((3, 2, 2, 1), np.uint8), "labels": np.zeros(2, int)},
            "3 images and 2 labels",
        ),
        ({"images": np.zeros((0, 2, 2, 1), np.uint8), "labels": np.zeros(0, int)}, "0 images"),
        ({"images": np.array([None]), "labels": np.zeros(1)}, "npz file"),
        (
            {"images": np.zeros((3, 2, 2, 1), np.uint8), "labels": np.array([0.5, 1, 2])},
            "float64 labels",
        ),
        (
            {"images": np.zeros((3, 2, 2, 1), np.uint8), "labels": np.array(["a", "b", "c"])},
            "whole number",
        ),
        (
            {"images": np.zeros((3, 2, 2, 1), np.uint8), "labels": np.eye(3, dtype=int)},
            r"labels of shape \(3, 3\)",
        ),
        ({"images": np.uint8(3), "labels": np.zeros(1, int)}, "needs images"),
        ({"latents": np.full((1, 2, 2, 1), np.nan), "labels": np.zeros(1, int)}, "not finite"),
    ],
)
def test_unusable_npz_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        load_npz(str(tmp_path / "data.npz"))


def test_npy_file_is_refused(tmp_path):
    np.save(tmp_path / "data.npy", np.zeros((3, 2, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="npz file"):
        load_npz(str(tmp_path / "data.npy"))


@pytest.mark.parametrize("labels", [[-1, 4], [0, 5], [0, 2**32]])
def test_label_out_of_range_is_named(tmp_path, labels):
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array(labels))
    wrong = next(label for label in labels if not 0 <= label < 5)
    with pytest.raises(ValueError, match=f"class {wrong}, data.num_classes is 5"):
        open_source(
            "npz", str(tmp_path / "data.npz"), MODALITIES["image_pixels"](4, 1, 2), num_classes=5
        )


def test_truncated_npz_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, images=np.zeros((9, 8, 8, 1), np.uint8), labels=np.zeros(9, int))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="data.path"):
        load_npz(str(path))


def test_npz_images_without_channel_axis_get_one(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((5, 4, 4), np.uint8), labels=np.arange(5))
    modality = MODALITIES["image_pixels"](4, 1, 2)
    source = open_source("npz", str(tmp_path / "data.npz"), modality, num_classes=5)
    assert source[2]["example"].shape == (4, 4, 1) and source[2]["condition"] == 2


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_rows_come_to_their_devices_in_any_order_of_them(shape):
    """On a TPU neighbours of a mesh need not be in the order in which JAX counts devices, nor a
    process's rows together.
    """
    mesh = sharding.make_mesh(shape, jax.devices()[::-1])
    place, values = sharding.batch_sharding(mesh), np.arange(16 * 3).reshape(16, 3)
    assert local_rows(place, 16).tolist() == list(range(16))
    batch = place_rows(values, np.arange(16), place, 16)
    np.testing.assert_array_equal(batch, values)
    assert batch.sharding == place
