"""The whole configuration as one frozen object, and what is built from it.

`Experiment.from_dict` checks every value before a file or a device is touched; below the command
line nobody sees the ConfigDict of a configuration file.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from djepa_jax.config import class_names, conditions
from djepa_jax.config.convert import (
    ConfigError,
    check_options,
    convert_group,
    is_group,
    keys_of,
    unknown_key,
)
from djepa_jax.config.places import regions_of
from djepa_jax.config.settings import (
    PATHS,
    AutoencoderSettings,
    DataSettings,
    DebugSettings,
    Dtype,
    EvaluationSettings,
    LossSettings,
    ModelSettings,
    PrepareSettings,
    SampleSettings,
    SearchSettings,
    Settings,
)
from djepa_jax.core.bounds import Bound, Natural, Positive, Seed, check_bounds, field_types
from djepa_jax.core.losses import TOKEN_LOSSES, TokenLoss
from djepa_jax.core.masking import MaskingConfig
from djepa_jax.core.modalities import MODALITIES, Modality
from djepa_jax.core.models.attention import obstacle
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS
from djepa_jax.core.models.conditioning import CONDITIONERS, Mixture, Nothing
from djepa_jax.core.models.djepa import ModelConfig
from djepa_jax.core.models.text import Reader
from djepa_jax.core.optimizer import OptimizerConfig
from djepa_jax.core.sampler import SamplerConfig
from djepa_jax.core.train_step import TrainStepConfig

SHARED_LOSS_FIELDS = {"noise_multiplicity", "num_denoise_steps", "sampler", "guided_shares"}


@dataclasses.dataclass(frozen=True)
class Experiment(Settings):
    """A validated configuration: its keys as in `configs/default.py`, and what they stand for."""

    num_steps: Positive
    batch_size: Positive
    grad_accumulation_steps: Natural
    seed: Seed
    compute_dtype: Dtype
    mesh: Annotated[tuple[int, ...], Bound(lambda x: len(x) == 3, "three whole numbers, as 8,1,1")]
    checkpoint_every: Positive
    keep_checkpoints: Positive
    keep_every: Natural
    log_every: Positive
    sample_every: Natural
    evaluate_every: Natural
    max_bad_steps: Positive
    model: ModelSettings
    loss: LossSettings
    optimizer: OptimizerConfig
    data: DataSettings
    prepare: PrepareSettings
    autoencoder: AutoencoderSettings
    sample: SampleSettings
    debug: DebugSettings
    evaluation: EvaluationSettings
    search: SearchSettings

    def __post_init__(self):
        check_bounds(self)
        for name in ("train", "sampler", "class_names", "sample_conditions"):
            if name != "sample_conditions" or self.classes_are_known:
                getattr(self, name)  # built now, so that what cannot work is said at once

    @classmethod
    def from_dict(cls, values: Mapping) -> "Experiment":
        """Check nested values, such as a ConfigDict's, and build everything static from them.

        Raises:
            ConfigError: a key that is unknown or missing, or a value that cannot work.
        """
        values = convert_group(values, cls)
        for group, name in (key.split(".") for key in PATHS):
            if isinstance(values[group][name], str):
                values[group][name] = os.path.expanduser(values[group][name])
        values["optimizer"]["num_steps"] = values["num_steps"]
        group = ""
        try:
            for name, kind in GROUPS.items():
                group = f"{name}."
                values[name] = kind(**values[name])
            group = ""
            return cls(**values)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"config.{group}{error}") from error

    def to_dict(self) -> dict:
        """Plain nested dicts, as `from_dict` takes them."""
        values = dataclasses.asdict(self)
        del values["optimizer"]["num_steps"]  # there once already
        if self.data.class_names not in ("", class_names.IMAGENET):  # a file's travel with weights
            values["data"]["class_names"] = self.class_names
        return values

    def updated(self, changes: Mapping[str, Any]) -> "Experiment":
        """One with some values changed, by dotted name.

        Raises:
            ConfigError: a name that there is not, or a value that cannot work.
        """
        values = self.to_dict()
        for name, value in changes.items():
            *groups, key = name.split(".")
            place = values
            for group in groups:
                if not isinstance(place.get(group), dict):
                    raise unknown_key(name, keys_of(Experiment))
                place = place[group]
            place[key] = value
        return Experiment.from_dict(values)

    @functools.cached_property
    def modality(self) -> Modality:
        """What tokens stand for."""
        try:
            return MODALITIES[self.data.modality].from_settings(self.data)
        except TypeError as error:  # of its signature, which says the option
            options = self.data.options
            raise ConfigError(f"config.data.options is {options}: {error}.") from error

    @property
    def has_decoder(self) -> bool:
        """Whether the model makes latents, and an autoencoder is named that decodes them."""
        return self.modality.needs_decoder and bool(self.autoencoder.path)

    @property
    def lacks_decoder(self) -> bool:
        """Whether the model makes latents, and no autoencoder is named that decodes them."""
        return self.modality.needs_decoder and not self.autoencoder.path

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """`[(T,) H, W, C]` of what samples are, or of what an autoencoder makes of them."""
        if not self.modality.needs_decoder:
            return getattr(self.modality, "picture_shape", self.modality.example_shape)
        size = self.data.image_size * AUTOENCODERS[self.autoencoder.name].stride
        return (*self.modality.example_shape[:-3], size, size, 3)

    def decoded_by(self, sha256: str) -> "Experiment":
        """One whose latents are those of the autoencoder with `sha256`, unless that is empty."""
        return self.updated({"autoencoder.sha256": sha256}) if sha256 else self

    @property
    def classes_are_known(self) -> bool:
        """Whether their number and names do not wait for what the data say, or there are none."""
        if isinstance(self.network.conditioner, Reader):
            return True
        return self.data.num_classes > 0 and bool(self.data.class_names or not self.data.path)

    def with_classes(self, count: int, names: Sequence[str] | None) -> "Experiment":
        """One with as many classes, so called, as far as it leaves that to the data.

        Raises:
            ConfigError: no such labels can be drawn.
        """
        data, changes = self.data, {}
        count = data.num_classes or (1 if data.unconditional else len(self.class_names) or count)
        if count != data.num_classes:
            changes["data.num_classes"] = count
        if not data.class_names and names and len(names) == count:
            changes["data.class_names"] = tuple(names)
        experiment = self.updated(changes) if changes else self
        _ = experiment.sample_conditions  # checks the labels that are asked for
        return experiment

    def completed_by(self, stored: "Experiment") -> "Experiment":
        """One that has what it leaves open from the configuration of a checkpoint."""
        decoded = self.decoded_by(stored.autoencoder.sha256)
        names = stored.class_names if stored.data.class_names else None
        return decoded.with_classes(stored.data.num_classes, names)

    @functools.cached_property
    def token_loss(self) -> TokenLoss:
        """The token loss with its sampler."""
        kind, options = TOKEN_LOSSES[self.loss.name], self.loss.options
        own = {field.name for field in dataclasses.fields(kind)} - SHARED_LOSS_FIELDS
        check_options("loss.options", options, own, f"the loss {self.loss.name}")
        if self.sample.sampler not in kind.samplers:
            raise ConfigError(
                f"config.sample.sampler is {self.sample.sampler!r}; with config.loss.name "
                f"{self.loss.name} it must be one of {', '.join(kind.samplers)}."
            )
        try:
            return kind(
                noise_multiplicity=self.loss.noise_multiplicity,
                num_denoise_steps=self.sample.num_denoise_steps,
                sampler=self.sample.sampler,
                guided_shares=(self.sample.cfg_denoise_start, self.sample.cfg_denoise_stop),
                **options,
            )
        except ValueError as error:
            name = str(error).partition(" ")[0]
            group = "loss.options" if name in own else "sample"
            raise ConfigError(f"config.{group}.{error}") from error

    def check_attention(self, platform: str = "gpu") -> None:
        """Raise ConfigError if the attention asked for by name cannot be had on a platform."""
        model = self.model
        width = model.shape["width"] // model.shape["num_heads"]
        what = (platform, self.compute_dtype, width, model.attention_dropout)
        if why := obstacle(model.attention, *what):
            raise ConfigError(f'config.model.attention is "{model.attention}"; {why}.')

    @functools.cached_property
    def network(self) -> ModelConfig:
        """The shape of the networks."""
        model, modality = self.model, self.modality
        self.check_attention()
        options = model.condition_options
        try:
            conditioner = CONDITIONERS[model.condition](self.data.num_classes, **options)
        except TypeError as error:  # of its signature, which says the option
            raise ConfigError(f"config.model.condition_options is {options}: {error}.") from error
        if isinstance(conditioner, Reader) and not conditioner.num_prefix_tokens:
            size = model.num_prefix_tokens
            conditioner = dataclasses.replace(conditioner, num_prefix_tokens=size)
        return ModelConfig(
            grid=modality.grid,
            token_dim=modality.token_dim,
            factorised_positions=modality.factorised_positions,
            conditioner=conditioner,
            denoiser_out=TOKEN_LOSSES[self.loss.name].out_per_channel * modality.token_dim,
            mlp_ratio=model.mlp_ratio,
            num_prefix_tokens=model.num_prefix_tokens,
            qk_norm=model.qk_norm,
            jepa_head=self.loss.jepa_weight > 0,
            attention_dropout=model.attention_dropout,
            dropout=model.dropout,
            attention=model.attention,
            compute_dtype=self.compute_dtype,
            remat=model.remat,
            scan_unroll=model.scan_unroll,
            **model.shape,
        )

    @functools.cached_property
    def train(self) -> TrainStepConfig:
        """The training step; one accumulation step where the number is to be found out."""
        loss = self.loss
        group_size = loss.mask_group or self.batch_size
        if self.batch_size % group_size:
            raise ConfigError(
                f"config.loss.mask_group is {group_size}; it must divide config.batch_size, "
                f"{self.batch_size}."
            )
        return TrainStepConfig(
            model=self.network,
            token_loss=self.token_loss,
            masking=MaskingConfig(
                num_tokens=self.network.num_tokens,
                batch_size=self.batch_size,
                ratio_min=loss.mask_ratio_min,
                ratio_std=loss.mask_ratio_std,
                group_size=group_size,
            ),
            optimizer=self.optimizer,
            modality=self.modality,
            seed=self.seed,
            token_weight=loss.token_weight,
            jepa_weight=loss.jepa_weight,
            label_drop_prob=loss.label_drop_prob,
            mask_modes=loss.modes,
            grad_accumulation_steps=self.grad_accumulation_steps or 1,
        )

    @functools.cached_property
    def sampler(self) -> SamplerConfig:
        """The sampler."""
        sample = self.sample
        conditioner, regions = self.network.conditioner, ()
        if "@" in sample.mix:
            regions = regions_of(self)
        elif sample.mix:
            conditioner = Mixture(conditioner, len(sample.mix.split(",")))
        config = SamplerConfig(
            # Forwards nothing is kept that unrolled layers would not have to copy
            model=dataclasses.replace(self.network, scan_unroll=1, conditioner=conditioner),
            token_loss=self.token_loss,
            num_ar_steps=sample.num_ar_steps,
            # Of those that are told nothing, samples beside given tokens alone are (`Generator`)
            guided=sample.cfg_scale != 1 and not isinstance(conditioner, Nothing),
            num_segments=sample.num_segments,
            order=sample.order,
            reveal=sample.reveal,
            regions=regions,
            final_denoise_steps=sample.final_denoise_steps,
            cfg_interval=(sample.cfg_start, sample.cfg_stop),
            reuse_unconditional=sample.reuse_unconditional,
            autoguided=sample.guide != "" and sample.guide_scale != 1,
        )
        try:
            _ = config.counts, config.loss_at(config.num_ar_steps - 1)
        except ValueError as error:
            raise ConfigError(f"config.sample.{error}") from error
        return config

    @functools.cached_property
    def cfg_scales(self) -> np.ndarray:
        """Guidance scale of every autoregressive step `[T]`."""
        return self.sampler.guidance(self.sample.cfg_scale, self.sample.cfg_schedule)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return class_names.resolve(self.data.class_names, self.data.num_classes)

    @functools.cached_property
    def sample_conditions(self) -> Any:
        """The condition of each sample, `[count]`: what is asked for, in turn."""
        return conditions.wanted(self.sample, self.network.conditioner, self.class_names)

    def conditions_of(self, labels: np.ndarray, period: int = 1) -> Any:
        """Raw conditions of labels `[n]`; of pairs, with another second label each `period`."""
        return conditions.of_labels(self.network.conditioner, labels, period)

    def titles(self, asked: Any) -> list[str]:
        """What to write above samples of some conditions: class names, or their numbers."""
        conditioner = self.network.conditioner
        names = () if isinstance(conditioner, Nothing) else self.class_names
        return conditions.titles(self.sample, conditioner, names, asked)


GROUPS = {name: kind for name, kind in field_types(Experiment).items() if is_group(kind)}
