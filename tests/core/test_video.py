"""Clips as tokens."""

import jax
import numpy as np
import pytest
from PIL import Image

from djepa_jax.core.modalities.image import sample_posterior
from djepa_jax.core.modalities.video import VideoLapped, VideoLatents, VideoPixels

MODALITY = VideoPixels(num_frames=4, size=6, channels=3, patch=3, patch_frames=2)
LATENTS = VideoLatents(4, 6, 3, 3, 2, scale=0.5, shift=-1.0)
CLIPS = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 6, 3), np.uint8)


def test_a_token_is_a_box_and_clips_come_back_to_the_bit():
    tokens = np.asarray(jax.jit(MODALITY.tokenize)(CLIPS))
    assert tokens.shape == (2, 8, 54) and MODALITY.grid == (2, 2, 2)
    box = CLIPS[1, 2:, :3, 3:]  # the later half in time, above, right
    np.testing.assert_allclose(
        np.sort(tokens[1, 5]), np.sort(box.ravel().astype(np.float32) / 127.5 - 1), atol=1e-6
    )
    np.testing.assert_array_equal(MODALITY.export(tokens)["clips"], CLIPS)


def test_lapped_frames_are_those_of_pictures_in_pairs():
    lapped = VideoLapped(4, 6, 3, 3, cutoff=1.5, colour_cutoff=1.5)
    tokens = np.asarray(jax.jit(lapped.tokenize)(CLIPS))
    assert tokens.shape == (2, 8, lapped.token_dim) and lapped.token_dim == 54
    later = np.asarray(lapped.frame.tokenize(CLIPS[1, 2:]))  # [2 frames, 4 windows, 27]
    np.testing.assert_allclose(tokens[1, 4:], np.concatenate(later, axis=-1), atol=1e-5)
    np.testing.assert_array_equal(lapped.export(tokens)["clips"], CLIPS)
    coarse = VideoLapped(4, 6, 3, 3, cutoff=0.4)
    assert coarse.token_dim < 54 and coarse.export(coarse.tokenize(CLIPS))["clips"].std() > 9


def test_places_of_a_clip_are_those_of_its_boxes():
    places = np.zeros((1, 4, 6, 6), bool)
    places[0, 1, 5, 2] = True
    np.testing.assert_array_equal(np.flatnonzero(MODALITY.tokens_at(places)[0]), [2])
    first_frame = np.arange(4)[:, None, None] == 0
    hidden = MODALITY.tokens_at(np.broadcast_to(first_frame, (1, 4, 6, 6)))
    np.testing.assert_array_equal(np.flatnonzero(hidden[0]), [0, 1, 2, 3])


def test_a_strip_shows_the_frames_in_turn_and_files_keep_them(tmp_path):
    strip = MODALITY.preview({"clips": CLIPS})
    assert strip.shape == (2, 6, 4 * 7 - 1, 3)
    for frame in range(4):
        np.testing.assert_array_equal(strip[0][:, 7 * frame : 7 * frame + 6], CLIPS[0, frame])
    MODALITY.save({"clips": CLIPS}, 1, tmp_path / "clip")
    with Image.open(tmp_path / "clip.webp") as file:
        assert file.n_frames == 4
        for number in range(4):
            file.seek(number)
            np.testing.assert_array_equal(np.asarray(file.convert("RGB")), CLIPS[1, number])
    with Image.open(tmp_path / "clip.gif") as file:
        assert file.n_frames == 4


@pytest.mark.parametrize("change", [{"num_frames": 5}, {"size": 7}, {"patch_frames": 0}])
def test_boxes_must_divide_the_clip(change):
    settings = dict(num_frames=4, size=6, channels=3, patch=3, patch_frames=2)
    with pytest.raises(ValueError, match="not divisible"):
        VideoPixels(**settings | change)


@pytest.mark.parametrize("clip", [CLIPS[0][:3], CLIPS[0].astype(np.float32), CLIPS[0][..., :1]])
def test_other_clips_are_refused(clip):
    with pytest.raises(ValueError, match="num_frames"):
        MODALITY.check_example(clip)


def test_boxes_of_latents_are_shifted_and_scaled_and_come_back():
    latents = np.random.default_rng(1).standard_normal((2, 4, 6, 6, 3)).astype(np.float32)
    tokens = np.asarray(LATENTS.tokenize(latents))
    box = (latents[1, 2:, :3, 3:] + 1) * 0.5
    np.testing.assert_array_equal(np.sort(tokens[1, 5]), np.sort(box.ravel()))
    np.testing.assert_allclose(LATENTS.export(tokens)["latents"], latents, atol=1e-6)
    moments = np.concatenate([latents, np.full_like(latents, -2)], -1)
    np.testing.assert_array_equal(LATENTS.tokenize(moments), tokens)
    drawn = LATENTS.export(LATENTS.tokenize(moments, jax.random.key(0)))["latents"]
    noise = jax.random.normal(jax.random.key(0), latents.shape)
    np.testing.assert_allclose(drawn, sample_posterior(moments, noise), atol=1e-6)
    for example in (latents[0], moments[0]):
        LATENTS.check_example(example)
    for example in (latents[0, 0], moments[0, :2], CLIPS[0]):
        with pytest.raises(ValueError, match="num_frames"):
            LATENTS.check_example(example)


def test_places_of_pictures_are_those_of_their_latents_which_alone_show_nothing(tmp_path):
    places = np.zeros((1, 4, 96, 96), bool)  # 16 pixels for each latent
    places[0, 2, 47, 48] = True
    np.testing.assert_array_equal(np.flatnonzero(LATENTS.tokens_at(places)[0]), [5])
    arrays = {"latents": np.ones((1, 4, 6, 6, 3), np.float32)}
    assert LATENTS.preview(arrays) is None
    LATENTS.save(arrays, 0, tmp_path / "clip")
    np.testing.assert_array_equal(np.load(tmp_path / "clip.npy"), arrays["latents"][0])
    assert LATENTS.preview(arrays | {"clips": CLIPS[:1]}).shape == (1, 6, 27, 3)
