"""Animations in folders and tar files as clips."""

import struct
import sys

import numpy as np
import pytest
from animations import FRAMES, animation, write
from pairs import PAIRS
from photos import opened, write_tar
from PIL import Image
from tiny import load_config

from djepa_jax.core.modalities.video import VideoPixels
from djepa_jax.data.images import BrokenImage, center_crop, decode_frames
from djepa_jax.data.loader import example_stream, row_batches
from djepa_jax.data.records import DataError, unwrapped
from djepa_jax.data.summary import describe_clips

CLIPS = VideoPixels(num_frames=4, size=8, channels=3, patch=4)


def cut(frames: np.ndarray, channels: int = 3) -> np.ndarray:
    """The first four, as pictures are cut."""
    return np.stack([center_crop(Image.fromarray(f), 8, channels) for f in frames[:4]])


def test_a_folder_per_class_gives_the_first_frames_cut_as_pictures(tmp_path):
    source = opened("folder", write(tmp_path, **{"a/about.txt": b"text"}), 2, CLIPS)
    assert source.class_names == ("a", "b") and len(source) == 4
    for index in (3, 0, 1, 2):
        np.testing.assert_array_equal(source[index]["example"], cut(FRAMES[index]))
        assert source[index]["condition"] == index // 2
    batch = next(row_batches(example_stream(source, 0, random_flip=True), 4, 0))
    assert batch["example"].shape == (4, 4, 8, 8, 3) and batch["example"].dtype == np.uint8
    said = " ".join(describe_clips(unwrapped(source)))
    assert "4 clips" in said and "of 4 looked at, 0 cannot" in said and "8 x 8 in colour" in said


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_kinds_of_animations_give_their_frames(kind):
    gray = FRAMES[0, ..., 0]  # which a palette holds without loss
    found = list(decode_frames(animation(gray, kind), 10**6, 6))
    np.testing.assert_array_equal([np.asarray(f.convert("L")) for f in found], gray)


def test_tar_files_hold_clips_too(tmp_path):
    members = {f"{i}.webp": animation(clip) for i, clip in enumerate(FRAMES)}
    members |= {f"{i}.cls": b"%d" % (i % 2) for i in range(4)}
    gray = VideoPixels(num_frames=4, size=8, channels=1, patch=4)
    source = opened("tar", write_tar(tmp_path / "clips.tar", members), 2, gray)
    np.testing.assert_array_equal(source[1]["example"], cut(FRAMES[1], 1))
    assert source[1]["condition"] == 1


def test_clips_that_are_too_short_or_damaged_are_named_and_left_out(tmp_path):
    bad = {
        "a/short.gif": animation(FRAMES[0, :3], "GIF"),
        "a/still.png": animation(FRAMES[0, :1], "PNG"),
        "a/cut.webp": animation(FRAMES[0])[:300],
        "b/text.gif": b"text",
    }
    source = opened("folder", write(tmp_path, **bad), 2, CLIPS)
    clips = [cut(frames) for frames in FRAMES]
    for index in range(len(source)):
        assert any((source[index]["example"] == clip).all() for clip in clips)
    assert source.broken.keys() == bad.keys()
    assert source.broken["a/short.gif"] == "it has 3 frames, and clips have 4"
    assert "has 1 frames" in source.broken["a/still.png"]
    assert "of 8 looked at, 4 cannot" in describe_clips(unwrapped(source))[0]
    strict = opened("folder", tmp_path, 2, CLIPS, max_broken=0)
    with pytest.raises(DataError, match="1 of 8 .*a/cut.webp: .*data.max_broken"):
        strict[2]
    longer = VideoPixels(num_frames=8, size=8, channels=3, patch=4)
    with pytest.raises(DataError, match="none of the 8 .*0.webp: it has 6 frames"):
        opened("folder", tmp_path, 2, longer)[0]


