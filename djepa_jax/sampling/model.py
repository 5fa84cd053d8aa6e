"""The Python interface: load a trained model, sample pictures, watch them grow, encode images."""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from djepa_jax.checkpoints.autoencoder import Autoencoder, has_autoencoder, weights_sha256
from djepa_jax.checkpoints.restore import find_model, placed_params
from djepa_jax.config import experiment as configuration
from djepa_jax.config.class_names import find_class
from djepa_jax.core import sharding
from djepa_jax.core.modalities.base import Modality
from djepa_jax.core.models.djepa import ModelConfig, split_model
from djepa_jax.runtime.compilation_cache import use_compilation_cache
from djepa_jax.sampling.generator import Generator

Label = int | str | None
# What may replace a setting of each type, and how that is said.
KINDS = {
    str: (str, "text"),
    int: (int | np.integer, "a whole number"),
    float: (int | float | np.integer | np.floating, "a number"),
}


def load(
    path: str | os.PathLike,
    mesh: tuple[int, int, int] = (-1, 1, 1),
    autoencoder: str | os.PathLike | None = None,
) -> "Model":
    """Load the moving average of a trained model.

    Args:
        path: a workdir (its newest step), one step's folder, or an export folder.
        mesh: devices along (data, fsdp, tensor), -1 = what is left; by default all share the batch.
        autoencoder: weights of the autoencoder that turns latents into pictures, for a model that
            makes latents; by default the file that its configuration names.

    Raises:
        CheckpointError: there is no model at `path`, or it is damaged.
        ConfigError, ValueError: its configuration or the mesh cannot work here, or `autoencoder` is
            not the one of its latents.
    """
    use_compilation_cache()
    return Model(path, mesh, autoencoder)


