"""Sources in memory, the order of examples, and batches on the devices."""

import itertools
import os
import pathlib
import pickle
import types

import jax
import numpy as np
import pytest
from photos import opened, same

from djepa_jax.core import sharding
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data.arrays import ArraySource, load_digits, load_npz
from djepa_jax.data.loader import (
    device_batches,
    example_stream,
    local_rows,
    place_rows,
    row_batches,
)
from djepa_jax.data.records import DataError, Source

PICTURES = MODALITIES["image_pixels"](4, 1, 2)
ORDER, MIRRORED = [6, 5, 7, 3, 8, 4, 9, 2, 0, 1, 2, 8], [1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1]


@pytest.fixture
def numbered() -> ArraySource:
    """Ten 2 x 2 pictures; the label tells which."""
    images = np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1)
    return ArraySource(images, np.arange(10))


def take(stream, count, batch_size=4, **where):
    return list(itertools.islice(row_batches(stream, batch_size, **where), count))


# the order of examples


def test_every_epoch_is_another_permutation_and_a_function_of_the_seed(numbered):
    def order(seed: int) -> list[int]:
        stream = example_stream(numbered, seed)
        return [int(stream[i]["condition"]) for i in range(40)]

    epochs = np.split(np.array(order(0)), 4)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order(3) == order(3) != order(4)


def test_the_order_is_that_of_earlier_versions(numbered):
    """What a workdir goes on with; a change here breaks every resume."""
    stream = example_stream(numbered, 1, random_flip=True)
    items = [stream[i] for i in range(12)]
    assert [int(item["condition"]) for item in items] == ORDER
    assert [int(item["example"][0, 0, 0]) % 2 for item in items] == MIRRORED


