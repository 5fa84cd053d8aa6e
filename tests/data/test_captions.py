"""Captions of every source: they stay with their pictures, are checked at once, and held out."""

import json
import pathlib
import types

import numpy as np
import pytest
from photos import PIXELS, labelled, opened, same, with_broken, write_folder, write_tar
from scipy.io import wavfile

from djepa_jax.core.modalities.audio import AudioMel
from djepa_jax.core.models.text import Embeddings, Text
from djepa_jax.data.captions import captioned, conditions_to_judge
from djepa_jax.data.records import DataError, digest_of

TEXT = Text(2, length=12, width=8, num_heads=2)
VECTORS = Embeddings(2, length=3, width=8, num_heads=2, channels=5)
WORDS = [f"crop {index} \u00e9" for index in range(12)]
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)


def npz(folder: pathlib.Path, **arrays) -> pathlib.Path:
    np.savez(folder / "x.npz", **{"images": IMAGES, "captions": np.array(WORDS)} | arrays)
    return folder / "x.npz"


def folder(root: pathlib.Path, texts: dict | None = None, images=None) -> pathlib.Path:
    """The pictures in a folder per class, and a file with the caption of each."""
    write_folder(root, images)
    keys = [f"{key}.jpg" for key, _, _ in labelled()]
    texts = dict(zip(keys, WORDS, strict=True)) | (texts or {})
    (root / "captions.json").write_text(json.dumps(texts))
    return root


def tar(root: pathlib.Path, texts: dict | None = None) -> pathlib.Path:
    """The pictures and their captions in a tar file; there are no labels."""
    members = {}
    for (key, data, _), text in zip(labelled(), WORDS, strict=True):
        members |= {f"{key}.jpg": data, f"{key}.txt": f"{text}\n".encode()}
    write_tar(root / "x.tar", {k: v for k, v in (members | (texts or {})).items() if v is not None})
    return root


KINDS = {"npz": npz, "folder": folder, "tar": tar}


def words(source) -> list[str]:
    return [TEXT.decode(source[index]["condition"]) for index in range(len(source))]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_stay_with_their_pictures(kind, tmp_path):
    source = opened(kind, KINDS[kind](tmp_path), num_classes=0, conditioner=TEXT)
    assert words(source) == WORDS and source[3]["condition"].dtype == np.uint8
    (tmp_path / "plain").mkdir()
    labels = {"labels": np.zeros(12, int)} if kind == "npz" else {}
    plain = (npz if kind == "npz" else folder)(tmp_path / "plain", **labels)
    plain = opened("npz" if kind == "npz" else "folder", plain, num_classes=0)
    for index in (0, 5, 11):
        assert same(source[index]["example"], plain[index]["example"])
    assert digest_of(source) != digest_of(plain)
    assert "12 captions to learn" in captioned(source).note and "cut" not in captioned(source).note


def test_the_place_of_captions_can_be_told(tmp_path):
    texts = np.array(WORDS[::-1])
    source = opened("npz", npz(tmp_path, said=texts), captions="said", conditioner=TEXT)
    assert words(source) == WORDS[::-1]
    folder(tmp_path / "pictures")
    (tmp_path / "pictures" / "captions.json").rename(tmp_path / "mine.json")
    where = {"captions": "../mine.json", "conditioner": TEXT}
    assert words(opened("folder", tmp_path / "pictures", **where)) == WORDS
    more = {"flower/000.caption": b"mine"} | {f"{key}.caption": b"x" for key, *_ in labelled()[1:]}
    (tmp_path / "tar").mkdir()
    source = opened("tar", tar(tmp_path / "tar", more), captions="caption", conditioner=TEXT)
    assert words(source) == ["mine"] + ["x"] * 11


def test_the_next_picture_of_a_broken_one_has_its_own_caption(tmp_path):
    source = opened("folder", folder(tmp_path, images=with_broken(1)), conditioner=TEXT)
    assert words(source) == [WORDS[0], WORDS[2], *WORDS[2:]] and len(source.broken) == 1
    pictures, captions = captioned(source).pairs(range(4))
    assert captions == [WORDS[0], *WORDS[2:4]] and len(pictures) == 3


def test_what_is_too_long_is_cut_counted_and_said(tmp_path):
    long = np.array(["elephants \u00e9\u00e9", *WORDS[1:]])  # 14 bytes
    source = opened("npz", npz(tmp_path, captions=long), conditioner=TEXT)
    assert words(source)[0] == "elephants \u00e9" and "; 1 are cut at 12" in captioned(source).note


@pytest.mark.parametrize(
    ("kind", "texts", "message"),
    [
        ("folder", {"flower/002.jpg": None}, "1 of 12 .*first is flower/002.jpg; add"),
        ("folder", {"flower/002.jpg": " \n", "temple/005.jpg": ""}, "2 of 12 .*flower/002.jpg"),
        ("folder", {"flower/002.jpg": 3}, "flower/002.jpg is no text"),
        ("folder", {"flower/002.jpg": "\ud800"}, "flower/002.jpg is no text in UTF-8"),
        ("tar", {"flower/002.txt": None}, "1 of 12 .*x.tar:flower/002.jpg; add"),
        ("tar", {"flower/002.txt": b"\xff\xfe"}, "x.tar:flower/002.jpg is no text in UTF-8"),
    ],
)
def test_captions_that_cannot_be_read_are_named(kind, texts, message, tmp_path):
    with pytest.raises(DataError, match=message):
        opened(kind, KINDS[kind](tmp_path, texts), conditioner=TEXT)