class Model:
    """A trained model in memory. Make it with `djepa_jax.load`.

    Attributes:
        config: its configuration: `model.config.sample.cfg_scale`.
        labels: the names of its classes, in the order of their index.
        step: the training step of its weights.
        params: its parameters (nested dict of arrays).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        mesh: tuple[int, int, int],
        autoencoder: str | os.PathLike | None = None,
    ):
        stored = find_model(path)
        changes = {} if autoencoder is None else {"autoencoder.path": str(autoencoder)}
        self.path, self.config, self.step = stored.path, stored.config.updated(changes), stored.step
        if autoencoder is not None and has_autoencoder(self.config):
            weights_sha256(
                self.config
            )  # compared now, for reading it can wait until there are pictures to make
        self._mesh = sharding.make_mesh(mesh)
        self._experiment = configuration.build(self.config)
        self.labels = self._experiment.class_names
        self.params = stored.restore(placed_params(self._experiment, self._mesh))

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"<D-JEPA model of {count:,} parameters, step {self.step}, {len(self.labels)} "
            f"classes, from {self.path}>"
        )

    def sample(self, labels: Label | Sequence[Label], seed: int = 0, **settings) -> np.ndarray:
        """Draw one picture per label.

        Picture i depends on the weights, the settings, its label, `seed` and i alone, not on how
        many are drawn.

        Args:
            labels: classes by index, name or part of a name; None asks for no class.
            seed: of everything random.
            **settings: `cfg_scale`, `cfg_schedule`, `temperature` (of diffusion models),
                `num_ar_steps`, `num_denoise_steps`, `sampler` and the other keys of
                `config.sample`, in place of the stored ones.

        Returns:
            uint8 images `[n, H, W, C]`.

        Raises:
            ValueError: an unknown label or setting, or a value that cannot work.
            TypeError: the model makes latents, not pictures: use `sample_arrays`.
        """
        self._check_pictures()
        return self.sample_arrays(labels, seed, **settings)["images"]

    def sample_arrays(
        self, labels: Label | Sequence[Label], seed: int = 0, **settings
    ) -> dict[str, np.ndarray]:
        """As `sample`, but everything that the modality makes of the tokens, by name (`images` or
        `latents`).
        """
        wanted = self._find(labels)
        return self._generator(len(wanted), settings).images(self.params, wanted, _seed(seed))

    def stream(
        self, labels: Label | Sequence[Label], seed: int = 0, **settings
    ) -> Iterator[np.ndarray]:
        """Yield the pictures of `sample` after every autoregressive step: uint8 `[n, H, W, C]`,
        last the finished ones.

        Tokens that are not yet revealed show the middle of the value range (grey). All pictures are
        drawn at once.
        """
        self._check_pictures()
        wanted = self._find(labels)
        generator = self._generator(len(wanted), settings)
        steps = generator.stream(self.params, wanted, _seed(seed))
        return (
            generator.export(tokens)["images"] for tokens in steps
        )  # so that errors come from the call itself

    def encode(self, images: np.ndarray, labels: Label | Sequence[Label] = None) -> np.ndarray:
        """Features of whole images by the context encoder.

        Args:
            images: as the model was trained on: uint8 `[n, H, W, C]`, or float32 latents.
            labels: the class of all, or of each; None (the default) tells the encoder no class.

        Returns:
            float32 `[n, N, D]`, tokens in raster order.

        Raises:
            ValueError: images of another shape or type, or an unknown label.
        """
        images = np.asarray(images)
        modality = self._experiment.modality
        if images.ndim != len(modality.example_shape) + 1 or len(images) == 0:
            raise ValueError(
                f"images have shape {images.shape}; expected [n, "
                f"{', '.join(map(str, modality.example_shape))}]."
            )
        modality.check_example(images[0])
        wanted = np.asarray(self._find(labels), np.int32)
        if len(wanted) not in (1, len(images)):
            raise ValueError(
                f"there are {len(images)} images and {len(wanted)} labels; give one label, or one "
                "for each."
            )
        wanted = np.broadcast_to(wanted, len(images))
        size, place = self._batch_size(len(images)), sharding.batch_sharding(self._mesh)
        features = []
        for start in range(0, len(images), size):
            chosen = np.arange(start, start + size) % len(images)  # the last batch is padded
            batch = jax.device_put((images[chosen], wanted[chosen]), place)
            features.append(
                np.asarray(_encoder(self._experiment.train.model, modality)(self.params, *batch))
            )
        return np.concatenate(features)[: len(images)]

    def find_label(self, label: Label) -> int:
        """The index of a class given by index, name or part of a name; None is the "no class"
        index.

        Raises:
            ValueError: no such class, or several; the candidates are listed.
        """
        return (
            self._experiment.train.model.null_label
            if label is None
            else find_class(label, self.labels)
        )

    def _find(self, labels: Label | Sequence[Label]) -> list[int]:
        one = (
            isinstance(labels, str | bytes)
            or not isinstance(labels, Iterable)
            or getattr(labels, "ndim", 1) == 0
        )
        wanted = [self.find_label(label) for label in ([labels] if one else labels)]
        if not wanted:
            raise ValueError("labels are empty; name at least one class.")
        return wanted

    def _generator(self, count: int, settings: dict) -> Generator:
        unknown = settings.keys() - self.config.sample.keys() | settings.keys() & {
            "labels",
            "count",
            "seed",
            "batch_size",
        }
        if unknown:
            usable = sorted(self.config.sample.keys() - {"labels", "count", "seed", "batch_size"})
            raise ValueError(
                f"unknown setting {', '.join(sorted(unknown))}; there are {', '.join(usable)}."
            )
        changes = {"sample.batch_size": self._batch_size(count)}
        for name, value in settings.items():
            stored = self.config.sample[name]
            kinds, remedy = KINDS[type(stored)]
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(f"{name} is {value!r}; it must be {remedy}, such as {stored!r}.")
            changes[f"sample.{name}"] = type(stored)(
                value
            )  # one type, or temperature=1 would compile what 1.0 has compiled
        config = self.config.updated(changes)
        decoder = self._autoencoder if has_autoencoder(config) else None
        return Generator(config, configuration.build(config), self._mesh, decoder)

    @functools.cached_property
    def _autoencoder(self) -> Autoencoder:
        return Autoencoder(self.config.autoencoder, self._mesh, self.config.data.staging)

    def _batch_size(self, count: int) -> int:
        """The next power of two, so that few shapes are compiled; at most the configured batch
        size.
        """
        size = min(1 << (count - 1).bit_length(), self.config.sample.batch_size)
        divisor = sharding.batch_divisor(self._mesh)
        return -(-size // divisor) * divisor

    def _check_pictures(self) -> None:
        modality = self._experiment.modality
        tokens = jax.ShapeDtypeStruct((1, modality.num_tokens, modality.token_dim), jnp.float32)
        made = jax.eval_shape(modality.export, tokens)
        if "images" not in made and not has_autoencoder(self.config):
            raise TypeError(
                f"this model makes {', '.join(made)}, not pictures; name its autoencoder in "
                "load(..., autoencoder=PATH), or "
                "use sample_arrays."
            )


def _seed(seed: int) -> int:
    if (
        isinstance(seed, bool)
        or not isinstance(seed, int | np.integer)
        or not 0 <= seed <= configuration.MAX_SEED
    ):
        raise ValueError(
            f"seed is {seed!r}; it must be a whole number between 0 and {configuration.MAX_SEED}."
        )
    return int(seed)


@functools.lru_cache(maxsize=8)
def _encoder(model: ModelConfig, modality: Modality):
    """The jitted encoder: (params, examples, labels `[B]`) -> features `[B, N, D]` float32."""
    graph, _ = split_model(model)

    def encode(params, examples, labels):
        tokens = modality.tokenize(examples)  # [B, N, C]
        order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
        return nnx.merge(graph, params).encode_all(tokens, order, labels).astype(jnp.float32)

    return jax.jit(encode)
