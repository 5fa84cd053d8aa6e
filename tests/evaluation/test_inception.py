"""FID's Inception: numbers of the reference at every tap, and files of weights."""

import json
import pathlib

import numpy as np
import pytest
from conftest import assert_close
from small_autoencoder import fill

from djepa_jax.checkpoints.convert.tensor_files import SourceError, save_tensors
from djepa_jax.evaluation.features.base import FeatureError
from djepa_jax.evaluation.features.inception import Inception, from_tensors, resize

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "inception"
TAPS = {  # name here -> name in the file of the reference's numbers
    "64": "64",
    "192": "192",
    "768": "768",
    "pool": "2048",
    "logits": "logits_unbiased",
    "logits_with_bias": "logits",
}
BRANCH = "Mixed_6d.branch1x1"


def filled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the reference."""
    values = fill(name, shape)
    return 1 + np.abs(values) if name.endswith("running_var") else values


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Inception:
    path = tmp_path_factory.mktemp("inception") / "filled.safetensors"
    shapes = json.loads((FIXTURES / "fid_inception_names.json").read_text())
    save_tensors(path, {name: filled(name, shape) for name, shape in shapes.items()}, {})
    return Inception.from_file(path, batch_size=2)


def images_of(case: str) -> tuple[np.ndarray, dict]:
    arrays = np.load(FIXTURES / "fid_inception.npz")
    return np.moveaxis(arrays[f"image_{case}"], 1, -1), arrays


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in "bc"]  # 299 and 256 pixels


@pytest.mark.parametrize("case", ["a", *SLOW])
def test_every_tap_is_the_references(network, case):
    images, expected = images_of(case)
    taps = network(images)
    for ours, theirs in TAPS.items():
        assert_close(taps[ours], expected[f"{theirs}_{case}"], 1e-4)
    assert not network.is_the_published


def test_spatial_features_are_seven_channels_of_mixed_6(network):
    """With nothing but a bias in that convolution, every place has what ReLU leaves of it."""
    layer = network._params[BRANCH]
    bias = np.arange(-2.0, 190.0, dtype=np.float32)
    network._params[BRANCH] = {"kernel": 0 * layer["kernel"], "bias": bias}
    spatial = network(images_of("a")[0])["spatial"]
    network._params[BRANCH] = layer
    np.testing.assert_array_equal(spatial, np.tile([0, 0, 0, 1, 2, 3, 4], (2, 17 * 17)))


def test_the_published_file_is_known_by_its_hash(network, monkeypatch):
    monkeypatch.setattr(network, "sha256", "6726825d0af5f729")
    assert network.is_the_published


def test_resizing_is_tensorflow_1s():
    ramp = np.broadcast_to(np.float32([0, 2, 4, 6])[None, None, :, None], (1, 4, 4, 3))
    row = np.asarray(resize(ramp, 8))[0, 5, :, 1]
    np.testing.assert_allclose(row, [0, 1, 2, 3, 4, 5, 6, 6])
    np.testing.assert_array_equal(resize(ramp, 4), ramp)


def test_other_tensors_are_refused_in_one_line_that_names_some():
    shapes = json.loads((FIXTURES / "fid_inception_names.json").read_text())
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    with pytest.raises(FeatureError, match=r"^here holds 23,885,391 values, .*23,885,392.*\.$"):
        from_tensors(tensors | {"fc.bias": np.zeros(1007, np.float32)}, "here")
    del tensors["Mixed_7c.branch_pool.bn.bias"], tensors["fc.bias"]
    tensors |= {f"AuxLogits.{n}": np.zeros(1) for n in range(5)}
    with pytest.raises(FeatureError) as caught:
        from_tensors(tensors, "here")
    assert str(caught.value) == (
        "here lacks 2 tensors ('Mixed_7c.branch_pool.bn.bias', 'fc.bias') and has unknown 5 "
        "tensors ('AuxLogits.0', 'AuxLogits.1', 'AuxLogits.2', ...); name a file with its weights."
    )


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(SourceError, match=r'Inception weights ".*none.pth" does not exist'):
        Inception.from_file(tmp_path / "none.pth")
