"""A small convolutional network that learns the classes of the data themselves, in minutes on CPUs.

Where nothing is published for the data, it judges whether a sample shows the class that was asked
for, and its features give a Frechet distance. It learns from real pictures only.
"""

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx

from djepa_jax.checkpoints.integrity import DamagedError, reading
from djepa_jax.core.models.keys import Keys
from djepa_jax.core.optimizer import OptimizerConfig, make_optimizer
from djepa_jax.core.sharding import path_name
from djepa_jax.data.records import checksum
from djepa_jax.runtime import distributed
from djepa_jax.runtime.progress import Progress, say
from djepa_jax.runtime.storage import as_path, check_writable, write_bytes

MAX_SIDE = 256  # pixels; larger pictures are shrunk
MAX_PLACES = 16  # along a side of the first map
BATCH_SIZE = 128  # pictures in a call of the trained network


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides the weights, beside pictures and labels."""

    version: int = 1  # to be raised where the code of this file learns otherwise than before
    seed: int = 0
    flip: bool = False  # mirror images are of the same class
    widths: tuple[int, ...] = (64, 128, 128, 128)
    batch_size: int = 32
    steps_per_root: int = 16  # steps grow with the square root of the number of pictures
    max_steps: int = 4000
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    held_out_every: int = 10  # 0: none

    def optimizer(self, count: int) -> OptimizerConfig:
        """AdamW for so many pictures: a tenth of the steps warms up, then cosine to 0."""
        num_steps = min(math.ceil(self.steps_per_root * count**0.5), self.max_steps)
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            num_steps=num_steps,
            warmup_steps=num_steps // 10,
            learning_rate_schedule="cosine",
            weight_decay=self.weight_decay,
        )


def recipe_of(seed: int, flip: bool, vectors: np.ndarray | None) -> Recipe:
    """The recipe for classes, or for classes of few pictures that vectors tell."""
    if vectors is None:
        return Recipe(seed=seed, flip=flip)
    return Recipe(seed=seed, flip=flip, steps_per_root=64, held_out_every=0)


class ConvNet(nnx.Module):
    """Convolutions, a mean over all places, a linear layer.

    The first convolution looks at patches, so that large pictures become maps of 16 x 16 places,
    too; each of the others halves the map, down to 4 x 4.
    """

    def __init__(self, shape: tuple[int, int, int], widths, num_classes: int, *, rngs: Keys):
        *sides, width = shape
        shrink = math.ceil(max(sides) / MAX_SIDE)
        self.sides = tuple(max(side // shrink, 1) for side in sides)
        stride = math.ceil(max(self.sides) / MAX_PLACES)
        places, kernel = max(self.sides) / stride, stride + 2
        self.convs = nnx.List()
        how = {"kernel_init": nnx.initializers.he_normal(), "precision": jax.lax.Precision.HIGHEST}
        for wider in widths:
            size, strides = (kernel, kernel), (stride, stride)
            self.convs.append(nnx.Conv(width, wider, size, strides, **how, rngs=rngs))
            width, kernel, stride = wider, 3, 2 if places > 4 else 1
            places /= stride
        self.head = nnx.Linear(width, num_classes, precision=how["precision"], rngs=rngs)

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Pictures 0..255 `[B, H, W, C]` -> pool `[B, D]`, logits `[B, K]`."""
        x = images.astype(jnp.float32) / 127.5 - 1
        x = jax.image.resize(x, (len(x), *self.sides, x.shape[-1]), "linear")  # mostly as it is
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        pool = x.mean((1, 2))  # [B, D]
        return {"pool": pool, "logits": self.head(pool)}


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph, params, images) -> dict[str, jax.Array]:
    return nnx.merge(graph, params)(images)


