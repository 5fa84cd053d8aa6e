"""DINOv2: numbers of the reference on a small network, its positions, and files of weights."""

import numpy as np
import pytest
from conftest import assert_close
from small_autoencoder import fill

from djepa_jax.checkpoints.convert.tensor_files import save_tensors
from djepa_jax.evaluation.features import dinov2
from djepa_jax.evaluation.features.base import FeatureError

WIDTH, DEPTH = 128, 2
SHAPES = {
    "cls_token": (1, 1, WIDTH),
    "mask_token": (1, WIDTH),
    "pos_embed": (1, 1 + 16 * 16, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
    "patch_embed.proj.bias": (WIDTH,),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
}
BLOCK = {
    "norm1.weight": (WIDTH,),
    "norm1.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH),
    "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,),
    "ls1.gamma": (WIDTH,),
    "norm2.weight": (WIDTH,),
    "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (4 * WIDTH, WIDTH),
    "mlp.fc1.bias": (4 * WIDTH,),
    "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
    "mlp.fc2.bias": (WIDTH,),
    "ls2.gamma": (WIDTH,),
}
SHAPES |= {f"blocks.{n}.{name}": shape for n in range(DEPTH) for name, shape in BLOCK.items()}
# What transformers' Dinov2Model computes in float64 of the pictures below: the first five values.
EXPECTED = [
    [-1.49800, -1.86806, -1.33094, 0.61453, 0.47715],
    [-0.91938, -1.67410, -0.67453, -1.52115, 1.06401],
]


@pytest.fixture
def tensors(monkeypatch) -> dict[str, np.ndarray]:
    monkeypatch.setitem(dinov2.DEPTHS, WIDTH, ("tiny", DEPTH))
    return {name: fill(name, shape) for name, shape in SHAPES.items()}


def test_features_are_the_references(tensors, tmp_path):
    save_tensors(tmp_path / "tiny.safetensors", tensors, {})
    network = dinov2.DINOv2.from_file(tmp_path / "tiny.safetensors", batch_size=1)
    images = np.random.RandomState(0).randint(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    pool = network(images)["pool"]
    assert network.name == "dinov2_vittiny14" and pool.shape == (2, WIDTH)
    np.testing.assert_allclose(pool[:, :5], EXPECTED, atol=1e-4)


def test_positions_are_resized_as_the_authors_do():
    torch = pytest.importorskip("torch")
    positions = np.random.default_rng(0).standard_normal((1 + 37 * 37, 4)).astype(np.float32)
    grid = torch.tensor(positions[1:]).reshape(1, 37, 37, 4).permute(0, 3, 1, 2)
    scale = (16 + 0.1) / 37
    expected = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    resized = dinov2.resize_positions(positions, 16)
    assert_close(resized[1:], expected[0].permute(1, 2, 0).reshape(256, 4).numpy(), 1e-5)
    np.testing.assert_array_equal(resized[0], positions[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"norm.weight": np.ones(5, np.float32)}, "not of ViT-S/14, B/14 or L/14"),
        ({"register_tokens": np.ones((1, 4, WIDTH), np.float32)}, "unknown.*'register_tokens'"),
    ],
)
def test_other_networks_are_refused(tensors, tmp_path, change, message):
    save_tensors(tmp_path / "other.safetensors", tensors | change, {})
    with pytest.raises(FeatureError, match=rf'^DINOv2 weights ".*other.safetensors" .*{message}'):
        dinov2.DINOv2.from_file(tmp_path / "other.safetensors")
