"""Two modalities as one: bytes, tokens, positions and orders of both."""

import dataclasses
import math
import wave

import jax
import numpy as np
import pytest
from pairs import PAIRS
from PIL import Image
from tiny import load_config, tiny_config

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.stored import from_stored, to_stored
from djepa_jax.core.modalities.audio import AudioMel
from djepa_jax.core.modalities.image import ImageLatents, ImagePixels
from djepa_jax.core.modalities.joint import Joint
from djepa_jax.core.modalities.video import VideoPixels
from djepa_jax.core.models.djepa import position_vectors
from djepa_jax.core.schedules import ORDERS

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (3, 8, 8, 1), np.uint8)
WAVES = RNG.integers(-(2**15), 2**15, (3, 512)).astype(np.int16)
BYTES = PAIRS.join(PICTURES, WAVES)


def test_bytes_hold_both_to_the_bit():
    assert BYTES.shape == (3, *PAIRS.example_shape) == (3, 64 + 1024) and BYTES.dtype == np.uint8
    PAIRS.check_example(BYTES[0])
    np.testing.assert_array_equal(PAIRS.join(PICTURES[1], WAVES[1]), BYTES[1])
    for found in (PAIRS.named(BYTES).values(), jax.jit(PAIRS.split)(BYTES)):
        for each, expected in zip(found, (PICTURES, WAVES), strict=True):
            assert each.dtype == expected.dtype
            np.testing.assert_array_equal(each, expected)
    for wrong in (BYTES[0, 1:], BYTES[0].astype(np.int16)):
        with pytest.raises(ValueError, match="expects pairs"):
            PAIRS.check_example(wrong)


def test_tokens_are_those_of_the_first_and_then_of_the_second():
    tokens = np.asarray(jax.jit(PAIRS.tokenize)(BYTES))
    assert tokens.shape == (3, 8, PAIRS.token_dim) == (3, 8, 16)
    np.testing.assert_allclose(tokens[:, :4], PAIRS.first.tokenize(PICTURES), atol=1e-6)
    np.testing.assert_allclose(tokens[:, 4:], PAIRS.second.tokenize(WAVES), atol=1e-5)
    arrays = PAIRS.export(tokens)
    assert arrays.keys() == {"images", "log_mel", "sound"}
    np.testing.assert_array_equal(arrays["images"], PICTURES)
    np.testing.assert_array_equal(PAIRS.detokenize(tokens)[1], arrays["log_mel"])


def test_a_part_is_made_anew_beside_the_other_that_stays():
    mask = np.array([[True, False], [False, True], [True, True]])
    assert PAIRS.tokens_at(mask)[0].tolist() == [True] * 4 + [False] * 4
    arrays = {"images": 255 - PICTURES, "sound": np.full((3, 512), 0.5)}
    found = PAIRS.named(PAIRS.put_back(BYTES, arrays, mask))
    for part, given, is_new in (("images", PICTURES, mask[:, 0]), ("sound", WAVES, mask[:, 1])):
        np.testing.assert_array_equal(found[part][~is_new], given[~is_new])
    np.testing.assert_array_equal(found["images"][mask[:, 0]], 255 - PICTURES[mask[:, 0]])
    assert (found["sound"][mask[:, 1]] == round(0.5 * 32767)).all()


def test_a_pair_is_seen_one_above_the_other_and_written_as_two_files(tmp_path):
    narrow = Joint(ImagePixels(4, 1, 4), PAIRS.second)
    named = {"images": PICTURES[:, :4, :4], "sound": WAVES}
    seen = narrow.preview(named)
    assert seen.shape == (3, 4 + 8, 8, 1)
    np.testing.assert_array_equal(seen[:, :4, 2:6], PICTURES[:, :4, :4])
    assert (seen[:, :4, [0, 1, 6, 7]] == 255).all()
    narrow.save(named, 1, tmp_path / "x")
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "x.png")), PICTURES[1, :4, :4, 0]
    )
    with wave.open(str(tmp_path / "x.wav")) as file:
        np.testing.assert_array_equal(np.frombuffer(file.readframes(512), np.int16), WAVES[1])


def test_parts_that_cannot_be_one_are_refused():
    with pytest.raises(ValueError, match="of 4 values, and second of 16"):
        Joint(ImagePixels(8, 1, 2), PAIRS.second)
    for first in (PAIRS.second, ImageLatents(8, 1, 4, 1.0)):
        with pytest.raises(ValueError, match="two kinds"):
            Joint(first, PAIRS.second)
    with pytest.raises(
        ConfigError, match=r"first.modality is \"\"; it must be one of image_pixels"
    ):
        tiny_config("--config.data.modality=joint")
    with pytest.raises(ConfigError, match="of 256 values, and second of 64"):
        load_config("say_and_draw", "--config.data.options.second.patch_frames=4")
    with pytest.raises(ConfigError, match=r"did you mean data.options.second.frames"):
        load_config("say_and_draw", "--config.data.options.second.frame=4")


def test_the_shipped_configuration_is_stored_and_set_part_by_part():
    experiment = load_config("say_and_draw", "--config.data.options.second.frames=32")
    assert experiment.modality.second.frames == 32 and experiment.modality.first.size == 32
    assert experiment.network.grid == ((2, 2), (2, 2)) and experiment.network.num_tokens == 8
    assert from_stored(to_stored(experiment)) == experiment


@pytest.mark.parametrize("second", [PAIRS.second, VideoPixels(4, 8, 1, 2, 4)])
def test_every_part_has_position_tables_of_its_own(second):
    joint = Joint(PAIRS.first, second)
    network = dataclasses.replace(tiny_config().network, grid=joint.grid, factorised_positions=True)
    table = network.init_positions(jax.random.key(0))
    order = np.arange(network.num_tokens)[None]
    vectors = np.asarray(position_vectors(table, order, network.position_axes))[0]  # [N, D]
    first, *others = np.split(vectors, [4])
    np.testing.assert_allclose(first[1] - first[0], first[3] - first[2], atol=1e-5)
    assert len(np.unique(vectors.round(4), axis=0)) == network.num_tokens
    further = 1 if second.grid == (1, 4, 4) else 0
    assert len(table) == 2 + 2 + sum(second.grid) + further
    flipped = position_vectors(table, order[:, ::-1], network.position_axes)
    np.testing.assert_array_equal(flipped[0], vectors[::-1])
    assert others[0].std() > 0.5


def test_orders_of_pairs_take_one_part_first_or_all_tokens_in_a_row():
    grid, key = ((3, 4), (2, 3, 2)), jax.random.key(1)
    orders = {name: np.asarray(order(key, grid)) for name, order in ORDERS.items()}
    for order in orders.values():
        np.testing.assert_array_equal(np.sort(order), np.arange(24))
    assert set(orders["first"][:12]) == set(range(12)) == set(orders["second"][12:])
    assert orders["second"][:12].tolist() != list(range(12, 24)), "at random"
    assert math.prod((3, 4)) == 12 and orders["raster"].tolist() == list(range(24))


def test_audio_before_pictures_is_a_pair_too():
    joint = Joint(PAIRS.second, PAIRS.first)
    np.testing.assert_array_equal(joint.named(joint.join(WAVES, PICTURES))["images"], PICTURES)
    assert joint.names == ("sound", "images") and isinstance(joint.first, AudioMel)
