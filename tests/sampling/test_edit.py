"""Editing: what stays, what is drawn, and what wrong masks get."""

import numpy as np
import pytest
from filled import save_model
from PIL import Image
from small_autoencoder import NAME, registered, write_weights
from tiny import CONFIG, TINY, tiny_config

import djepa_jax
from djepa_jax.config.places import mask_of
from djepa_jax.core.modalities.image import ImagePixels
from djepa_jax.data.arrays import load_digits
from djepa_jax.main import main
from djepa_jax.sampling.edit import hidden_tokens

MODALITY = ImagePixels(8, 1, 2)  # 16 tokens of 2 x 2 pixels
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("filled"), tiny_config())


@pytest.fixture(scope="module")
def model(workdir) -> djepa_jax.Model:
    return djepa_jax.load(workdir)


@pytest.mark.parametrize("size", [8, 9])
def test_words_are_halves_and_the_middle(size):
    shape = (size, size + 1)
    left, right, top, bottom, centre, everything = (
        mask_of(word, shape)[0] for word in ("left", "right", "top", "bottom", "centre", "all")
    )
    assert (left ^ right).all() and (top ^ bottom).all() and everything.all()
    assert left[:, 0].all() and top[0].all() and not left[:, -1].any() and not top[-1].any()
    assert centre[size // 2, size // 2] and not centre[0].any() and not centre[:, 0].any()
    np.testing.assert_array_equal(centre, centre[::-1, ::-1])


@pytest.mark.parametrize("word", ["lef", "random", "random:x", "random:1.5", "random:nan", ""])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match="mask"):
        mask_of(word, (8, 8))


@pytest.mark.parametrize(
    ("word", "first", "last"),
    [
        ("left", 0, 50),
        ("right", 50, 100),
        ("centre", 25, 75),
        ("middle:0.3", 35, 65),
        ("middle:0", 50, 50),
        ("seconds:0.3-0.6", 30, 60),
        ("all", 0, 100),
    ],
)
def test_words_mean_times_of_sounds(word, first, last):
    mask, stays = mask_of(word, (100,), rate=100)
    assert mask.shape == (100,) and stays == 0
    assert list(np.flatnonzero(mask)) == list(range(first, last))


@pytest.mark.parametrize("word", ["top", "seconds:0.5", "seconds:0.6-0.3", "seconds:0-2", "middle"])
def test_times_that_are_none_are_refused(word):
    with pytest.raises(ValueError, match="seconds from 0 to 1 "):
        mask_of(word, (100,), rate=100)


def test_a_token_is_hidden_if_any_of_its_pixels_is():
    mask = np.zeros((2, 8, 8), bool)
    mask[0, 3, 4] = mask[1, 0, 0] = True
    hidden = hidden_tokens(MODALITY, mask, 0.0, 0)
    assert [list(np.flatnonzero(row)) for row in hidden] == [[1 * 4 + 2], [0]]
    with pytest.raises(ValueError, match="from 1 to 16"):
        hidden_tokens(MODALITY, np.stack([mask[0], np.ones((8, 8), bool)]), 0.0, 0)


def test_what_is_kept_depends_on_the_seed_and_the_number_of_the_picture():
    mask = np.ones((3, 8, 8), bool)
    hidden = hidden_tokens(MODALITY, mask, 0.25, 7)
    assert (hidden.sum(axis=1) == 12).all() and (hidden[0] != hidden[1]).any()
    np.testing.assert_array_equal(hidden[:1], hidden_tokens(MODALITY, mask[:1], 0.25, 7))
    assert (hidden != hidden_tokens(MODALITY, mask, 0.25, 8)).any()
    for keep in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="keep"):
            hidden_tokens(MODALITY, mask, keep, 0)


def test_what_is_not_masked_stays_to_the_bit(model):
    one_pixel = np.zeros((8, 8), bool)
    one_pixel[5, 2] = True
    for mask in (one_pixel, mask_of("left", (8, 8))[0]):
        edited = model.edit(PICTURE, mask, [3, 3], seed=1)
        assert edited.shape == (2, 8, 8, 1) and edited.dtype == np.uint8
        np.testing.assert_array_equal(edited[:, ~mask], np.stack([PICTURE[~mask]] * 2))
        assert (edited[0] != edited[1]).any(), "two of one class differ"
    np.testing.assert_array_equal(model.edit(PICTURE, ~one_pixel & one_pixel, 3), PICTURE[None])


def test_a_mask_over_everything_is_a_sample(model):
    np.testing.assert_array_equal(
        model.edit(PICTURE, "all", [3, 4], seed=5), model.sample([3, 4], seed=5)
    )
    kept = model.edit(PICTURE, "random:0.5", [3, 4], seed=5)
    same = (kept == PICTURE).reshape(2, 4, 2, 4, 2).all((2, 4)).reshape(2, 16)
    assert (same.sum(axis=1) >= 8).all() and (same.sum(axis=1) < 16).all()
    np.testing.assert_array_equal(kept, model.edit(PICTURE, "all", [3, 4], keep=0.5, seed=5))


