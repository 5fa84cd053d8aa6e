"""Grids and PNG files."""

import numpy as np
import pytest
from PIL import Image

from djepa_jax.sampling.sample_to_npz import grids


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_picture_enlarged(channels):
    images = np.stack([np.full((8, 8, channels), value, np.uint8) for value in (10, 90, 170)])
    grid = grids.label_grid(images, ["0", "1", "2"], columns=3)
    assert grid.ndim == 3 and grid.shape[2] == 3
    for index, value in enumerate((10, 90, 170)):
        tile = (grid == value).all(-1)
        assert tile.sum() >= 64 * 64 * 0.99, f"picture {index} is missing"


def test_png_keeps_its_command(tmp_path):
    path = tmp_path / "new folder" / "grid.png"
    grids.save_png(path, np.zeros((4, 4, 3), np.uint8), {"command": "python -m djepa_jax.main"})
    with Image.open(path) as image:
        assert image.text == {"command": "python -m djepa_jax.main"}
