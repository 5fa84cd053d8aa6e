"""Pictures and sounds in pairs: the same class, a function of the number, some held out."""

import numpy as np
import pytest
from pairs import COUNT, PAIRS, write_files
from photos import opened
from scipy.io import wavfile

from djepa_jax.core.modalities.image import ImagePixels
from djepa_jax.data.loader import example_stream
from djepa_jax.data.records import DataError
from djepa_jax.data.sources import SOURCES


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("pairs"))


def paired(files, modality=PAIRS, **options):
    options = {"sound_labels": "digit", "num_pairs": 200} | options
    return opened("paired", "", 10, modality, source_options=files | options)


def numbers(examples) -> np.ndarray:
    """Of pictures, by their brightness, and sounds, by their loudness: `[n, 2]`."""
    pictures, waves = PAIRS.named(np.stack(examples)).values()
    return np.stack([pictures[:, 4, 4, 0], waves[:, 100] // 100], 1).astype(int) - 1


def test_both_of_a_pair_are_of_its_class_and_none_is_held_out(files):
    source = paired(files)
    items = [source[index] for index in range(200)]
    found, labels = numbers([item["example"] for item in items]), [i["condition"] for i in items]
    np.testing.assert_array_equal(found * 7 % 3, np.stack([labels] * 2, 1))
    assert (found % 10 != 0).all() and len(np.unique(found[:, 0])) > 40
    examples, labels = source.held_out(50)
    found = numbers(examples)
    np.testing.assert_array_equal(found * 7 % 3, np.stack([labels] * 2, 1))
    assert (found % 10 == 0).all() and len(np.unique(found)) == COUNT // 10


def test_a_pair_depends_on_its_number_alone(files):
    source, fewer = paired(files), paired(files, num_pairs=7)
    assert len(source) == 200 and len(fewer) == 7
    for index in (6, 0):
        np.testing.assert_array_equal(source[index]["example"], fewer[index]["example"])
    assert source.digest() == paired(files).digest() != fewer.digest()
    np.testing.assert_array_equal(source.held_out(9)[0], fewer.held_out(20)[0][:9])
    assert example_stream(source, 0)[5]["example"].shape == PAIRS.example_shape


def test_small_pictures_get_black_edges(files):
    picture = PAIRS.named(paired(files)[0]["example"][None])["images"][0, ..., 0]
    assert (picture[1:7, 1:7] > 0).all() and picture.sum() == picture[1:7, 1:7].sum()


def test_recordings_may_be_wav_files(files, tmp_path):
    for number in range(COUNT):
        values = np.full(700, 100 * (number + 1), np.int16)
        wavfile.write(tmp_path / f"{number * 7 % 3}_eva_{number:02d}.wav", 8000, values)
    source = paired(files, sounds=str(tmp_path))
    assert numbers([source[0]["example"]]).shape == (1, 2)
    assert sorted(np.unique(source.sounds.labels)) == [0, 1, 2]


def test_what_cannot_be_paired_is_refused(files, tmp_path):
    with pytest.raises(DataError, match="data.modality=joint"):
        paired(files, ImagePixels(8, 1, 4))
    for change in ({"pictures": ""}, {"sounds": ""}, {"num_pairs": 0}, {"num_pairs": 2.5}):
        with pytest.raises(DataError, match="name both files"):
            paired(files, **change)
    with pytest.raises(DataError, match=r"sounds \".*sounds.npz\" is no npz file"):
        paired(files, sound_labels="word")
    np.savez(tmp_path / "x.npz", images=np.zeros((60, 9, 6), np.uint8), labels=np.arange(60) % 3)
    with pytest.raises(DataError, match="at most"):
        paired(files, pictures=str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", images=np.zeros((60, 6, 6), np.uint8), labels=np.arange(60) % 4)
    with pytest.raises(DataError, match="the same classes"):
        paired(files, pictures=str(tmp_path / "x.npz"))
    with pytest.raises(DataError, match="not sound"):
        opened(
            "paired",
            modality=PAIRS,
            source_options=files | {"sound_labels": "digit"},
            random_flip=True,
        )
    assert "paired" in SOURCES