def _augment(images: jax.Array, key: jax.Array, flip: bool) -> jax.Array:
    """Shift each picture by up to a tenth of its side, edges repeated, and maybe mirror it."""
    count, height, width, channels = images.shape
    by = max(height // 10, 1), max(width // 10, 1)
    padded = jnp.pad(images, ((0, 0), (by[0],) * 2, (by[1],) * 2, (0, 0)), "edge")
    shifts = jax.random.randint(key, (count, 2), 0, 2 * jnp.array(by) + 1)  # [B, 2]

    def cut(image, shift):
        return jax.lax.dynamic_slice(image, (*shift, 0), (height, width, channels))

    images = jax.vmap(cut)(padded, shifts)
    if flip:
        mirrored = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _step(
    graph, config: OptimizerConfig, flip: bool, params, opt_state, key, images, labels, vectors
):
    """One update of AdamW on the cross entropy: parameters and state of the optimiser."""
    images = _augment(images, key, flip)

    def loss_of(params):
        logits = nnx.merge(graph, params)(images)["logits"]  # [B, K or D]
        logits = logits if vectors is None else logits @ vectors.T  # [B, K]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.grad(loss_of)(params)
    updates, opt_state = _optimizer(config).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    return make_optimizer(config, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(shape: tuple[int, int, int], widths: tuple[int, ...], num_classes: int, key) -> dict:
    network = ConvNet(shape, widths, num_classes, rngs=Keys(key))
    return nnx.to_pure_dict(nnx.state(network))


def _check(images: np.ndarray, channels: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"this classifier is of uint8 pictures [n, H, W, {channels}], these are {images.dtype} "
            f"{list(images.shape)}; convert them to those."
        )


def _define(
    images: np.ndarray, labels: np.ndarray, recipe: Recipe, vectors: np.ndarray | None
) -> tuple[tuple, Any, dict]:
    """What `_init` takes but for the key, the network's definition, and its parameters' shapes."""
    _check(images, images.shape[-1])
    classes = np.unique(labels)
    if len(classes) < 2 or classes[0] < 0:
        raise ValueError(
            "a classifier needs labels from 0 of at least two classes, these data have "
            f"{classes[:5].tolist()}; without classes, judge them by features of a "
            "network of ImageNet (efficientnet_lite0)."
        )
    values = int(classes[-1]) + 1 if vectors is None else vectors.shape[1]
    described = images.shape[1:], recipe.widths, values
    graph, state = nnx.split(nnx.eval_shape(lambda: ConvNet(*described, rngs=Keys(0))))
    return described, graph, nnx.to_pure_dict(state)


def split_rows(labels: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, and those held out: the same share of every class, drawn by the seed."""
    shuffled = np.random.default_rng(recipe.seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    every = recipe.held_out_every
    held_out = np.arange(len(labels)) % every == 0 if every else np.zeros(len(labels), bool)
    return by_class[~held_out], by_class[held_out]


def _fit(
    graph, params: dict, images: np.ndarray, labels: np.ndarray, rows, recipe: Recipe, vectors
) -> dict:
    """Parameters that have learnt the given rows, every epoch in another order."""
    config, rng = recipe.optimizer(len(rows)), np.random.default_rng(recipe.seed)
    needed = config.num_steps * recipe.batch_size
    epochs = [rng.permutation(rows) for _ in range(math.ceil(needed / len(rows)))]
    batches = np.concatenate(epochs)[:needed].reshape(config.num_steps, recipe.batch_size)
    opt_state = _optimizer(config).init(params)
    keys = jax.random.split(jax.random.key(recipe.seed), config.num_steps)
    first = params, opt_state, keys[0], images[batches[0]], labels[batches[0]], vectors
    # Compiled before the clock starts that tells how long the rest takes.
    step = _step.lower(graph, config, recipe.flip, *first).compile()
    what = f"training a classifier of {len(rows):,} pictures:"
    for number, batch in enumerate(Progress(what, "step", config.num_steps).over(batches)):
        told = images[batch], labels[batch], vectors
        params, opt_state = step(params, opt_state, keys[number], *told)
    return params


class Classifier:
    """A trained network as `Features`; pictures of another size than it learnt from are resized.

    Attributes:
        sha256: of the weights.
        held_out_accuracy: share of the held-out tenth of its data that it classifies rightly.
    """

    name = "classifier"

    def __init__(self, graph, params: dict, held_out_accuracy: float = math.nan):
        self._graph, self._params = graph, jax.device_put(params)
        self.held_out_accuracy = held_out_accuracy
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self._tensors = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
        named = sorted(self._tensors.items())
        self.sha256 = checksum(*(part for item in named for part in item))

    @classmethod
    def train(
        cls, images: np.ndarray, labels: np.ndarray, *, seed=0, flip=False, vectors=None
    ) -> "Classifier":
        """Learn the labels `[n]` of uint8 pictures `[n, H, W, C]`; column k of the logits is label
        k. `flip` mirrors half of the pictures.

        With `vectors` `[K, D]` of the classes, which may have few pictures, the logits are D values
        whose products with these are greatest for the right class; then all pictures are learnt.

        Raises:
            ValueError: there are fewer than two classes.
        """
        recipe, labels = recipe_of(seed, flip, vectors), np.asarray(labels, np.int32)
        described, graph, _ = _define(images, labels, recipe, vectors)
        rows, held_out = split_rows(labels, recipe)
        params = _init(*described, jax.random.key(seed))
        classifier = cls(graph, _fit(graph, params, images, labels, rows, recipe, vectors))
        if not len(held_out):
            return classifier
        found = classifier(images[held_out])["logits"].argmax(-1)
        classifier.held_out_accuracy = float((found == labels[held_out]).mean())
        return classifier

    @classmethod
    def for_data(
        cls, images: np.ndarray, labels: np.ndarray, folder, *, seed=0, flip=False, vectors=None
    ) -> "Classifier":
        """The classifier that `train` gives, kept in `folder` under a hash of all that decides it.

        Process 0 trains it where it is not there, or not as it was written.

        Raises:
            ValueError: there are fewer than two classes.
            PathError: the folder cannot be written.
            CheckpointError: storage does not answer.
        """
        recipe, labels = recipe_of(seed, flip, vectors), np.asarray(labels, np.int32)
        _, *network = _define(images, labels, recipe, vectors)
        learnt = (images, labels, repr(recipe), *([] if vectors is None else [vectors]))
        of = {"data": checksum(*learnt), "recipe": repr(recipe)}
        path = as_path(folder) / f"classifier-{of['data'][:16]}.safetensors"

        def prepare() -> None:
            """Train it, unless it is there as it was written."""
            if path.exists():
                try:
                    cls._read(path, *network, of)
                    return
                except DamagedError:
                    say(f"{path} is damaged or not of these pictures; training it anew")
            check_writable(folder, "the folder of the classifier")
            trained = cls.train(images, labels, seed=seed, flip=flip, vectors=vectors)
            write_bytes(path, trained._to_bytes(of))

        distributed.run_on_main(prepare)
        return cls._read(path, *network, of)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Of uint8 pictures `[n, H, W, C]`: "pool" `[n, 128]` and "logits" `[n, K]`, float32."""
        channels = self._tensors["convs/0/kernel"].shape[2]
        _check(images, channels)
        results = []
        for start in range(0, max(len(images), 1), BATCH_SIZE):
            batch = images[start : start + BATCH_SIZE]
            padding = [(0, BATCH_SIZE - len(batch)), (0, 0), (0, 0), (0, 0)]  # one program for all
            batch = np.pad(batch, padding)
            results.append(jax.device_get(_apply(self._graph, self._params, batch)))
        return {tap: np.concatenate([r[tap] for r in results])[: len(images)] for tap in results[0]}

    def _metadata(self, of: dict[str, str]) -> dict[str, str]:
        """What it learnt from, what it achieved, and a checksum of that and of the weights."""
        said = of | {"held_out_accuracy": repr(self.held_out_accuracy)}
        return said | {"checksum": checksum(*said.values(), self.sha256)}

    def _to_bytes(self, of: dict[str, str]) -> bytes:
        from safetensors.numpy import save

        return save(self._tensors, self._metadata(of))

    @classmethod
    def _read(cls, path: epath.Path, graph, shapes: dict, of: dict[str, str]) -> "Classifier":
        """The classifier in a file; DamagedError unless it is whole and `of` what is asked for."""
        from safetensors.numpy import load

        with reading(path):
            content = path.read_bytes()
            tensors = load(content)
            # The format: the size of a header of JSON, the header, the arrays.
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = header["__metadata__"]
            params = jax.tree_util.tree_map_with_path(lambda at, _: tensors[path_name(at)], shapes)
            classifier = cls(graph, params, float(metadata["held_out_accuracy"]))
            if classifier._metadata(of) != metadata:
                raise ValueError("it is not what was written, or not of these pictures")
            return classifier
