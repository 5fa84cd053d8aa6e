"""Grids, PNG files, and samples in npz files."""

import json

import numpy as np
from PIL import Image
from tiny import arrays_of, tiny_config

from djepa_jax.runtime.storage import as_path
from djepa_jax.sampling.grids import (
    label_grid,
    output_paths,
    save_png,
    save_samples,
    stored_settings,
)


def test_grid_shows_every_picture_enlarged():
    for channels in (1, 3):
        images = np.stack([np.full((8, 8, channels), value, np.uint8) for value in (10, 90, 170)])
        grid = label_grid(images, ["0", "1", "2"], columns=3)
        assert grid.ndim == 3 and grid.shape[2] == 3
        for index, value in enumerate((10, 90, 170)):
            tile = (grid == value).all(-1)
            assert tile.sum() >= 64 * 64 * 0.99, f"picture {index} is missing"


def test_png_keeps_its_command(tmp_path):
    path = tmp_path / "new folder" / "grid.png"
    save_png(path, np.zeros((4, 4, 3), np.uint8), {"command": "python -m djepa_jax.main"})
    with Image.open(path) as image:
        assert image.text == {"command": "python -m djepa_jax.main"}
    save_png(path, np.zeros((4, 4, 3), np.uint8), {"command": "--config.data.path=\udcff"})
    with Image.open(path) as image:
        assert image.text == {"command": "--config.data.path=\\udcff"}, "bytes that are no text"


def test_a_name_may_have_either_ending_or_none():
    for name, png, npz in (
        ("a", "a.png", "a.npz"),
        ("a.png", "a.png", "a.npz"),
        ("a.PNG", "a.PNG", "a.npz"),
        ("a.Npz", "a.png", "a.Npz"),
        ("v1.5.png", "v1.5.png", "v1.5.npz"),
    ):
        assert [path.name for path in output_paths(as_path(name))] == [png, npz]


def test_samples_are_stored_with_all_conditions_and_their_settings(tmp_path):
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    conditions = (np.array([3, 7]), np.ones((2, 4), np.float32))
    out = as_path(tmp_path / "x.png")
    grid = save_samples(out, tiny_config(), {"images": images}, conditions, {"step": 3})
    found = arrays_of(tmp_path / "x.npz")
    assert found.keys() == {"arr_0", "arr_1", "condition_1", "settings"}
    np.testing.assert_array_equal(found["arr_0"], images)
    np.testing.assert_array_equal(found["arr_1"], [3, 7])
    assert stored_settings(as_path(tmp_path / "x.npz")) == {"step": 3}
    with Image.open(out) as image:
        assert json.loads(image.text["settings"]) == {"step": 3}
        np.testing.assert_array_equal(np.asarray(image), grid)
    for content in (b"", b"half", (tmp_path / "x.npz").read_bytes()[:200]):
        (tmp_path / "y.npz").write_bytes(content)
        assert stored_settings(as_path(tmp_path / "y.npz")) is None
    assert stored_settings(as_path(tmp_path / "none.npz")) is None
