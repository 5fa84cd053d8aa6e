"""What people are told of the data before training."""

import re

from photos import crop, encode, write_folder
from tiny import tiny_config

from djepa_jax.data.sources import open_training_data
from djepa_jax.data.summary import describe_data, look_at

SIZES = [(8, 8), (60, 40), (100, 75)]


def described(path, *flags: str) -> str:
    place = ("--config.data.source=folder", f"--config.data.path={path}")
    source, experiment = open_training_data(
        tiny_config(*place, "--config.data.num_classes=0", *flags)
    )
    return "\n".join(describe_data(experiment, source))


def images(mode: str = "RGB", sizes=SIZES) -> list[tuple[str, bytes, int]]:
    pictures = [crop("flower", 1, *size).convert(mode) for size in sizes]
    return [(f"{'abc'[i]}/{i}", encode(image, "PNG"), i) for i, image in enumerate(pictures)]


def test_what_was_found_and_what_is_done_to_it_is_said(tmp_path):
    said = described(write_folder(tmp_path, images()), "--config.data.image_size=32")
    for fact in ("3 images", "3 classes", "8 x 8 to 100 x 75", "3 in colour", "0 gray"):
        assert fact in said
    assert re.search("32 x 32 in gray: 2 reduced, 1 enlarged", said)
    assert re.search("WARNING: 3 are in colour .*channels=3", said)
    assert re.search("WARNING: 1 are enlarged", said)
    assert "classes: 0 a, 1 b, 2 c" in said
    (tmp_path / "a" / "x.heic").write_bytes(b"no image")
    assert "left out: 1 .heic" in described(tmp_path)
    tiny = described(write_folder(tmp_path / "big", images(sizes=SIZES[1:])))
    assert "8 times larger than 8 x 8" not in tiny
    assert "--config.data.channels=3" in tiny and "are enlarged" not in tiny


def test_pictures_that_fit_give_no_warning(tmp_path):
    path = write_folder(tmp_path / "gray", images("L", [(8, 8)] * 3))
    assert "WARNING" not in described(path) and "3 gray" in described(path)
    path = write_folder(tmp_path / "colour", images("RGB", [(20, 16)] * 3))
    assert "WARNING" not in described(path, "--config.data.channels=3")
    path = write_folder(tmp_path / "large", images("L", [(100, 75)] * 3))
    assert "WARNING" in described(path)


def test_numbers_that_are_other_names_are_explained(tmp_path):
    pictures = [(f"{year}/0", encode(crop("flower")), 0) for year in (1990, 2000)]
    said = described(write_folder(tmp_path, pictures))
    assert '0 "1990", 1 "2000"' in said and "sample.labels means" in said


def test_a_look_takes_few_images_spread_over_all():
    asked = []

    class Records(list):
        def __getitem__(self, index):
            asked.append(index)
            return (b"broken" if index % 2 else encode(crop("flower", 0, 4, 4), "PNG")), 0

    found, seen = look_at(Records(range(10_001)))
    assert seen == len(set(asked)) == 200 and 0 < len(found) < 200
    assert min(asked) == 0 and max(asked) == 10_000
