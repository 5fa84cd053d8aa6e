"""The groups of a configuration as frozen dataclasses: types, bounds and choices of every key.

`configs/default.py` has the defaults, with a comment for each key.
"""

import dataclasses
from typing import Annotated, Any

from djepa_jax.config.presets import PRESETS
from djepa_jax.core.bounds import (
    AboveZero,
    AtLeastZero,
    Bound,
    Finite,
    Fraction,
    Moderate,
    Natural,
    OneOf,
    Positive,
    Ratio,
    Seed,
    Share,
    check_bounds,
)
from djepa_jax.core.losses import TOKEN_LOSSES
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.core.models.attention import IMPLEMENTATIONS
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS
from djepa_jax.core.models.conditioning import CONDITIONERS
from djepa_jax.core.models.djepa import SIZES
from djepa_jax.core.models.vit import REMAT_POLICIES
from djepa_jax.core.schedules import GUIDANCE, ORDERS, REVEALS

Options = dict[str, Any]  # keyword arguments of what a table names
FILES_OF_PAIRS = ("pictures", "sounds")  # options of the source `paired`
# Keys that name files and folders; data.class_names may also be the names themselves.
PATHS = ("data.path", "data.staging", "data.class_names", "prepare.path", "autoencoder.path")
PATHS += ("evaluation.weights", "evaluation.reference", "evaluation.captions")
Several = Annotated[int, Bound(lambda x: x >= 2, "at least 2")]
Dtype = Annotated[str, OneOf(("float32", "bfloat16"))]
Sha256 = Annotated[
    str,
    Bound(
        lambda x: x == "" or (len(x) == 64 and set(x) <= set("0123456789abcdef")),
        "empty, or 64 hexadecimal digits in lower case",
    ),
]