def test_resuming_gives_the_same_batches_and_flips(numbered):
    stream = example_stream(numbered, seed=1, random_flip=True)
    whole = take(stream, 10, consumed=0)
    for consumed in (4, 12, 24):  # 12 and 24 lie in the middle of an epoch
        resumed = take(stream, 10 - consumed // 4, consumed=consumed)
        for a, b in zip(whole[consumed // 4 :], resumed, strict=True):
            assert same(a["example"], b["example"]) and same(a["condition"], b["condition"])


def test_any_number_of_hosts_and_threads_gives_the_same_batches(numbered):
    stream = example_stream(numbered, seed=1, random_flip=True)
    whole = take(stream, 5, consumed=8)
    for hosts, threads in ((1, 4), (2, 0), (4, 1)):
        shares = np.split(np.arange(4), hosts)
        parts = [take(stream, 5, consumed=8, rows=rows, num_threads=threads) for rows in shares]
        for step, batch in enumerate(whole):
            for name in ("example", "condition"):
                assert same(np.concatenate([part[step][name] for part in parts]), batch[name])


def test_flip_mirrors_about_half_of_the_images(numbered):
    plain, flipped = example_stream(numbered, 0), example_stream(numbered, 0, random_flip=True)
    mirrored = 0
    for i in range(200):
        a, b = plain[i]["example"], flipped[i]["example"]
        assert (a == b).all() or (a[:, ::-1] == b).all()
        mirrored += not (a == b).all()
    assert 60 < mirrored < 140


def test_rows_come_to_their_devices_in_any_order_of_them():
    """On a TPU neighbours of a mesh need not be in the order in which JAX counts devices, nor a
    process's rows together.
    """
    for shape in ((8, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(shape, jax.devices()[::-1])
        place, values = sharding.batch_sharding(mesh), np.arange(16 * 3).reshape(16, 3)
        assert local_rows(place, 16).tolist() == list(range(16))
        batch = place_rows(values, np.arange(16), place, 16)
        np.testing.assert_array_equal(batch, values)
        assert batch.sharding == place


class Captioned(Source):
    """Clips with an array as condition: neither pictures nor classes."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict:
        return {"example": np.full((3, 5), index), "condition": np.arange(4.0) + index}


def test_examples_and_conditions_may_be_any_arrays():
    data = types.SimpleNamespace(device_resident=False, random_flip=False, num_threads=2)
    config = types.SimpleNamespace(batch_size=8, seed=0, data=data)
    batches = device_batches(config, Captioned(), sharding.make_mesh((-1, 1, 1)), 0)
    for batch in itertools.islice(batches, 5):
        assert batch["example"].shape == (8, 3, 5) and batch["condition"].shape == (8, 4)
        np.testing.assert_array_equal(batch["condition"][:, 0], batch["example"][:, 0, 0])


# sources in memory


def test_digits_are_the_real_ones():
    source = load_digits()
    assert len(source) == 1797 and source.images.shape == (1797, 8, 8, 1)
    assert source.images.dtype == np.uint8 and source.images.max() == 255
    assert np.bincount(source.labels).min() > 170 and len(np.unique(source.images)) == 17


def test_synthetic_examples_are_those_of_the_modality():
    for name, channels in (("image_pixels", 3), ("image_latents", 6)):
        extra = (0.2,) if name == "image_latents" else ()
        modality = MODALITIES[name](8, 3, 2, *extra)
        source = opened("synthetic", num_classes=5, modality=modality, random_flip=True)
        item = source[7]
        assert item["example"].shape == (8, 8, channels) and item["condition"] == 2
        assert same(item["example"], source[7]["example"]), "a function of the index alone"


def test_npz_images_without_channel_axis_get_one(tmp_path):
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.arange(3))
    source = opened("npz", tmp_path / "x.npz", 3, PICTURES)
    assert same(source[2]["example"], images[2][..., None]) and source[2]["condition"] == 2
    images[2, 3, 3] = 0
    np.savez(tmp_path / "y.npz", images=images, labels=np.arange(3))
    assert opened("npz", tmp_path / "y.npz", 3, PICTURES).digest() != source.digest()


ZEROS, LABELS = np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, int)


def test_unusable_npz_is_refused(tmp_path):
    for arrays, words in (
        ({"images": ZEROS}, "labels"),
        ({"images": ZEROS, "labels": LABELS[:2]}, r"\(3, 4, 4, 1\).*\(2,\)"),
        ({"images": ZEROS[:0], "labels": LABELS[:0]}, r"\(0, 4, 4, 1\)"),
        ({"images": ZEROS, "labels": np.array([0.5, 1, 2])}, "float64 labels"),
        ({"images": ZEROS, "labels": np.array(["a", "b", "c"])}, "whole number"),
        ({"images": ZEROS, "labels": np.eye(3, dtype=int)}, r"labels of shape \(3, 3\)"),
        ({"images": np.uint8(3), "labels": LABELS[:1]}, "needs images"),
        ({"latents": np.full((1, 2, 2, 1), np.nan), "labels": LABELS[:1]}, "not finite"),
        ({"images": ZEROS[:, :2], "labels": LABELS}, r"\(2, 4, 1\).*\(4, 4, 1\)"),
        ({"images": ZEROS, "labels": LABELS - 1}, "class -1"),
        ({"images": ZEROS, "labels": LABELS + 2**32}, "class 4294967296.* below 5"),
    ):
        np.savez(tmp_path / "data.npz", **arrays)
        with pytest.raises(ValueError, match=words):
            opened("npz", tmp_path / "data.npz", 5, PICTURES)


def test_what_is_no_npz_is_refused(tmp_path):
    np.save(tmp_path / "a.npz.npy", ZEROS)
    np.savez(tmp_path / "b.npz", images=ZEROS, labels=LABELS)
    whole = (tmp_path / "b.npz").read_bytes()
    contents = [(tmp_path / "a.npz.npy").read_bytes(), whole[:200], b"", b"text"]
    contents += [
        whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(0, len(whole), 37)
    ]
    for content in contents:
        (tmp_path / "c.npz").write_bytes(content)
        try:
            load_npz(str(tmp_path / "c.npz"), "data.path")
        except DataError as error:
            assert "data.path is no npz file" in str(error) or "it needs images" in str(error)
        else:
            assert len(content) == len(whole), "only what nobody reads may change unnoticed"


class Code:
    """Unpickled, it would create a folder."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_an_npz_is_never_run(tmp_path):
    objects = np.empty(3, object)
    objects[:] = [Code(tmp_path / "trace")] * 3
    np.savez(tmp_path / "a.npz", images=objects, labels=LABELS)
    np.savez(tmp_path / "b.npz", images=ZEROS, labels=objects)
    (tmp_path / "c.npz").write_bytes(pickle.dumps(Code(tmp_path / "trace")))
    for name in "abc":
        with pytest.raises(DataError, match="is no npz file"):
            load_npz(str(tmp_path / f"{name}.npz"), "x")
    assert not (tmp_path / "trace").exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as arrays:
        _ = arrays["images"]
    assert (tmp_path / "trace").exists(), "the file is dangerous indeed"
