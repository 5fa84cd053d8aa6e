"""`--mode=probe`: what features know of the classes, which the encoders are not told.

1. Features are means over the tokens of whole pictures; the condition is the null one, whatever the
   labels are.
2. Pictures are split into training and test (80/20, stratified, seeded), and the training part
   again, to choose the regularisation and the number of neighbours. Test pictures are used once.
3. Raw inputs and a freshly initialised encoder are judged alike.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from djepa_jax.checkpoints.arrays import restore_arrays
from djepa_jax.checkpoints.checkpointer import check_step, read_meta
from djepa_jax.checkpoints.restore import latest_model, placed_params
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.losses.jepa import feature_statistics
from djepa_jax.core.modalities import Modality
from djepa_jax.core.models.conditioning import Nothing
from djepa_jax.core.models.djepa import ModelConfig, init_params
from djepa_jax.core.optimizer import params_norm
from djepa_jax.data.records import DataError, checksum, unwrapped
from djepa_jax.data.sources import SingleClass, open_training_data
from djepa_jax.evaluation.features.classifier import Classifier, Recipe, split_rows
from djepa_jax.evaluation.metrics.intervals import bootstrap
from djepa_jax.evaluation.metrics.pictures import read_pictures
from djepa_jax.evaluation.noise_levels import loss_per_noise_level
from djepa_jax.runtime.progress import Progress, say
from djepa_jax.runtime.storage import as_path, check_writable, write_json
from djepa_jax.sampling.encoder import make_encoder

FILE_NAME = "probe.json"
MAX_PICTURES = 20_000  # of more, a seeded subset
BATCH_SIZE = 64
MAX_SIDE = 32  # of raw inputs; larger ones are shrunk
LEAST_COUNT = 10  # pictures per class, on average
FIFTH = Recipe(held_out_every=5)  # how rows are split: the same share of every class, seed 0
REGULARISATIONS = (0.01, 0.1, 1.0, 10.0)  # C of the logistic regression
NEIGHBOURS = (1, 5, 10, 20)
MAX_ITERATIONS = 1_000
MANY_VALUES = 2**22  # with fewer, threads of linear algebra wait for one another most of the time
INTERVAL = "{0:.3f} ({1:.3f} to {2:.3f})"
ROW = "{:<27}{:>24}{:>24}{:>8}{:>11}{:>13}"
ENCODERS = {"context_encoder": "params", "target_encoder": "ema_params"}  # where weights lie
Embed = Callable[[jax.Array], jax.Array]  # examples [B, ...] -> features [B, D]


def make_features(network: ModelConfig, modality: Modality, with_prefix: bool) -> Callable:
    """The jitted `(params of a context encoder, examples) -> features [B, D]`; it knows no labels.

    Of a network with fewer layers than the trained one, `params` are the trained ones: its first
    layers run, then the last norm.
    """
    encode = make_encoder(network, modality)
    first = 0 if with_prefix else network.num_prefix_tokens

    @jax.jit
    def features(params, examples):
        blocks = jax.tree.map(lambda x: x[: network.encoder_depth], params["stack"]["blocks"])
        params = params | {"stack": params["stack"] | {"blocks": blocks}}
        conditions = network.conditioner.null(len(examples))
        return encode(params, examples, conditions)[:, first:].mean(1)

    return features


@jax.jit
def raw_inputs(examples: jax.Array) -> jax.Array:
    """Examples `[B, ..., C]` as the source gives them, each axis at most `MAX_SIDE`: `[B, D]`."""
    sides = [min(side, MAX_SIDE) for side in examples.shape[1:-1]]
    shape = (len(examples), *sides, examples.shape[-1])
    shrunk = jax.image.resize(examples.astype(jnp.float32), shape, "linear")
    return shrunk.reshape(len(examples), -1)


def embed(
    source, rows: np.ndarray, networks: dict[str, Embed], mesh
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features `[n, D]` by each network of the examples `rows` `[n]`, read once; labels `[n]`."""
    divisor = sharding.batch_divisor(mesh)
    size, place = -(-BATCH_SIZE // divisor) * divisor, sharding.batch_sharding(mesh)
    starts, labels = range(0, len(rows), size), []
    features = {name: [] for name in networks}
    for start in Progress("encoding pictures:", "part", len(starts)).over(starts):
        items = [source[row] for row in rows[start : start + size].tolist()]
        labels += [jax.tree.leaves(item["condition"])[0] for item in items]
        batch = np.stack([items[i % len(items)]["example"] for i in range(size)])  # padded
        batch = jax.device_put(batch, place)
        for name, network in networks.items():
            features[name].append(np.asarray(network(batch))[: len(items)])
    return {name: np.concatenate(parts) for name, parts in features.items()}, np.array(labels)


def effective_rank(features: np.ndarray) -> float:
    """Roy and Vetterli (2007) of the covariance: exp of the entropy of its normalised eigenvalues.

    Between 1 and D of features `[n, D]`.
    """
    values = np.linalg.eigvalsh(np.cov(features, rowvar=False)).clip(0)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def signs_of_collapse(features: np.ndarray) -> dict[str, float]:
    """How far features `[n, D]` vary; `std` and `participation_ratio` are, of these rows, what
    training logs as `target_std` and `target_rank`.
    """
    logged = feature_statistics(features, features)
    std, ratio = float(logged["target_std"]), float(logged["target_rank"])
    return {"std": std, "effective_rank": effective_rank(features), "participation_ratio": ratio}


def probe(features: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracy of a linear probe and of k nearest neighbours (cosine) on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    train, test = split_rows(labels, FIFTH)
    fit, held_out = (train[rows] for rows in split_rows(labels[train], FIFTH))
    linear = [LogisticRegression(C=c, max_iter=MAX_ITERATIONS) for c in REGULARISATIONS]
    knn = [KNeighborsClassifier(k, metric="cosine") for k in NEIGHBOURS if k <= len(fit)]
    record = {}
    for name, setting, models in (("linear", "C", linear), ("knn", "n_neighbors", knn)):
        best = max(models, key=lambda model: hits(model, features, labels, fit, held_out).mean())
        record |= accuracy(name, hits(best, features, labels, train, test))
        record[f"{name}_{setting}"] = getattr(best, setting)
    return record


def accuracy(name: str, found: np.ndarray) -> dict[str, float]:
    """The share that was found, with its interval."""
    low, high = bootstrap(found.astype(float))
    return {name: float(found.mean()), f"{name}_low": low, f"{name}_high": high}


def hits(classifier, features, labels, fitted: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Which of the rows `judged` a classifier that has learnt the rows `fitted` gets right."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(features[fitted])
    threads = 1 if features.size < MANY_VALUES else None
    # The last digits of weights, which have not converged, do not change who is right
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(scaler.transform(features[fitted]), labels[fitted])
    return classifier.predict(scaler.transform(features[judged])) == labels[judged]


def check_classes(labels: np.ndarray, num_pictures: int) -> None:
    """Raise DataError unless there are classes to tell apart, and pictures enough."""
    count = len(np.unique(labels)) if labels.ndim == 1 else 0
    if count < 2:
        raise DataError(
            f"a probe tells classes apart, and these data have {count}; name a run of data with "
            "one label per picture, of at least two classes."
        )
    if num_pictures < LEAST_COUNT * count:
        raise DataError(
            f"there are {num_pictures} pictures of {count} classes; a probe needs at least "
            f"{LEAST_COUNT} times as many as classes, so add pictures."
        )


def find_layers(layers: Sequence[str], depth: int) -> list[int]:
    """The layers that a flag names, by default the last; ConfigError if there is no such."""
    for layer in layers:
        if not (layer.isdecimal() and 1 <= int(layer) <= depth):
            raise ConfigError(
                f'--layers has "{layer}"; name some of 1 to {depth}, the layers of the encoder.'
            )
    return [int(layer) for layer in layers] or [depth]


def own_classifier(source, folder) -> dict:
    """Accuracy of the classifier of `evaluation.kind` on the tenth of pictures it has not seen."""
    images, labels = read_pictures(source)
    classifier = Classifier.for_data(images, labels, folder)
    _, held_out = split_rows(labels, Recipe())
    found = classifier(images[held_out])["logits"].argmax(-1) == labels[held_out]
    return accuracy("linear", found) | {"sha256": classifier.sha256, "test": len(held_out)}


def read_weights(experiment: Experiment, step: epath.Path, mesh) -> dict[str, dict]:
    """Parameters of the encoders that a step holds, and fresh ones of the same seed."""
    abstract = placed_params(experiment, mesh)["context_encoder"]
    kept = {name: part for name, part in ENCODERS.items() if part in read_meta(step).parts}
    check_step(step)
    wanted = {part: {"context_encoder": abstract} for part in kept.values()}
    found = restore_arrays(step / "state", wanted)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    key, network = jax.random.key(experiment.seed), experiment.network
    init = jax.jit(lambda: init_params(network, key)["context_encoder"], out_shardings=places)
    weights = {name: found[part]["context_encoder"] for name, part in kept.items()}
    return weights | {"untrained": init()}


def caveats(experiment: Experiment, count: int, total: int) -> list[str]:
    """What a reader of the figures is to know."""
    notes = ["one run and one split: intervals are over test pictures alone"]
    notes.append("the encoders were trained on the pictures of the run, test ones included")
    conditioner = experiment.network.conditioner
    if not isinstance(conditioner, Nothing) and experiment.data.num_classes > 1:
        notes[-1] += ", and told their classes then"
        if experiment.loss.label_drop_prob == 0:
            notes.append("loss.label_drop_prob is 0: the null condition was never met in training")
    if count < total:
        notes.append(f"{count:,} of {total:,} pictures, drawn with seed 0")
    return notes


def run_probe(
    experiment: Experiment, workdir: str, layers: Sequence[str] = (), with_prefix: bool = False
) -> tuple[dict, epath.Path]:
    """Probe the latest checkpoint of a workdir; write `probe.json`: the record and where it is.

    Raises:
        DataError: the data have no classes to tell apart, or few pictures.
        ConfigError: no such layer, or another model than the checkpoint's.
        CheckpointError: there is no usable checkpoint.
    """
    trained_on, experiment = open_training_data(experiment)
    source = trained_on.source if isinstance(trained_on, SingleClass) else trained_on
    experiment = experiment.updated({"model.attention": "auto"})
    model, network = latest_model(experiment, workdir), experiment.network
    depths = find_layers(layers, network.encoder_depth)
    rows = np.sort(np.random.default_rng(0).permutation(len(source))[:MAX_PICTURES])
    if source.labels is not None:
        check_classes(np.asarray(source.labels), len(rows))  # of some sources, not all of them
    check_writable(workdir)
    mesh = sharding.make_mesh(experiment.mesh)
    weights, networks = read_weights(experiment, model.path, mesh), {"inputs": raw_inputs}
    for depth in depths:
        shallow = dataclasses.replace(network, encoder_depth=depth)
        embedding = make_features(shallow, experiment.modality, with_prefix)
        for name, params in weights.items():
            networks[f"{name}, layer {depth}"] = functools.partial(embedding, params)
    features, labels = embed(source, rows, networks, mesh)
    check_classes(labels, len(rows))
    say(f"probing features of {len(rows):,} pictures")
    figures = {name: probe(x, labels) | signs_of_collapse(x) for name, x in features.items()}
    example = source[0]["example"]
    if example.dtype == np.uint8 and example.ndim == 3:
        figures["classifier"] = own_classifier(source, workdir)
    data, (train, test) = unwrapped(source), split_rows(labels, FIFTH)
    params = model.restore(placed_params(experiment, mesh))
    record = {
        "figures": figures,
        "loss_per_noise_level": loss_per_noise_level(experiment.train, trained_on, params, mesh),
        "step": model.step,
        "settings": {"with_prefix": with_prefix, "layers": depths, "condition": "null"},
        "pictures": {"all": len(source), "train": len(train), "test": len(test)},
        "data": data.digest() if hasattr(data, "digest") else str(len(data)),
        "rows": checksum(rows[train], rows[test]),
        "norms": {name: params_norm(params) for name, params in weights.items()},
        "caveats": caveats(experiment, len(rows), len(source)),
    }
    path = as_path(workdir) / FILE_NAME
    write_json(path, record)
    return record, path


def table(figures: dict[str, dict]) -> str:
    """The figures for people, a line for each kind of features."""
    titles = ("features", "linear probe", "nearest neighbours", "std", "eff. rank", "part. ratio")
    lines = [ROW.format(*titles)]
    for name, of in figures.items():
        cells = []
        for key in ("linear", "knn"):
            keys = (key, f"{key}_low", f"{key}_high")
            cells.append(INTERVAL.format(*map(of.get, keys)) if key in of else "")
        signs = ("std", "effective_rank", "participation_ratio")
        cells += [f"{of[key]:.3f}" if key in of else "" for key in signs]
        lines.append(ROW.format(name, *cells).rstrip())
    return "\n".join(lines)