class Settings:
    """A group of keys; values out of bounds raise ValueError."""

    def __post_init__(self):
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class ModelSettings(Settings):
    """The networks; widths and depths of 0 are as `size` says."""

    size: Annotated[str, OneOf((*SIZES, "custom"))]
    width: Natural
    encoder_depth: Natural
    predictor_depth: Natural
    num_heads: Natural
    denoiser_depth: Natural
    denoiser_width: Natural
    mlp_ratio: AboveZero
    num_prefix_tokens: Positive
    qk_norm: bool
    dropout: Share
    attention_dropout: Share
    attention: Annotated[str, OneOf(IMPLEMENTATIONS)]
    remat: Annotated[str, OneOf(REMAT_POLICIES)]
    scan_unroll: Positive
    condition: Annotated[str, OneOf(CONDITIONERS)]
    condition_options: Options

    def __post_init__(self):
        check_bounds(self)
        for key, value in self.shape.items():
            if value < 1:
                raise ValueError(f'{key} is 0; with size "custom" it must be given, and above 0.')
        width, heads = self.shape["width"], self.shape["num_heads"]
        if width % heads:
            raise ValueError(f"width is {width}; it must be a multiple of num_heads, {heads}.")
        if int(width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; it leaves the MLPs no hidden unit.")

    @property
    def shape(self) -> dict[str, int]:
        """Widths, depths and heads: those of the named size, overridden by keys that are not 0."""
        keys = SIZES["B"]
        return {key: getattr(self, key) or SIZES.get(self.size, {}).get(key, 0) for key in keys}


@dataclasses.dataclass(frozen=True)
class LossSettings(Settings):
    """What is minimised, and what is hidden for it."""

    name: Annotated[str, OneOf(TOKEN_LOSSES)]
    options: Options
    token_weight: AtLeastZero
    jepa_weight: AtLeastZero
    label_drop_prob: Share
    noise_multiplicity: Positive
    mask_ratio_min: Ratio
    mask_ratio_std: AboveZero
    mask_group: Natural
    mask_modes: str

    def __post_init__(self):
        check_bounds(self)
        _ = self.modes
        if not self.token_weight + self.jepa_weight > 0:
            raise ValueError("token_weight is 0; with a jepa_weight of 0 it must be above 0.")

    @property
    def modes(self) -> tuple[tuple[str, float], ...]:
        """Orders of which the front is shown, with the shares of the examples, summing to one."""
        words = [part.partition(":") for part in self.mask_modes.split(",")]
        try:
            pairs = [(name, float(share) if colon else 1.0) for name, colon, share in words]
        except ValueError:
            pairs = []
        if not pairs or not all(name in ORDERS and 0 < share < 1e6 for name, share in pairs):
            raise ValueError(
                f"mask_modes is {self.mask_modes!r}; write orders with their shares, such as "
                f"random:0.6,frame_causal:0.2,ends:0.2, of {', '.join(ORDERS)}."
            )
        total = sum(share for _, share in pairs)
        return tuple((name, share / total) for name, share in pairs)


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
    """What is learned from."""

    source: str
    source_options: Options
    path: str
    staging: str
    device_resident: bool
    unconditional: bool
    max_broken: Natural
    modality: Annotated[str, OneOf(MODALITIES)]
    options: Options
    labels: str
    captions: str
    held_out: Share
    image_size: Positive
    channels: Positive
    patch_size: Positive
    latent_scale: AboveZero
    latent_shift: Finite
    num_classes: Natural
    class_names: str | tuple[str, ...]
    random_flip: bool
    num_threads: Positive

    def __post_init__(self):
        check_bounds(self)
        if self.unconditional and self.num_classes > 1:
            raise ValueError(
                f"num_classes is {self.num_classes}; with data.unconditional it must be 1."
            )

    @property
    def places(self) -> dict[str, str]:
        """The keys that say where the data lie, and what they say."""
        options = {key: self.source_options.get(key) for key in FILES_OF_PAIRS}
        named = {f"data.source_options.{key}": x for key, x in options.items() if x is not None}
        return named or {"data.path": self.path}


@dataclasses.dataclass(frozen=True)
class PrepareSettings(Settings):
    """What --mode=prepare makes a latent cache of."""

    source: str
    path: str
    image_size: Positive
    shard_size: Positive
    dtype: Dtype
    max_broken: Natural


@dataclasses.dataclass(frozen=True)
class AutoencoderSettings(Settings):
    """Between pictures and latents."""

    name: Annotated[str, OneOf(AUTOENCODERS)]
    path: str
    sha256: Sha256
    batch_size: Positive
    dtype: Dtype


@dataclasses.dataclass(frozen=True)
class SampleSettings(Settings):
    """What sampling makes, and how."""

    labels: str
    prompt: str
    mix: str
    count: Positive
    seed: Seed
    order: Annotated[str, OneOf(ORDERS)]
    reveal: Annotated[str, OneOf(REVEALS)]
    cfg_scale: Moderate
    cfg_schedule: Annotated[str, OneOf(GUIDANCE)]
    cfg_start: Fraction
    cfg_stop: Fraction
    cfg_denoise_start: Fraction
    cfg_denoise_stop: Fraction
    reuse_unconditional: Positive
    guide: str
    guide_scale: Moderate
    temperature: Moderate
    num_ar_steps: int
    num_denoise_steps: int
    final_denoise_steps: Natural
    sampler: str
    batch_size: Positive
    num_segments: Positive

    def __post_init__(self):
        check_bounds(self)
        for name in ("cfg", "cfg_denoise"):
            start, stop = getattr(self, f"{name}_start"), getattr(self, f"{name}_stop")
            if start >= stop:
                raise ValueError(
                    f"{name}_start is {start}; it must be below {name}_stop, {stop}, or there is "
                    "no guidance at all, for which cfg_scale is 1."
                )
        if self.guide and self.reuse_unconditional > 1:
            raise ValueError(
                f"reuse_unconditional is {self.reuse_unconditional}; with sample.guide it must be "
                "1, since it is for one guidance alone."
            )


@dataclasses.dataclass(frozen=True)
class DebugSettings(Settings):
    """For looking into a run."""

    nans: bool
    log_compiles: bool
    profile_steps: Natural
    profile_start: Natural


@dataclasses.dataclass(frozen=True)
class EvaluationSettings(Settings):
    """How samples are judged."""

    kind: str
    count: Several
    trend_count: Several
    seed: Seed
    weights: str
    reference: str
    reference_count: Natural
    captions: str
    preset: Annotated[str, OneOf(("none", *PRESETS))]


@dataclasses.dataclass(frozen=True)
class SearchSettings(Settings):
    """The grid of --mode=search: values of keys of `SampleSettings`, which has their bounds."""

    preset: Annotated[str, OneOf(("grid", "acceleration"))]
    cfg_scale: tuple[float, ...]
    temperature: tuple[float, ...]
    num_ar_steps: tuple[int, ...]
    num_denoise_steps: tuple[int, ...]
    sampler: tuple[str, ...]
    cfg_denoise_start: tuple[float, ...]
    guide_scale: tuple[float, ...]
    count: Several
    fine_count: Several
    fine_cells: Natural

    def __post_init__(self):
        check_bounds(self)
        if self.fine_cells and self.fine_count < self.count:
            raise ValueError(
                f"fine_count is {self.fine_count}; it must be at least count, {self.count}, or "
                "fine_cells 0."
            )
