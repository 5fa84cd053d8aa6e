"""Pictures judged by a feature network, against the real ones of a source."""

import functools
from typing import Any

import numpy as np

from djepa_jax.evaluation.features import FROM_FILE, INSTALLED, TRAINED, Features
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.feature_figures import FeatureFigures
from djepa_jax.runtime import distributed

MAX_REAL = 10_000  # pictures that are read from files; of an array, all are taken
BATCH = 1024  # real pictures at a time


class Pictures:
    """`FeatureFigures` of samples against all pictures of a source, or `MAX_REAL` of files.

    Real pictures are looked at with the first samples; that is when a classifier learns from them,
    unless the folder has it from an earlier time.
    """

    def __init__(self, kind: str, source, weights: str = "", folder="", labelled: bool = True):
        example = source[0]["example"]
        if example.dtype != np.uint8 or example.ndim != 3 or example.shape[-1] not in (1, 3):
            raise MetricError(
                f'evaluation.kind "{kind}" judges uint8 pictures with 1 or 3 channels, these are '
                f"{example.dtype} {list(example.shape)}; train with "
                "--config.evaluation.kind=none, and look at samples (--mode=sample)."
            )
        if bool(weights) != (kind in FROM_FILE):
            remedy = "name the file of its weights" if kind in FROM_FILE else "leave it out"
            raise MetricError(
                f'evaluation.weights is "{weights}" with evaluation.kind "{kind}"; {remedy}.'
            )
        if kind not in TRAINED:
            _open(kind, weights)  # now, and not after hours of training
        self._of, self._labelled = (kind, source, weights, str(folder)), labelled
        self._figures: FeatureFigures | None = None

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Take in samples `images` `[n, H, W, C]`, and their labels `[n]` if they are labelled."""
        if self._figures is None:
            kind = self._of[0]
            self.network, reference = _judge(*self._of)
            how = {"classifier": kind in TRAINED}
            self._figures = FeatureFigures(self.network.name, reference, **how)
        if distributed.is_main_process():
            features = self.network(np.asarray(arrays["images"]))
            self._figures.update(features, conditions if self._labelled else None)

    def merge(self, other: "Pictures") -> None:
        """Take in the samples of another one."""
        self._figures.merge(other._figures)

    def result(self) -> dict[str, float]:
        """The figures."""
        return self._figures.result()

    def details(self) -> dict:
        """The network, and what a reader of the figures is to know."""
        about = {"network": self.network.name, "sha256": self.network.sha256}
        if hasattr(self.network, "held_out_accuracy"):
            about["held_out_accuracy"] = self.network.held_out_accuracy
        return about | {"caveats": self._figures.caveats()}


@functools.lru_cache(maxsize=1)
def _open(kind: str, weights: str) -> Features:
    return INSTALLED[kind]() if kind in INSTALLED else FROM_FILE[kind](weights)


@functools.lru_cache(maxsize=1)  # for several evaluations while training
def _judge(kind: str, source, weights: str, folder) -> tuple[Features, dict[str, np.ndarray]]:
    """The network, and its features of the source's pictures."""
    images, labels = read_pictures(source)
    network = TRAINED[kind](images, labels, folder) if kind in TRAINED else _open(kind, weights)
    if not distributed.is_main_process():
        return network, {}
    parts = [network(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
    return network, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_pictures(source) -> tuple[np.ndarray, np.ndarray]:
    """Real pictures uint8 `[n, H, W, C]` and their labels `[n]`, always the same ones."""
    if hasattr(source, "images"):  # an array in memory
        return source.images, source.labels
    chosen = np.random.default_rng(0).permutation(len(source))[:MAX_REAL]
    examples = [source[index] for index in chosen.tolist()]
    return tuple(np.stack([each[key] for each in examples]) for key in ("example", "condition"))