def test_a_result_depends_on_its_seed_number_and_condition_alone(model):
    many = model.edit(PICTURE, "top", [1, 2, 3, 4, 5], seed=2)
    np.testing.assert_array_equal(model.edit(PICTURE, "top", [1, 2], seed=2), many[:2])
    for change in ({"seed": 3}, {"labels": [6, 2]}):
        other = model.edit(PICTURE, "top", **{"labels": [1, 2], "seed": 2} | change)
        assert np.abs(other[0].astype(int) - many[0]).max() > 1


def test_what_is_known_matters(model):
    other = PICTURE.copy()
    other[:4] = 255 - other[:4]
    first, second = (model.edit(each, "bottom", 3, seed=1)[0] for each in (PICTURE, other))
    assert np.abs(first[4:].astype(int) - second[4:]).max() > 1


def test_wrong_calls_are_refused(model):
    for example, mask, labels in (
        (PICTURE[:4], "left", 3),
        (PICTURE.astype(np.float32), "left", 3),
        (np.stack([PICTURE] * 3), "left", [1, 2]),
        (PICTURE, np.zeros((4, 4), bool), 3),
        (PICTURE, "lft", 3),
    ):
        with pytest.raises(ValueError):
            model.edit(example, mask, labels)


def test_latents_are_decoded_and_what_is_kept_is_pasted(tmp_path):
    with registered():
        weights = write_weights(tmp_path / "weights.safetensors")
        config = tiny_config(
            "--config.data.modality=image_latents",
            "--config.evaluation.kind=none",
            "--config.data.channels=4",
            "--config.sample.num_ar_steps=1",
            f"--config.autoencoder.name={NAME}",
        )
        model = djepa_jax.load(save_model(tmp_path / "run", config), autoencoder=weights)
        shape = model.config.picture_shape
        picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        mask = mask_of("right", shape[:2])[0]
        edited = model.edit(picture, mask, [1, 2])
    np.testing.assert_array_equal(edited[:, ~mask], np.stack([picture[~mask]] * 2))
    assert (edited[0, mask] != picture[mask]).any()


def edit(workdir, *arguments) -> int:
    flags = ["djepa_jax", f"--config={CONFIG}", *TINY, f"--workdir={workdir}", "--mode=edit"]
    return main([*flags, *map(str, arguments)])


def test_the_command_writes_what_the_interface_gives(workdir, model, tmp_path):
    source, mask, out = tmp_path / "picture.png", tmp_path / "mask.png", tmp_path / "out"
    Image.fromarray(PICTURE[..., 0]).save(source)
    where = mask_of("centre", (8, 8))[0]
    Image.fromarray(where).save(mask)
    asked = ("--config.sample.labels=3", "--config.sample.count=2", "--config.sample.seed=4")
    assert edit(workdir, f"--source={source}", f"--mask={mask}", f"--out={out}/", *asked) == 0
    expected = model.edit(PICTURE, where, [3, 3], seed=4)
    with np.load(out / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected)
    for number, image in enumerate(expected):
        written = np.asarray(Image.open(out / f"{number:06d}_3.png"))
        np.testing.assert_array_equal(written, image[..., 0])
    assert len(np.unique(np.asarray(Image.open(out / "samples.png")))) > 8


@pytest.mark.parametrize(
    ("mask", "said"),
    [("nothing.png", "nothing.png"), ("other.png", "4 x 4"), ("text.png", "not a file of")],
)
def test_bad_files_are_one_line(mask, said, workdir, tmp_path, capsys):
    source = tmp_path / "picture.png"
    Image.fromarray(PICTURE[..., 0]).save(source)
    Image.new("L", (4, 4)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no picture")
    assert edit(workdir, f"--source={source}", f"--mask={tmp_path / mask}") == 2
    assert said in capsys.readouterr().err
    assert edit(workdir, f"--source={tmp_path / 'none.png'}", "--mask=left") == 2
    assert "none.png" in capsys.readouterr().err


def test_an_example_of_the_data_is_edited_by_its_number(workdir, tmp_path, capsys):
    out = tmp_path / "out.npz"
    asked = ("--mask=left", f"--out={out}", "--config.sample.count=1")
    assert edit(workdir, "--source=real:5", *asked) == 0
    with np.load(out) as arrays:
        edited = arrays["arr_0"][0]
    np.testing.assert_array_equal(edited[:, 4:], load_digits().images[5][:, 4:])
    for number in ("1797", "-1", "x", ""):
        capsys.readouterr()
        assert edit(workdir, f"--source=real:{number}", *asked) == 2
        assert "from 0 to 1796" in capsys.readouterr().err
