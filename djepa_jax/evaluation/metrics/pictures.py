"""Pictures judged by a feature network, against the real ones of a source."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.evaluation.features import FEATURES, FROM_FILE, INSTALLED, TRAINED, Features
from djepa_jax.evaluation.features.inception import PUBLISHED
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.feature_figures import FeatureFigures
from djepa_jax.evaluation.metrics.moments import Statistics, read_about, read_statistics
from djepa_jax.runtime import distributed

MAX_REAL = 10_000  # pictures that are read from files; of an array, all are taken
BATCH = 1024  # real pictures at a time


class Pictures:
    """`FeatureFigures` of samples against all pictures of a source, or `MAX_REAL` of files.

    Real pictures are looked at with the first samples; that is when a classifier learns from them,
    unless the folder has it from an earlier time. With a file of statistics as `reference`, means
    and covariances are the file's, and the source, which may be None or of latents, gives what
    looks at neighbours; `shape` is then that of a sample.
    """

    def __init__(
        self,
        kind: str,
        source,
        weights: str = "",
        folder="",
        labelled: bool = True,
        reference: str = "",
        shape: tuple[int, ...] = (),
    ):
        if reference and not (source is not None and is_picture(source[0]["example"])):
            source = None
        elif not is_picture(example := source[0]["example"]):
            raise MetricError(
                f'evaluation.kind "{kind}" judges uint8 pictures with 1 or 3 channels, these are '
                f"{example.dtype} {list(example.shape)}; train with "
                "--config.evaluation.kind=none, and look at samples (--mode=sample)."
            )
        if kind not in TRAINED or weights:
            open_network(kind, weights)  # now, and not after hours of training
        self._reference = _read_reference(reference, kind, weights, shape) if reference else None
        self._of, self._labelled = (kind, source, weights, str(folder)), labelled
        self._figures: FeatureFigures | None = None

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Take in samples `images` `[n, H, W, C]`, and their labels `[n]` if they are labelled."""
        self._begin()
        if distributed.is_main_process():
            features = self.network(np.asarray(arrays["images"]))
            labels = jax.tree.leaves(conditions)[0] if self._labelled else None
            self._figures.update(features, labels)

    def _begin(self) -> None:
        if self._figures is not None:
            return
        self.network, reference = _judge(*self._of)
        how = {"classifier": self._of[0] in TRAINED}
        if self._reference:  # all distances are to the file's statistics
            reference = {tap: rows for tap, rows in reference.items() if tap == "pool"}
            how["statistics"] = self._reference.statistics
        self._figures = FeatureFigures(self.network.name, reference, **how)

    def state(self) -> dict[str, np.ndarray]:
        """What process 0 has taken in."""
        return self._figures.state()

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave; all processes are to call it."""
        self._begin()
        if distributed.is_main_process():
            self._figures.restore(state)

    def merge(self, other: "Pictures") -> None:
        """Take in the samples of another one."""
        self._figures.merge(other._figures)

    def result(self) -> dict[str, float]:
        """The figures."""
        return self._figures.result()

    @property
    def moved(self) -> dict[str, np.ndarray]:
        """How far each sample moves distances and scores, after `result`."""
        return {} if self._figures is None else self._figures.moved

    def trend(self) -> dict[str, float]:
        """Those that take little time."""
        return self._figures.trend()

    def details(self) -> dict:
        """The network, and what a reader of the figures is to know."""
        about = {"network": self.network.name, "sha256": self.network.sha256}
        if hasattr(self.network, "held_out_accuracy"):
            about["held_out_accuracy"] = self.network.held_out_accuracy
        caveats = self._figures.caveats()
        if not getattr(self.network, "is_the_published", True):
            caveats.append(
                f"weights are not the file that published figures are of (sha256 {PUBLISHED}...)"
            )
        if self._reference:
            about["reference"] = self._reference.about | {"sha256": self._reference.sha256}
            caveats += self._reference.caveats
        return about | {"caveats": caveats}


def is_picture(example: np.ndarray) -> bool:
    """Whether networks can look at an example of a source."""
    return example.dtype == np.uint8 and example.ndim == 3 and example.shape[-1] in (1, 3)


def open_network(kind: str, weights: str) -> Features:
    """The network of that name, which does not learn; MetricError if its weights are not named."""
    if bool(weights) != (kind in FROM_FILE):
        remedy = "name the file of its weights" if kind in FROM_FILE else "leave it out"
        raise MetricError(
            f'evaluation.weights is "{weights}" with evaluation.kind "{kind}"; {remedy}.'
        )
    return _open(kind, weights)


@functools.lru_cache(maxsize=len(FEATURES))
def _open(kind: str, weights: str) -> Features:
    return INSTALLED[kind]() if kind in INSTALLED else FROM_FILE[kind](weights)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A file of statistics that is of the network which judges."""

    statistics: dict[str, Statistics]
    about: dict  # what the file says of itself, under `network`, `shape` and others
    sha256: str
    caveats: list[str]


@functools.lru_cache(maxsize=len(FEATURES))
def _read_reference(path: str, kind: str, weights: str, shape: tuple[int, ...]) -> Reference:
    """Read a file of statistics; MetricError unless the network gives features like its."""
    statistics, about, network = read_statistics(path), read_about(path), _open(kind, weights)
    told = f'evaluation.reference "{path}" is of'
    remedy = "name statistics of this network, which --mode=reference makes"
    for key, own in (("network", network.name), ("weights", network.sha256)):
        if about.get(key, own) != own:
            raise MetricError(f"{told} the {key} {about[key]}, these are {own}; {remedy}.")
    features = network(np.zeros((1, *shape), np.uint8))
    for tap, each in statistics.items():
        size = features[tap].shape[1] if tap in features else 0
        if size != len(each.mean):
            raise MetricError(
                f"{told} {len(each.mean)} values of {tap}, {network.name} has {size}; {remedy}."
            )
    found = about.get("shape", list(shape))
    caveats = [f"pictures of the reference are {found}, samples {list(shape)}"]
    caveats *= found != list(shape)
    if "weights" not in about:
        caveats.append("the reference does not tell which weights it is of")
    return Reference(statistics, about, file_sha256(path), caveats)


@functools.lru_cache(maxsize=len(FEATURES))  # for several evaluations while training
def _judge(kind: str, source, weights: str, folder) -> tuple[Features, dict[str, np.ndarray]]:
    """The network, and its features of the source's pictures, if there is one."""
    if source is None:
        return _open(kind, weights), {}
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
