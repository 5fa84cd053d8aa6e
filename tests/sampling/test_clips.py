"""Clips: what sampling gives, how they are continued, and what is written."""

import numpy as np
import pytest
from filled import save_model
from PIL import Image
from tiny import TINY, load_config

import djepa_jax
from djepa_jax.config.places import mask_of
from djepa_jax.main import main

CONFIG = (
    *TINY,
    "--config.data.image_size=8",
    "--config.data.patch_size=4",
    "--config.data.source_options.num_clips=20",
    "--config.sample.order=frame_causal",
)
SHAPE = (8, 8, 8, 1)  # frames, in boxes of two
CLIP = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("clips"), load_config("moving_digits", *CONFIG))


@pytest.fixture(scope="module")
def model(workdir) -> djepa_jax.Model:
    return djepa_jax.load(workdir)


def command(workdir, *arguments) -> int:
    flags = ["djepa_jax", "--config=moving_digits", *CONFIG, f"--workdir={workdir}"]
    return main([*flags, *map(str, arguments)])


@pytest.mark.parametrize(
    ("word", "anew"),
    [
        ("after:2", [2, 3, 4, 5, 6, 7]),
        ("after:6", [6, 7]),
        ("between", [2, 3, 4, 5]),
        ("frames:0-1", [0, 1]),
        ("frames:4-7", [4, 5, 6, 7]),
        ("all", list(range(8))),
    ],
)
def test_words_mean_frames(word, anew):
    mask, stays = mask_of(word, SHAPE[:-1], box=2)
    assert mask.shape == SHAPE[:-1] and stays == 0
    assert list(np.flatnonzero(mask.all((1, 2)))) == list(np.flatnonzero(mask.any((1, 2)))) == anew


@pytest.mark.parametrize("word", ["after:1", "after:8", "after", "frames:2-4", "frames:3-5", "x"])
def test_frames_that_no_token_ends_with_are_refused(word):
    with pytest.raises(ValueError, match=r"after:K.*frames:A-B"):
        mask_of(word, SHAPE[:-1], box=2)
    with pytest.raises(ValueError, match="neither a picture"):
        mask_of("after:2", SHAPE[1:-1])  # of a picture


def test_picture_words_are_for_all_frames_and_samples_are_clips(model):
    mask = mask_of("left", SHAPE[:-1], box=2)[0]
    edited = model.edit(CLIP, "left", [3, 4], seed=1)
    assert edited.shape == (2, *SHAPE) and edited.dtype == np.uint8
    np.testing.assert_array_equal(edited[:, ~mask], np.stack([CLIP[~mask]] * 2))
    np.testing.assert_array_equal(edited, model.edit(CLIP, mask[0], [3, 4], seed=1))
    first = next(model.stream([3, 4], seed=1))  # after the first step of three
    assert first.shape == (2, *SHAPE) and ((first >= 127) & (first <= 128)).mean() > 0.4


def test_a_clip_goes_on_from_frames_that_are_given(model):
    first, second = CLIP.copy(), CLIP.copy()
    second[:4] = 255 - second[:4]
    results = [model.edit(clip, "after:4", 3, seed=1)[0] for clip in (first, second)]
    for clip, result in zip((first, second), results, strict=True):
        np.testing.assert_array_equal(result[:4], clip[:4])
    assert np.abs(results[0][4:].astype(int) - results[1][4:]).max() > 1, "they matter"
    hidden = first.copy()
    hidden[4:] = 0
    np.testing.assert_array_equal(model.edit(hidden, "after:4", 3, seed=1)[0], results[0])
    for clip, mask in ((CLIP[:4], "left"), (CLIP, np.zeros((4, 8, 8), bool))):
        with pytest.raises(ValueError, match="shape|example"):
            model.edit(clip, mask, 3)


def test_sampling_writes_clips_and_film_strips(workdir, model, tmp_path):
    out = tmp_path / "out"
    asked = ("--config.sample.labels=3", "--config.sample.count=2", f"--out={out}/")
    assert command(workdir, "--mode=sample", *asked) == 0
    expected = model.sample([3, 3])
    with np.load(out / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["clips"], expected)
    with Image.open(out / "samples.png") as grid:
        assert grid.width > 8 * grid.height / 3, "a strip of eight frames each"
    np.testing.assert_array_equal(frames_of(out / "000001_3.webp"), expected[1, ..., 0])


def frames_of(path) -> np.ndarray:
    with Image.open(path) as file:
        frames = []
        for number in range(file.n_frames):
            file.seek(number)
            frames.append(np.asarray(file.convert("L")))
    return np.stack(frames)


def test_the_command_continues_an_animation(workdir, model, tmp_path, capsys):
    source, out = tmp_path / "clip.webp", tmp_path / "out"
    frames = [Image.fromarray(frame[..., 0]) for frame in CLIP]
    how = {"save_all": True, "lossless": True}
    frames[0].save(source, append_images=[*frames[1:], frames[0]], **how)  # nine, one too many
    asked = ("--mode=edit", "--mask=after:4", f"--out={out}/", "--config.sample.count=1")
    asked += ("--config.sample.labels=3",)
    assert command(workdir, *asked, f"--source={source}") == 0
    with np.load(out / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["clips"], model.edit(CLIP, "after:4", 3))
    assert (out / "000000_3.gif").exists() and (out / "samples.png").exists()
    assert command(workdir, *asked, "--source=real:3") == 0
    frames[0].save(source, append_images=frames[1:5], **how)
    capsys.readouterr()
    assert command(workdir, *asked, f"--source={source}") == 2
    assert "has 5 frames" in capsys.readouterr().err
    source.write_text("text")
    assert command(workdir, *asked, f"--source={source}") == 2
    assert "not a file of" in capsys.readouterr().err
