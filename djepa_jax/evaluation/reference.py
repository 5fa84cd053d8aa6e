"""The `--mode=reference` command: statistics of a network's features of pictures, in a file."""

import contextlib

import numpy as np
from etils import epath

from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.data.loader import in_batches
from djepa_jax.data.records import ImageSource, SkipBroken, Source, digest_of, unwrapped
from djepa_jax.data.sources import open_data, open_source, pictures_of
from djepa_jax.evaluation.features import FROM_FILE, INSTALLED
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.moments import KEYS, Moments, write_statistics
from djepa_jax.evaluation.metrics.pictures import is_picture, open_network
from djepa_jax.runtime.progress import Progress
from djepa_jax.runtime.storage import PathError, as_path, check_writable

BATCH = 256  # pictures at a time


def run_reference(experiment: Experiment, out: str, overwrite: bool = False) -> epath.Path:
    """Write the statistics of the data's pictures, which `evaluation.reference` takes; the path.

    They are of all pictures, or of `evaluation.reference_count`, none of which is kept.

    Raises:
        ConfigError, MetricError: no such network or pictures, or too few of them.
        PathError: `out` is there already, or cannot be written.
    """
    settings, path = experiment.evaluation, as_path(out)
    if settings.kind not in (known := (*INSTALLED, *FROM_FILE)):
        raise ConfigError(
            f'config.evaluation.kind is "{settings.kind}"; statistics for a file are of a network '
            f"whose weights stay as they are: {', '.join(known)}."
        )
    if path.suffix != ".npz":
        raise PathError(f'--out "{out}" does not end in .npz; name a file that does.')
    if path.exists() and not overwrite:
        raise PathError(f'--out "{out}" exists; name another file, or add --overwrite.')
    network, source = open_network(settings.kind, settings.weights), open_pictures(experiment)
    chosen = choose(source, settings.reference_count)
    check_writable(path.parent, "--out")
    batches = in_batches(source, chosen, BATCH, experiment.data.num_threads)
    moments, labels = {}, []
    with contextlib.closing(Progress("looking at", "picture", len(chosen))) as progress:
        for batch in batches:
            features = network(batch["example"])
            for tap in KEYS.keys() & features.keys():
                moments.setdefault(tap, Moments()).update(features[tap])
            labels.append(batch["condition"])
            progress.show(sum(map(len, labels)))
    if not all(np.isfinite(each.scatter).all() for each in moments.values()):
        raise MetricError(f"features of {network.name} are not finite; look at its weights.")
    counts = np.unique(np.concatenate(labels), return_counts=True)[1]
    about = {
        "network": network.name,
        "weights": network.sha256,
        "shape": list(batch["example"].shape[1:]),
        "crop": "adm_center" if isinstance(unwrapped(source), ImageSource) else "none",
        "resize": "the network's own, of uint8 pictures",
        "source": digest_of(source),
        "broken": len(getattr(source, "broken", ())),
        "classes": len(counts),
        "per_class": [int(counts.min()), int(counts.max())],
    }
    write_statistics(path, moments, about)
    return path


def open_pictures(experiment: Experiment) -> Source:
    """The pictures that `config.data` names, or those of latents, which `config.prepare` names."""
    if experiment.modality.needs_decoder:
        what = experiment.prepare, experiment.data, pictures_of(experiment)
        source = SkipBroken(open_source("prepare", *what), experiment.prepare.max_broken)
    else:
        source = open_data(experiment)
    if not is_picture(example := source[0]["example"]):
        raise MetricError(
            f"networks look at uint8 pictures with 1 or 3 channels, these data are {example.dtype} "
            f"{list(example.shape)}; name pictures as --config.data.path."
        )
    return source


def choose(source: Source, count: int) -> np.ndarray:
    """Which pictures to look at: all, or `count`, drawn from the classes in turn."""
    if count > len(source):
        raise ConfigError(
            f"config.evaluation.reference_count is {count}, and the data have {len(source)} "
            "pictures; lower it, or leave it out for all of them."
        )
    order = np.random.default_rng(0).permutation(len(source))
    labels = source.labels
    if labels is None or len(labels) != len(source):  # in the records of the pictures alone
        labels = np.zeros(len(source), int)
    by_class = np.argsort(labels[order], kind="stable")
    starts = np.searchsorted(labels[order][by_class], labels[order][by_class])
    rank = np.arange(len(order)) - starts  # of each picture among those of its class
    in_turn = order[by_class[np.argsort(rank, kind="stable")]]
    return np.sort(in_turn[: count or len(source)])
