"""A feature network that takes no time: the rows of pixels; and a sampler that draws pictures."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from djepa_jax.core import sharding
from djepa_jax.data.arrays import load_digits
from djepa_jax.evaluation import features
from djepa_jax.evaluation.metrics import pictures
from djepa_jax.sampling.generator import Generator

PARAMS = {"w": jnp.arange(3.0)}
DIGITS = load_digits()


class Rows:
    """The mean of every row of pixels as features, and a logit for the class of known pictures."""

    name, sha256, held_out_accuracy = "rows", "0" * 64, 0.5

    def __init__(self):
        self.seen = 0

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.seen += len(images)
        pool = np.float32(images.mean((2, 3)))  # [n, 8]
        return {"pool": pool, "logits": np.eye(10, dtype=np.float32)[self.classes(images)]}

    def classes(self, images: np.ndarray) -> np.ndarray:
        """The labels of digits that are known, of others 0."""
        known = {image.tobytes(): label for image, label in zip(*self.data, strict=True)}
        return np.array([known.get(image.tobytes(), 0) for image in images])

    data = DIGITS.images, DIGITS.labels


def drawing(images: np.ndarray, *changes: str) -> Generator:
    """One that draws these pictures, in batches of 16, for the classes that are asked for."""
    experiment = tiny_config("--config.sample.batch_size=16", *changes)
    tokens = np.asarray(experiment.modality.tokenize(images))

    def sampler(config, mesh):
        return lambda params, inputs: tokens[np.asarray(inputs.conditions)]

    return Generator(experiment, sharding.make_mesh((-1, 1, 1)), sampler=sampler)


def firsts() -> np.ndarray:
    """A real digit of each class."""
    return np.stack([DIGITS.images[np.argmax(DIGITS.labels == label)] for label in range(10)])


@pytest.fixture
def network(monkeypatch) -> Rows:
    """In place of the classifier and of EfficientNet."""
    rows = Rows()
    monkeypatch.setitem(features.TRAINED, "classifier", lambda images, labels, folder: rows)
    monkeypatch.setitem(features.INSTALLED, "efficientnet_lite0", lambda: rows)
    cached = (pictures._open, pictures._judge, pictures._read_reference)
    for function in cached:
        function.cache_clear()
    yield rows
    for function in cached:
        function.cache_clear()