def test_transparent_parts_show_white_and_large_frames_are_refused_before_they_are_decoded():
    frames = np.concatenate([FRAMES[0], np.full((6, 12, 20, 1), 255, np.uint8)], -1)
    frames[:, :, :10, 3] = 0
    for kind in ("WEBP", "PNG"):
        found = np.stack(list(decode_frames(animation(frames, kind), 10**6, 6)))
        assert (found[:, :, :10] == 255).all()
        np.testing.assert_array_equal(found[:, :, 10:], FRAMES[0, :, :, 10:])
    with pytest.raises(BrokenImage, match="20 x 12 pixels, the limit is 239"):
        next(decode_frames(animation(FRAMES[0]), 239, 6))
    assert len(list(decode_frames(animation(FRAMES[0]), 240, 5))) == 5


def test_mp4_without_its_package_is_one_error_that_names_it(tmp_path, monkeypatch):
    mp4 = b"\0\0\0\x18ftypisom"
    write(tmp_path, **{"b/x.MP4": mp4})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r'1 mp4 files, such as "b/x.MP4".*djepa_jax\[video\]'):
        opened("folder", tmp_path, 2, CLIPS)
    with pytest.raises(BrokenImage, match=r"djepa_jax\[video\]"):
        next(decode_frames(mp4, 10**6, 4))
    assert unwrapped(opened("folder", tmp_path)).records.left_out[".mp4"] == 1, "of pictures"


def test_mp4_gives_its_frames_upright(tmp_path):
    pytest.importorskip("av")
    frames = np.zeros((4, 16, 32, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:8, : 8 * (number + 1)] = 200  # above, from the left
    (tmp_path / "a").mkdir()
    CLIPS.save({"clips": frames[None]}, 0, tmp_path / "a" / "clip")
    data = (tmp_path / "a" / "clip.mp4").read_bytes()
    found = np.stack(list(decode_frames(data, 10**6, 4))).astype(int)
    assert np.abs(found - frames).mean() < 6
    names = [unwrapped(opened("folder", tmp_path, 1, CLIPS)).key(i) for i in range(3)]
    assert names == ["a/clip.gif", "a/clip.mp4", "a/clip.webp"]
    one = 1 << 16  # what telephones write: shown turned by a quarter to the right
    upright, turned = (one, 0, 0, 0, one), (0, one, 0, -one & 2**32 - 1, 0)
    as_bytes = struct.Struct(">5I").pack
    place = data.index(as_bytes(*upright), data.index(b"tkhd"))
    data = data[:place] + as_bytes(*turned) + data[place + 20 :]
    found = np.stack(list(decode_frames(data, 10**6, 4))).astype(int)
    assert np.abs(found - np.rot90(frames, -1, axes=(1, 2))).mean() < 6
    with pytest.raises(BrokenImage, match="has 4 frames"):
        list(decode_frames(data, 10**6, 5))
    with pytest.raises(BrokenImage, match="cannot be decoded"):
        next(decode_frames(data[:60], 10**6, 4))


@pytest.mark.parametrize(
    ("source", "modality"),
    [("ilsvrc", CLIPS), ("folder", PAIRS), ("folder", VideoPixels(4, 8, 4, 4))],
)
def test_other_sources_and_examples_are_refused(source, modality, tmp_path):
    with pytest.raises(DataError, match="gives square uint8 .*data.modality"):
        opened(source, write(tmp_path), 2, modality)
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="hold no images of GIF, WEBP, PNG, MP4"):
        opened("folder", tmp_path, 3, CLIPS)


def test_options_of_a_source_do_not_stay_with_another(tmp_path):
    write(tmp_path)
    folder = (f"--config.data.path={tmp_path}", "--config.data.source=folder")
    assert load_config("moving_digits").data.source_options
    assert load_config("moving_digits", *folder).data.source_options == {}


def test_what_holds_no_clips_is_left_out(tmp_path):
    """Such as the thumbnails that are kept beside them."""
    write(tmp_path, **{"a/0.webp": animation(FRAMES[0]), "a/0.jpg": b"\xff\xd8\xff"})
    source = unwrapped(opened("folder", tmp_path, 2, CLIPS))
    assert source.records.left_out[".jpg"] == 1
    assert "a/0.webp" in [source.key(index) for index in range(len(source))]