@pytest.mark.parametrize(
    ("arrays", "conditioner", "message"),
    [
        ({"captions": np.array([*WORDS[1:], "  "])}, TEXT, "1 of 12 .*first is 11; add"),
        ({"captions": np.array(WORDS[1:])}, TEXT, r"shape \[11\]; it needs texts \[12\]"),
        ({"captions": np.arange(12)}, TEXT, "int64 .*needs texts"),
        ({"captions": np.array([*WORDS[1:], None])}, TEXT, "cannot|Object arrays"),
        ({}, VECTORS, 'no array "embeddings"'),
        ({"embeddings": np.zeros((12, 4, 6))}, VECTORS, r"needs floats \[12, L, 5\]"),
        ({"embeddings": np.zeros((12, 5))}, VECTORS, r"needs floats \[12, L, 5\]"),
        ({"embeddings": np.full((12, 4, 5), np.nan)}, VECTORS, "not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, conditioner, message, tmp_path):
    with pytest.raises(DataError, match=message):
        opened("npz", npz(tmp_path, **arrays), conditioner=conditioner)


def test_captions_where_there_can_be_none_are_refused(tmp_path):
    cases = {
        "folder": (folder(tmp_path / "a"), VECTORS, {}),
        "synthetic": ("", TEXT, {"captions": "x"}),
        "npz": (npz(tmp_path), None, {"captions": "captions"}),
        "tar": (tar(tmp_path), TEXT, {"unconditional": True}),
    }
    for kind, (path, conditioner, more) in cases.items():
        with pytest.raises(DataError, match="captions"):
            opened(kind, path, conditioner=conditioner, modality=PIXELS, **more)
    (tmp_path / "a" / "captions.json").write_text("[1")
    with pytest.raises(DataError, match="captions.json cannot be read"):
        opened("folder", tmp_path / "a", conditioner=TEXT)
    with pytest.raises(DataError, match=r"reads arrays of shape \(12,\)"):  # labels
        opened("synthetic", conditioner=TEXT)


def test_outputs_of_an_encoder_are_cut_and_filled_up(tmp_path):
    outputs = np.random.default_rng(0).normal(size=(12, 4, 5)).astype(np.float16)
    source = opened("npz", npz(tmp_path, embeddings=outputs), conditioner=VECTORS)
    assert same(source[2]["condition"], outputs[2, :3].astype(np.float32))
    assert "12 are cut at 3 places" in captioned(source).note
    short = opened("npz", npz(tmp_path, embeddings=outputs[:, :2]), conditioner=VECTORS)
    assert same(short[2]["condition"][:2], outputs[2, :2].astype(np.float32))
    assert not short[2]["condition"][2:].any()


def test_a_share_of_the_captions_is_held_out(tmp_path):
    whole = opened("npz", npz(tmp_path), conditioner=TEXT)
    source = opened("npz", npz(tmp_path), conditioner=TEXT, held_out=0.4)
    held_out = [WORDS[row] for row in source.held_out]
    assert 0 < len(held_out) < 12 and sorted(words(source) + held_out) == sorted(WORDS)
    more = opened("npz", npz(tmp_path), conditioner=TEXT, held_out=0.6)
    assert {*source.held_out} < {*more.held_out}  # by its caption alone
    for index in range(len(source)):
        assert same(source[index]["example"], IMAGES[WORDS.index(words(source)[index])])
    assert digest_of(source) != digest_of(whole)
    with pytest.raises(DataError, match="leaves none"):
        opened("npz", npz(tmp_path), conditioner=TEXT, held_out=0.999)


def test_samples_to_judge_are_of_held_out_captions_and_others(tmp_path):
    source = opened("npz", npz(tmp_path), conditioner=TEXT, held_out=0.4)
    experiment = types.SimpleNamespace(network=types.SimpleNamespace(conditioner=TEXT))
    asked = [TEXT.decode(row) for row in conditions_to_judge(experiment, source, 30)]
    held_out = {WORDS[row] for row in source.held_out}
    assert {*asked[::2]} == held_out and {*asked[1::2]} == {*WORDS} - held_out
    again = conditions_to_judge(experiment, source, 7)
    assert [TEXT.decode(row) for row in again] == asked[:7]
    assert not np.any(conditions_to_judge(experiment, None, 3))  # nothing is said


def test_pictures_without_an_ending_may_have_captions(tmp_path):
    write_tar(tmp_path / "x.tar", {"a": labelled()[0][1], "a.txt": b"one", "b.txt": b"no picture"})
    source = opened("tar", tmp_path, conditioner=TEXT)
    assert words(source) == ["one"]
    assert captioned(source).source.records.left_out == {".txt": 1}


def test_captions_stay_with_their_recordings(tmp_path):
    """Below a folder, by the names of wav files there."""
    sounds = AudioMel(frames=32, patch_frames=8)
    for name, value in (("a/two.wav", 200), ("a/one.wav", 100), ("b.d/x.wav", 300)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        wave = np.full(sounds.example_shape, value, np.int16)
        wavfile.write(tmp_path / name, sounds.rate, wave)
    texts = {"a/one.wav": "1", "a/two.wav": "2", "b.d/x.wav": "3"}
    (tmp_path / "captions.json").write_text(json.dumps(texts))
    options = {"num_classes": 0, "conditioner": TEXT, "modality": sounds}
    source = opened("folder", tmp_path, **options)
    heard = [int(source[index]["example"].max()) for index in range(3)]
    assert dict(zip(words(source), heard, strict=True)) == {"1": 100, "2": 200, "3": 300}
    del texts["a/two.wav"]
    (tmp_path / "captions.json").write_text(json.dumps(texts))
    with pytest.raises(DataError, match="no caption.*a/two.wav"):
        opened("folder", tmp_path, **options)
