"""The Python interface: load a trained model, sample, watch samples grow, encode examples."""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from djepa_jax.checkpoints.autoencoder import Autoencoder, weights_sha256
from djepa_jax.checkpoints.restore import find_model, placed_params
from djepa_jax.config.class_names import find_class
from djepa_jax.config.conditions import of_prompts
from djepa_jax.config.places import check_editable, given_shape, places_of, places_shape
from djepa_jax.config.settings import SampleSettings
from djepa_jax.core import sharding
from djepa_jax.core.modalities.programs import exported_unheard
from djepa_jax.core.models.text import Reader
from djepa_jax.core.sampler import SampleInputs, SamplerConfig
from djepa_jax.runtime.compilation_cache import use_compilation_cache
from djepa_jax.sampling.edit import edit, named
from djepa_jax.sampling.encoder import make_encoder
from djepa_jax.sampling.generator import (
    Generator,
    count_of,
    decoded,
    grow,
    jitted_sampler,
    result_of,
)

Label = int | str | None
# Is given a batch and its tokens `[B, N, C]` after each autoregressive step; returns the last ones.
Watch = Callable[[SamplerConfig, SampleInputs, Iterator[np.ndarray]], np.ndarray]
# Settings of sampling that belong to a call and not to a model.
OF_A_CALL = {"labels", "prompt", "count", "seed", "batch_size", "noise_multiplicity"}
OF_A_CALL |= {"guided_shares"}  # which has other names in `sample`


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
        self.path, self.step = stored.path, stored.step
        # Not as in training, which may have been on other devices
        self.config = stored.config.updated({"model.attention": "auto"})
        if autoencoder is not None:
            self.config = self.config.updated({"autoencoder.path": str(autoencoder)})
            if self.config.has_decoder:
                weights_sha256(self.config)  # compared now; reading it can wait for pictures
        self._mesh = sharding.make_mesh(mesh)
        self._sampler = jitted_sampler
        self.labels = self.config.class_names
        self.params = stored.restore(placed_params(self.config, self._mesh))

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"<D-JEPA model of {count:,} parameters, step {self.step}, {len(self.labels)} classes, "
            f"from {self.path}>"
        )

    def sample(
        self, labels: Label | Sequence[Label] = None, seed: int = 0, conditions=None, **settings
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Draw one picture, clip, sound or pair of them per label.

        Picture i depends on the weights, the settings, its label, `seed` and i alone, not on how
        many are drawn.

        Args:
            labels: classes by index, name or part of a name; None asks for no class.
            seed: of everything random.
            conditions: in place of labels, raw conditions `[n, ...]` as the data source gives them.
            **settings: `prompts`, of models of texts in place of labels; `cfg_scale`,
                `cfg_schedule`, `temperature` (of samplers that add noise), `order`, `num_ar_steps`,
                `num_denoise_steps`, `sampler` and the others of `config.sample`,
                and the options of the loss, in place of the stored ones. With `mix`
                ("cat:0.5,dog:0.5", "cat@left,dog@right") all pictures are of several classes at
                once, and `labels` says how many there are: `[None] * 4`.

        Returns:
            uint8 images `[n, H, W, C]`, clips `[n, T, H, W, C]`, or sounds: float32 waves `[n, S]`
            in [-1, 1], as many samples a second as `model.config.modality.rate` says. Of pairs
            both, by name: {"images": ..., "sound": ...}.

        Raises:
            ValueError: an unknown label or setting, or a value that cannot work.
            TypeError: the model makes latents, not pictures: use `sample_arrays`.
        """
        self._check_pictures()
        arrays = self.sample_arrays(labels, seed, conditions, **settings)
        return result_of(self.config.modality, arrays)

    def sample_arrays(
        self, labels: Label | Sequence[Label] = None, seed: int = 0, conditions=None, **settings
    ) -> dict[str, np.ndarray]:
        """As `sample`, but everything that the modality makes (`images`, `latents`...)."""
        wanted = self._conditions(labels, conditions, settings)
        generator = self._generator(count_of(wanted), seed, settings)
        return generator.images(self.params, wanted, generator.experiment.sample.seed)

    def stream(
        self, labels: Label | Sequence[Label] = None, seed: int = 0, conditions=None, **settings
    ) -> Iterator[np.ndarray]:
        """Yield the pictures of `sample` after every autoregressive step, last the finished ones.

        Tokens that are not yet revealed show the middle of the value range (grey). All pictures
        are drawn at once: uint8 arrays as of `sample`.
        """
        self._check_pictures()
        wanted = self._conditions(labels, conditions, settings)
        generator = self._generator(count_of(wanted), seed, settings)
        steps = generator.stream(self.params, wanted, generator.experiment.sample.seed)
        modality = self.config.modality  # errors come at once
        return (result_of(modality, generator.export(tokens)) for tokens in steps)

    def watched(self, watch: Watch) -> "Model":
        """The same model, which samples and edits step by step, under the eyes of `watch`.

        An exception that it raises ends the call.
        """
        model = copy.copy(self)
        model._sampler = lambda config, mesh: (
            lambda params, inputs: watch(config, inputs, grow(config, params, inputs))
        )
        return model

    def preview(self, tokens: np.ndarray) -> np.ndarray | None:
        """Pictures `[n, H, W, 1 or 3]` of tokens `[n, N, C]`; None if there is nothing to see."""
        arrays = jax.device_get(exported_unheard(self.config.modality, tokens))
        if self.config.has_decoder:
            arrays |= decoded(self._autoencoder, arrays)
        return self.config.modality.preview(arrays)

    def edit(
        self,
        example: np.ndarray,
        mask: np.ndarray | str,
        labels: Label | Sequence[Label] = None,
        keep: float = 0.0,
        seed: int = 0,
        conditions=None,
        **settings,
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Make places of an example anew: inpainting, outpainting, continuing, variations.

        Args:
            example: uint8 `[H, W, C]` or `[T, H, W, C]`, int16 `[S]`, a pair as
                `model.config.modality.join` makes it, or one for each label, `[n, ...]`.
            mask: bool `[H, W]` (of all frames), `[T, H, W]`, `[S]`, or `[n, ...]`, True where anew;
                or left, right, top, bottom, centre, all, random:SHARE; of clips after:K (frames
                from K on), between (all but the ends), frames:A-B; of sounds middle:SHARE,
                seconds:A-B; of pairs first or second, the part to be made for the other.
            labels: as for `sample`; one result for each.
            keep: share of the tokens under the mask that stays, drawn at random.
            seed: of everything random.
            conditions: in place of labels.
            **settings: as for `sample`.

        Returns:
            uint8 or int16 `[n, ...]`, equal to the example outside the mask; of pairs both by name.

        Raises:
            ValueError: an example or a mask of another shape, an unknown label or setting.
            TypeError: the model makes latents, and there is no autoencoder.
        """
        check_editable(self.config)
        self._check_pictures()
        wanted = self._conditions(labels, conditions, settings)
        shape, places = given_shape(self.config), places_shape(self.config)
        modality = self.config.modality
        count, example = count_of(wanted), np.asarray(example)
        dtype = np.dtype(np.uint8) if modality.needs_decoder else modality.example_dtype
        if example.shape not in (shape, (count, *shape)) or example.dtype != dtype:
            raise ValueError(
                f"the example is {example.dtype} {example.shape}; expected {dtype} {shape}, or "
                f"{(count, *shape)}, one for each label."
            )
        if isinstance(mask, str):
            mask, keep = places_of(self.config, mask, keep)
        if np.shape(mask) not in (places[-2:], places, (count, *places)):
            raise ValueError(f"the mask has the shape {np.shape(mask)}; expected {places}.")
        examples = np.broadcast_to(example, (count, *shape))
        decoder = self._autoencoder if self.config.has_decoder else None
        results = edit(
            self.config,
            lambda known: self._generator(count, seed, settings, known),
            self.params,
            *(examples, mask, wanted, seed, keep, decoder),
        )
        by_name = named(modality, results)
        return by_name if len(by_name) > 1 else results

    def encode(
        self, examples: np.ndarray, labels: Label | Sequence[Label] = None, conditions=None
    ) -> np.ndarray:
        """Features of whole examples by the context encoder.

        Args:
            examples: as the model was trained on: uint8 `[n, H, W, C]`, or float32 latents.
            labels: the class of all, or of each; None (the default) tells the encoder no class.
            conditions: in place of labels, raw conditions, one for each example.

        Returns:
            float32 `[n, N, D]`, tokens in raster order.

        Raises:
            ValueError: examples of another shape or type, or an unknown label.
        """
        examples, modality = np.asarray(examples), self.config.modality
        if examples.ndim != len(modality.example_shape) + 1 or len(examples) == 0:
            expected = ", ".join(map(str, modality.example_shape))
            raise ValueError(f"examples have shape {examples.shape}; expected [n, {expected}].")
        modality.check_example(examples[0])
        wanted = self._conditions(labels, conditions, {})
        if count_of(wanted) not in (1, len(examples)):
            raise ValueError(
                f"there are {len(examples)} examples and {count_of(wanted)} labels; give one "
                "label, or one for each."
            )
        size, place = self._batch_size(len(examples)), sharding.batch_sharding(self._mesh)
        network, params, features = self.config.network, self.params["context_encoder"], []
        encode = make_encoder(network, modality)
        for start in range(0, len(examples), size):
            chosen = np.arange(start, start + size) % len(examples)  # the last batch is padded
            rows = chosen % count_of(wanted)
            raw = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[rows], wanted)
            batch = jax.device_put((examples[chosen], raw), place)
            features.append(np.asarray(encode(params, *batch)[:, network.num_prefix_tokens :]))
        return np.concatenate(features)[: len(examples)]

    def find_label(self, label: Label) -> int:
        """The index of a class given by index, name or part of a name; None is "no class".

        Raises:
            ValueError: no such class, or several; the candidates are listed.
        """
        if isinstance(self.config.network.conditioner, Reader):
            raise ValueError('this model has no classes; it is told by prompts=["a red circle"].')
        if label is None:
            return int(jax.tree.leaves(self.config.network.conditioner.null(1))[0][0])
        return find_class(label, self.labels)

    def _conditions(self, labels: Label | Sequence[Label], conditions, settings: dict):
        """Raw conditions `[n, ...]` of labels, or those that were given, or prompts, or a mixture.

        Prompts are taken out of the settings.
        """
        prompts, mix = settings.pop("prompts", None), settings.get("mix")
        if conditions is not None:
            return conditions
        if prompts is not None:
            prompts = [prompts] if isinstance(prompts, str) else list(prompts)
            if labels is not None or mix or not prompts:
                raise ValueError("prompts are in place of labels; name one or more, and no label.")
            return of_prompts(self.config.network.conditioner, prompts)
        one = isinstance(labels, str | bytes) or not isinstance(labels, Iterable)
        one = one or getattr(labels, "ndim", 1) == 0
        labels = [labels] if one else list(labels)
        if not labels:
            raise ValueError("labels are empty; name at least one class.")
        if mix:
            changes = {"sample.mix": mix, "sample.count": len(labels)}
            return self.config.updated(changes).sample_conditions
        if all(label is None for label in labels):
            return jax.tree.map(np.asarray, self.config.network.conditioner.null(len(labels)))
        found = np.asarray([self.find_label(label) for label in labels], np.int32)
        return self.config.conditions_of(found)

    def _generator(self, count: int, seed: int, settings: dict, known=None) -> Generator:
        sample = {field.name for field in dataclasses.fields(SampleSettings)}
        options = {field.name for field in dataclasses.fields(self.config.token_loss)}
        allowed = (sample | options) - OF_A_CALL
        unknown = sorted(settings.keys() - allowed)
        if unknown:
            raise ValueError(
                f"unknown setting {', '.join(unknown)}; there are {', '.join(sorted(allowed))}."
            )
        changes = {"sample.batch_size": self._batch_size(count)}
        for name, value in {"seed": seed, **settings}.items():
            group = "sample" if name in sample else "loss.options"
            changes[f"{group}.{name}"] = value.item() if isinstance(value, np.generic) else value
        config = self.config.updated(changes)
        decoder = self._autoencoder if config.has_decoder else None
        return Generator(config, self._mesh, decoder, sampler=self._sampler, known=known)

    @functools.cached_property
    def _autoencoder(self) -> Autoencoder:
        return Autoencoder(self.config.autoencoder, self._mesh, self.config.data.staging)

    def _batch_size(self, count: int) -> int:
        """The next power of two, so that few shapes are compiled; at most the configured size."""
        size = min(1 << (count - 1).bit_length(), self.config.sample.batch_size)
        divisor = sharding.batch_divisor(self._mesh)
        return -(-size // divisor) * divisor

    def _check_pictures(self) -> None:
        if self.config.lacks_decoder:
            raise TypeError(
                "this model makes latents, not pictures; name its autoencoder in "
                "load(..., autoencoder=PATH), or use sample_arrays."
            )
