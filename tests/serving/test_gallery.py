"""The gallery: one file, every picture of which can be read, and what is refused."""

import base64
import html.parser
import io

import numpy as np
import pytest
from growing import GrowingModel, grow
from PIL import Image, ImageSequence
from tiny import run

from djepa_jax.runtime.errors import UserError
from djepa_jax.sampling import model as model_module
from djepa_jax.serving import gallery
from djepa_jax.serving.gallery import MARK, run_gallery


class Page(html.parser.HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def model(monkeypatch) -> GrowingModel:
    model = GrowingModel("--config.sample.count=12", "--config.sample.num_ar_steps=8")
    monkeypatch.setattr(model_module, "grow", grow)
    monkeypatch.setattr(gallery, "load_model", lambda *arguments: (model, model.config))
    return model


def data(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(";base64,")[2])))


def test_samples_grow_in_one_file_that_needs_nothing_else(model, tmp_path):
    model.config = model.config.updated({"data.class_names": ("<b>&'\"", *"123456789")})
    path = run_gallery(model.config, str(tmp_path / "<i>"), str(tmp_path / "gallery.html"))
    source = path.read_text()
    page = Page(source)
    assert MARK in source and "{{" not in source and "http:" not in source
    assert {"b", "i", "script"}.isdisjoint(tag for tag, _ in page.tags)
    assert "<i>" in page.text and "<b>&'\"" in page.text and "num_ar_steps" in page.text
    places = [of[key] for _, of in page.tags for key in ("src", "href", "srcset") if key in of]
    assert len(places) == 3 * 12 and all(place.startswith("data:image/") for place in places)
    assert sum(tag == "section" for tag, _ in page.tags) == 10, "a section for each class"
    wanted = model.drawn([*range(10), 0, 1], seed=model.config.sample.seed)
    order = [0, 10, 1, 11, *range(2, 10)]  # by class
    images = [of["src"] for tag, of in page.tags if tag == "img"]
    for index, address in zip(order, images, strict=True):
        frames = [np.array(x.convert("RGB")) for x in ImageSequence.Iterator(data(address))]
        assert len(frames) == 8
        np.testing.assert_array_equal(frames[-1][..., :1], wanted[index])
        assert (frames[0] == 128).mean() > (frames[3] == 128).mean(), "it grows"
    stills = [of["srcset"] for tag, of in page.tags if tag == "source"]
    np.testing.assert_array_equal(np.asarray(data(stills[0])), wanted[0, ..., 0])


def test_clips_move_beside(model, tmp_path):
    changes = {"data.modality": "video_pixels", "data.options": {"num_frames": 4}}
    model.config = model.config.updated(changes | {"sample.count": 2})
    page = Page(run_gallery(model.config, str(tmp_path)).read_text())
    images = [data(of["src"]) for tag, of in page.tags if tag == "img"]
    assert [image.format for image in images] == ["WEBP", "GIF"] * 2
    assert images[0].size == (4 * 9 - 1, 8) and images[1].n_frames == 4


def test_files_of_others_stay_and_size_is_bounded(model, tmp_path, monkeypatch, capsys):
    path = run_gallery(model.config, str(tmp_path))
    assert run_gallery(model.config, str(tmp_path)) == path, "its own is replaced"
    monkeypatch.setattr(gallery, "MAX_BYTES", 1000)
    before = path.read_text()
    with pytest.raises(UserError, match="more than 1,000 bytes; lower"):
        run_gallery(model.config, str(tmp_path))
    assert path.read_text() == before
    path.write_text("precious")
    words = ("--mode=gallery", f"--workdir={tmp_path}", "--config.data.num_classes=10")
    assert run(*words) == 2 and "file of others" in capsys.readouterr().err
    assert (
        run(*words, "--config.sample.count=401") == 2 and "at most 400" in capsys.readouterr().err
    )
    assert path.read_text() == "precious"
