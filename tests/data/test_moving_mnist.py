"""Clips of moving digits, and clips in a file."""

import numpy as np
import pytest
from photos import opened
from tiny import load_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.stored import from_stored, to_stored
from djepa_jax.core.modalities.image import ImagePixels
from djepa_jax.core.modalities.video import VideoPixels
from djepa_jax.data.arrays import load_digits
from djepa_jax.data.loader import example_stream
from djepa_jax.data.moving_mnist import MovingMNIST
from djepa_jax.data.records import DataError

FRAMES = 24
CLIPS = VideoPixels(FRAMES, 20, 1, 4)
ONE = {"num_digits": 1, "digit_size": 26, "num_clips": 50}  # of 8 pixels, as they are


def moving(modality=CLIPS, path="", **options):
    return opened("moving_mnist", path, 10, modality, source_options=ONE | options)


def test_a_digit_moves_on_a_line_and_is_thrown_back_by_the_walls():
    source, digits = moving(), load_digits()
    for index in range(20):
        item = source[index]
        assert item["condition"] == source.labels[index] and item["example"].dtype == np.uint8
        places = []
        for frame in item["example"][..., 0]:  # where some digit of this label is seen whole
            rows, columns = frame.any(1), frame.any(0)
            places.append((np.argmax(rows), np.argmax(columns)))
            assert rows.sum() <= 8 and columns.sum() <= 8
        seen = item["example"][0, ..., 0]
        of_label = digits.images[digits.labels == item["condition"], ..., 0]
        assert seen.sum(dtype=int) in of_label.sum((1, 2), dtype=int)
        moved = np.diff(places, axis=0)  # [T - 1, 2]
        assert np.abs(moved).max() <= 2 and (moved != 0).any()
        for axis in range(2):  # a way of 12 pixels at 1.2 a frame turns at most three times
            signs = np.sign(moved[:, axis])
            assert (np.diff(signs[signs != 0]) != 0).sum() <= 3


def test_a_clip_depends_on_its_number_alone():
    source, fewer = moving(), moving(num_clips=7)
    assert len(source) == 50 and len(fewer) == 7
    for index in (6, 0):
        np.testing.assert_array_equal(source[index]["example"], fewer[index]["example"])
    assert (source[0]["example"] != source[1]["example"]).any()
    assert source.digest() == moving().digest() != moving(digit_size=20).digest()


def test_the_brightest_of_two_digits_is_seen_and_the_first_gives_the_label():
    one, two = moving(num_digits=1), moving(VideoPixels(FRAMES, 20, 3, 4), num_digits=2)
    assert two[0]["example"].shape == (FRAMES, 20, 20, 3)
    ink = [np.mean([source[i]["example"] for i in range(50)]) for source in (one, two)]
    assert 1.5 * ink[0] < ink[1] < 2 * ink[0]


def test_digits_come_from_a_file_and_are_scaled_to_the_frame(tmp_path):
    path = tmp_path / "digits.npz"
    np.savez(path, images=np.full((3, 28, 28), 200, np.uint8), labels=[4, 4, 4])
    frame = moving(path=path, digit_size=28, modality=VideoPixels(2, 32, 1, 4))[0]["example"][0]
    assert (frame == 200).sum() == 14 * 14 and (frame > 0).sum() == 14 * 14
    np.savez(path, images=np.zeros((3, 8, 8, 3), np.uint8), labels=[4, 4, 4])
    with pytest.raises(DataError, match="moving digits are"):
        moving(path=path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_digits": 0}, "num_digits is 0"),
        ({"digit_size": 65}, "from 1 to 64"),
        ({"num_clips": "many"}, "'many'"),
        ({"speed": 2}, "speed is not an option.*num_digits"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises((DataError, ConfigError), match=said):
        moving(**options)


def test_other_sources_have_no_options_and_pictures_no_motion():
    with pytest.raises(ConfigError, match="num_clips is not an option.*it has none"):
        opened("digits", "", 10, ImagePixels(8, 1, 2), source_options={"num_clips": 3})
    with pytest.raises(DataError, match="video_pixels"):
        moving(ImagePixels(8, 1, 2))


def test_clips_of_a_file_are_read_and_mirrored_from_left_to_right(tmp_path):
    path, modality = tmp_path / "clips.npz", VideoPixels(2, 4, 3, 2)
    clips = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 4, 3), np.uint8)
    np.savez(path, clips=clips, labels=np.arange(5))
    source = opened("npz", path, 5, modality)
    np.testing.assert_array_equal(source[3]["example"], clips[3])
    stream = example_stream(source, seed=0, random_flip=True)
    seen = {True: 0, False: 0}
    for index in range(10):
        item = stream[index]
        clip = clips[item["condition"]]
        mirrored = bool((item["example"] != clip).any())
        seen[mirrored] += 1
        expected = clip[:, :, ::-1] if mirrored else clip
        np.testing.assert_array_equal(item["example"], expected)
    assert all(seen.values())
    np.savez(path, clips=clips[..., 0], labels=np.arange(5))
    with pytest.raises(DataError, match="T, H, W, C"):
        opened("npz", path, 5, modality)


def test_the_configuration_opens_and_those_without_the_key_are_read():
    experiment = load_config("moving_digits", "--config.data.source_options.num_clips=9")
    data = experiment.data
    source = MovingMNIST("", experiment.modality, **data.source_options)
    assert len(source) == 9 and source[8]["example"].shape == (8, 32, 32, 1)
    stored = to_stored(load_config("digits"))
    del stored["data"]["source_options"]
    assert from_stored(stored).data.source_options == {}
