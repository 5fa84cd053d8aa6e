"""Image files made of the two photographs that scikit-learn ships, folders and tar files of them,
and the settings that open them as a source.
"""

import functools
import io
import pathlib
import tarfile
import types

import numpy as np
from PIL import Image

from djepa_jax.core.modalities import MODALITIES
from djepa_jax.data.sources import open_data

NAMES = ("flower", "temple")  # classes, in the order of their labels
PER_CLASS = 6
PIXELS = MODALITIES["image_pixels"](32, 3, 4)


@functools.cache
def photographs() -> dict[str, Image.Image]:
    """The two photographs, 640 x 427 pixels."""
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    return {"flower": Image.fromarray(flower), "temple": Image.fromarray(temple)}


def crop(name: str, index: int = 0, width: int = 100, height: int = 75) -> Image.Image:
    """One of many different pieces of a photograph."""
    left, top = 83 * index % (640 - width), 59 * index % (427 - height)
    return photographs()[name].crop((left, top, left + width, top + height))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def labelled() -> tuple[tuple[str, bytes, int], ...]:
    """Twelve JPEG files of two classes and several shapes: (key, file, label)."""
    return tuple(
        (f"{name}/{i:03d}", encode(crop(name, i, 90 + 7 * i, 120 - 9 * i)), label)
        for label, name in enumerate(NAMES)
        for i in range(PER_CLASS)
    )


def with_broken(*broken: int) -> list[tuple[str, bytes, int]]:
    """The labelled images, some of them cut in half."""
    return [
        (key, data[: len(data) // 2] if i in broken else data, label)
        for i, (key, data, label) in enumerate(labelled())
    ]


def write_folder(root: pathlib.Path, images=None) -> str:
    """A folder per class."""
    for key, data, _ in images or labelled():
        file = root / f"{key}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return str(root)


def write_tar(file: pathlib.Path, members: dict[str, bytes], **options) -> str:
    """A tar file of plain files."""
    with tarfile.open(file, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(file)


def write_shards(root: pathlib.Path, images=None, shards: int = 3) -> str:
    """Tar files `train-000.tar` and on, with labels in .cls files; the images in turn."""
    images = images or labelled()
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        members = {}
        for key, data, label in images[shard::shards]:
            members |= {f"{key}.jpg": data, f"{key}.cls": f"{label}\n".encode()}
        write_tar(root / f"train-{shard:03d}.tar", members)
    return str(root)


def write_ilsvrc(root: pathlib.Path, images: dict[str, dict[str, bytes]]) -> str:
    """The training archive of ILSVRC 2012 with some images of some WordNet ids, in a folder."""
    root.mkdir(parents=True, exist_ok=True)
    inner = {
        f"{wnid}.tar": pathlib.Path(write_tar(root / "inner.tar", files)).read_bytes()
        for wnid, files in images.items()
    }
    write_tar(root / "ILSVRC2012_img_train.tar", inner)
    return str(root)


def settings(source: str, path="", num_classes: int = 2, **others) -> types.SimpleNamespace:
    """What `config.data` is for a source."""
    defaults = {"class_names": "", "unconditional": False, "random_flip": False}
    defaults |= {"staging": "", "max_broken": 100, "labels": "", "source_options": {}}
    defaults |= {"captions": "", "held_out": 0.0, "modality": "image_latents", "options": {}}
    values = {"source": source, "path": str(path), "num_classes": num_classes}
    return types.SimpleNamespace(**defaults | values | others)


def opened(source: str, path="", num_classes: int = 2, modality=PIXELS, conditioner=None, **others):
    """A source, as training opens it."""
    data = settings(source, path, num_classes, **others)
    network = types.SimpleNamespace(conditioner=conditioner)
    model = types.SimpleNamespace(condition=type(conditioner).__name__)
    of = {"data": data, "modality": modality, "network": network, "model": model}
    return open_data(types.SimpleNamespace(**of))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays agree in shape, type and every value."""
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
