"""From an ml-collections config to the frozen objects that the code works with, with every check on
the way.

Nothing here touches a file or a device, so that a wrong value is reported before any work is done.
"""

import dataclasses
import math
from collections.abc import Sequence

from djepa_jax.config import class_names
from djepa_jax.core.losses import SAMPLERS, TOKEN_LOSSES
from djepa_jax.core.masking import MaskPlan, cfg_scales, reveal_counts
from djepa_jax.core.modalities import MODALITIES
from djepa_jax.core.modalities.base import Modality
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS
from djepa_jax.core.models.djepa import SIZES, ModelConfig
from djepa_jax.core.models.vit import REMAT_POLICIES
from djepa_jax.core.optimizer import OptimizerConfig
from djepa_jax.core.sampler import SampleSpec
from djepa_jax.core.train_step import TrainSpec
from djepa_jax.runtime.errors import UserError

# Groups that fix what the parameters mean: they must agree between a config and a checkpoint.
MODEL_KEYS = (
    *(
        f"model.{key}"
        for key in (
            "width",
            "encoder_depth",
            "predictor_depth",
            "num_heads",
            "denoiser_depth",
            "denoiser_width",
        )
    ),
    *(f"model.{key}" for key in ("mlp_ratio", "num_prefix_tokens", "qk_norm")),
    *(f"data.{key}" for key in ("modality", "image_size", "channels", "patch_size", "num_classes")),
    *(f"data.{key}" for key in ("latent_scale", "latent_shift")),
    "loss.name",
    "loss.jepa_weight above 0",
)
MAX_SEED = 2**31 - 1
LATER_KEYS = {  # that older stored configs lack, with the value that means what was done then
    "data.class_names": "",
    "data.latent_shift": 0.0,
    "microbatches": 1,
    "data.max_broken": 100,
    "data.unconditional": False,
    "data.device_resident": False,
    "prepare.source": "folder",
    "prepare.path": "",
    "prepare.image_size": 256,
    "prepare.shard_size": 4096,
    "prepare.dtype": "bfloat16",
    "prepare.max_broken": 100,
    "autoencoder.name": "kl16",
    "autoencoder.path": "",
    "autoencoder.sha256": "",
    "autoencoder.batch_size": 32,
    "autoencoder.dtype": "bfloat16",
    "data.num_threads": 2,
    "debug.nans": False,
    "debug.log_compiles": False,
    "debug.profile_steps": 0,
    "debug.profile_start": 10,
    "data.staging": "",
}
FILE_NAME = "config.json"  # in a workdir: the resolved configuration


class ConfigError(UserError, ValueError):
    """A value that cannot work; the message names the key, the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A validated configuration."""

    modality: Modality
    train: TrainSpec
    sample: SampleSpec
    sample_labels: tuple[int, ...]
    class_names: tuple[str, ...]


def _require(condition: bool, key: str, value, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"config.{key} is {value!r}; {remedy}.")


def _choice(config, key: str, choices) -> None:
    group, _, name = key.rpartition(".")
    value = (config[group] if group else config)[name]
    _require(value in choices, key, value, f"it must be one of {', '.join(sorted(choices))}")


def build(config) -> Experiment:
    """Check a configuration and build everything static from it.

    Raises:
        ConfigError: a value that cannot work, or a key that is missing.
    """
    try:
        _check_choices(config)
        _check_numbers(config)
        return _assemble(config)
    except ConfigError:
        raise
    except (AttributeError, KeyError) as error:
        text = str(error).strip("'\"").splitlines()[0]
        raise ConfigError(f"config lacks a key that configs/default.py has: {text}.") from error
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error


def _assemble(config) -> Experiment:
    modality = make_modality(config.data)
    model = make_model_config(config, modality)
    reveal_counts(modality.num_tokens, config.sample.num_ar_steps)
    token_loss = make_token_loss(config)
    train = TrainSpec(
        model=model,
        token_loss=token_loss,
        plan=make_mask_plan(config, modality.num_tokens),
        optimizer=OptimizerConfig(num_steps=config.num_steps, **config.optimizer),
        tokenize=modality.tokenize,
        seed=config.seed,
        token_weight=config.loss.token_weight,
        jepa_weight=config.loss.jepa_weight,
        label_drop_prob=config.loss.label_drop_prob,
        microbatches=config.microbatches or 1,  # 0: see step_program.py
    )
    sample = SampleSpec(
        model,
        token_loss,
        config.sample.num_ar_steps,
        config.sample.cfg_scale != 1,
        config.sample.num_segments,
    )
    names = class_names.resolve(config.data.class_names, config.data.num_classes)
    labels = parse_labels(config.sample.labels, names, config.sample.count)
    return Experiment(modality, train, sample, labels, names)


def make_mask_plan(config, num_tokens: int) -> MaskPlan:
    """How a batch is masked; `loss.mask_group` 0 stands for the whole batch."""
    loss = config.loss
    return MaskPlan(
        num_tokens,
        config.batch_size,
        loss.mask_ratio_min,
        loss.mask_ratio_std,
        loss.mask_group or config.batch_size,
    )


def _check_choices(config) -> None:
    _choice(config, "compute_dtype", ("float32", "bfloat16"))
    _choice(config, "model.size", (*SIZES, "custom"))
    _choice(config, "model.remat", REMAT_POLICIES)
    _choice(config, "loss.name", TOKEN_LOSSES)
    _choice(config, "optimizer.learning_rate_schedule", ("constant", "cosine"))
    _choice(config, "optimizer.weight_decay_schedule", ("constant", "linear"))
    _choice(config, "data.modality", MODALITIES)
    _choice(config, "prepare.dtype", ("float32", "bfloat16"))
    _choice(config, "autoencoder.name", AUTOENCODERS)
    _choice(config, "autoencoder.dtype", ("float32", "bfloat16"))
    _choice(config, "sample.cfg_schedule", ("linear", "constant"))
    _choice(config, "sample.sampler", SAMPLERS[config.loss.name])
    _choice(config, "evaluation.kind", ("none", "small_images"))


# Bounds of every number: (lowest, highest, what the bounds say), and the keys that they hold for.
ABOVE_ZERO = (0, math.inf, "it must be above 0")
AT_LEAST_ZERO = (0, math.inf, "it must be a finite number, at least 0")
AT_LEAST_ONE = (1, math.inf, "it must be at least 1")
FINITE = (-math.inf, math.inf, "it must be a finite number")
MODERATE = (0, 1e6, "it must be a finite number, at least 0 and at most a million")
SHARE = (0, 1, "it must be at least 0 and below 1")
SEED = (0, MAX_SEED, f"it must be between 0 and {MAX_SEED}")
BOUNDS = {
    AT_LEAST_ONE: "num_steps batch_size checkpoint_every keep_checkpoints log_every max_bad_steps "
    "model.num_prefix_tokens model.scan_unroll loss.noise_multiplicity data.image_size "
    "data.channels data.patch_size "
    "data.num_classes sample.count sample.batch_size sample.num_segments evaluation.count "
    "prepare.image_size "
    "prepare.shard_size autoencoder.batch_size data.num_threads",
    AT_LEAST_ZERO: "microbatches data.max_broken prepare.max_broken sample_every evaluate_every "
    "debug.profile_steps "
    "debug.profile_start "
    "model.width model.encoder_depth model.predictor_depth model.num_heads model.denoiser_depth "
    "model.denoiser_width "
    "loss.token_weight loss.jepa_weight loss.mask_group optimizer.warmup_steps "
    "optimizer.min_learning_rate "
    "optimizer.weight_decay sample.clip_x0",
    MODERATE: "sample.cfg_scale sample.temperature",
    ABOVE_ZERO: "model.mlp_ratio loss.mask_ratio_std optimizer.learning_rate optimizer.epsilon "
    "optimizer.clip_norm "
    "data.latent_scale sample.time_shift",
    SHARE: "model.dropout model.attention_dropout loss.label_drop_prob optimizer.beta1 "
    "optimizer.beta2 optimizer.ema_decay",
    FINITE: "data.latent_shift",
    SEED: "seed sample.seed evaluation.seed",
}


def _is_finite(value) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _check_numbers(config) -> None:
    values = flatten(config.to_dict())
    for bounds, keys in BOUNDS.items():
        lowest, highest, remedy = bounds
        for key in keys.split():
            value = values[key]
            excluded = (bounds is ABOVE_ZERO and value == 0) or (bounds is SHARE and value == 1)
            _require(
                _is_finite(value) and lowest <= value <= highest and not excluded,
                key,
                value,
                remedy,
            )
    _require(
        config.loss.token_weight + config.loss.jepa_weight > 0,
        "loss.token_weight",
        0.0,
        "with a JEPA weight of 0 it must be above 0",
    )
    ratio = config.loss.mask_ratio_min
    _require(
        math.isfinite(ratio) and 0 < ratio <= 1,
        "loss.mask_ratio_min",
        ratio,
        "it must be above 0 and at most 1",
    )
    one = not config.data.unconditional or config.data.num_classes == 1
    _require(
        one, "data.num_classes", config.data.num_classes, "with data.unconditional it must be 1"
    )
    least, most = (1, 1000) if config.loss.name == "diffusion" else (2, math.inf)
    steps = config.sample.num_denoise_steps
    _require(
        least <= steps <= most,
        "sample.num_denoise_steps",
        steps,
        f"it must be between {least} and {most}",
    )
    sha256 = config.autoencoder.sha256
    hexadecimal = sha256 == "" or (len(sha256) == 64 and set(sha256) <= set("0123456789abcdef"))
    _require(
        hexadecimal,
        "autoencoder.sha256",
        sha256,
        "it must be empty, or 64 hexadecimal digits in lower case",
    )
    if config.evaluation.kind == "small_images":
        _require(
            config.data.modality == "image_pixels",
            "evaluation.kind",
            "small_images",
            'it judges pixels; with latents set it to "none"',
        )
        _require(
            config.evaluation.count > 1,
            "evaluation.count",
            config.evaluation.count,
            "it must be at least 2",
        )


def make_modality(data) -> Modality:
    """The modality that `config.data` describes."""
    extra = (
        {"scale": data.latent_scale, "shift": data.latent_shift}
        if data.modality == "image_latents"
        else {}
    )
    return MODALITIES[data.modality](data.image_size, data.channels, data.patch_size, **extra)


def resolve_size(model) -> dict[str, int]:
    """Widths and depths: those of the named size, overridden by keys that are not 0."""
    keys = (
        "width",
        "encoder_depth",
        "predictor_depth",
        "num_heads",
        "denoiser_depth",
        "denoiser_width",
    )
    named = SIZES.get(model.size, {})
    values = {key: model[key] or named.get(key, 0) for key in keys}
    for key, value in values.items():
        _require(
            value > 0,
            f"model.{key}",
            value,
            'with model.size "custom" it must be given, and above 0',
        )
    return values


def make_model_config(config, modality: Modality) -> ModelConfig:
    """The networks' shape.

    Raises:
        ConfigError: heads that do not divide the width, and the like.
    """
    size = resolve_size(config.model)
    heads = size["num_heads"]
    _require(
        size["width"] % heads == 0,
        "model.width",
        size["width"],
        f"it must be a multiple of model.num_heads, {heads}",
    )
    hidden = int(size["width"] * config.model.mlp_ratio)
    _require(
        hidden >= 1, "model.mlp_ratio", config.model.mlp_ratio, "it leaves the MLPs no hidden unit"
    )
    out_per_channel = TOKEN_LOSSES[config.loss.name].out_per_channel
    return ModelConfig(
        num_tokens=modality.num_tokens,
        token_dim=modality.token_dim,
        num_classes=config.data.num_classes,
        denoiser_out=out_per_channel * modality.token_dim,
        mlp_ratio=config.model.mlp_ratio,
        num_prefix_tokens=config.model.num_prefix_tokens,
        qk_norm=config.model.qk_norm,
        jepa_head=config.loss.jepa_weight > 0,
        attention_dropout=config.model.attention_dropout,
        dropout=config.model.dropout,
        compute_dtype=config.compute_dtype,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        **size,
    )


def make_token_loss(config):
    """The token loss with its sampler."""
    shared = dict(
        noise_multiplicity=config.loss.noise_multiplicity,
        num_denoise_steps=config.sample.num_denoise_steps,
        sampler=config.sample.sampler,
    )
    if config.loss.name == "diffusion":
        return TOKEN_LOSSES["diffusion"](clip_x0=config.sample.clip_x0, **shared)
    return TOKEN_LOSSES["flow_matching"](time_shift=config.sample.time_shift, **shared)


def parse_labels(text: str, names: Sequence[str], count: int) -> tuple[int, ...]:
    """The label of each of `count` samples: "all" classes in turn, or a comma-separated list,
    repeated.

    An entry is an index, a name, or a part that only one of the names has.

    Raises:
        ConfigError: an entry that is no class, or may be several.
    """
    if text == "all":
        labels = list(range(len(names)))
    else:
        try:
            labels = [class_names.find_class(word, names) for word in text.split(",")]
        except ValueError as error:
            raise ConfigError(
                f'config.sample.labels is {text!r}; {error} Or write "all".'
            ) from error
    return tuple(labels[i % len(labels)] for i in range(count))


def step_scales(config, num_tokens: int):
    """Guidance scale of every autoregressive step `[T]`."""
    return cfg_scales(
        num_tokens, config.sample.num_ar_steps, config.sample.cfg_scale, config.sample.cfg_schedule
    )


def resolved(config) -> dict:
    """The configuration as plain nested dicts, with the named size written out, for storing beside
    a checkpoint.
    """
    values = config.to_dict()
    values["model"] |= resolve_size(config.model)
    values["loss"]["jepa_weight above 0"] = config.loss.jepa_weight > 0
    values["mesh"] = list(config.mesh)
    if config.data.class_names not in (
        "",
        class_names.IMAGENET,
    ):  # a file's names travel with the weights
        values["data"]["class_names"] = list(
            class_names.resolve(config.data.class_names, config.data.num_classes)
        )
    return values


def upgraded(stored: dict) -> dict:
    """A stored configuration with the keys that came after it was written, set to what was done
    before.
    """
    groups = {
        key: dict(value) if isinstance(value, dict) else value for key, value in stored.items()
    }
    for name, value in LATER_KEYS.items():
        group, _, key = name.rpartition(".")
        (groups.setdefault(group, {}) if group else groups).setdefault(key, value)
    return groups


def differences(stored: dict, current: dict, keys=None) -> list[str]:
    """Lines "key: stored -> current" for every key whose value differs (only `keys`, or all)."""
    stored, current = flatten(stored), flatten(current)
    names = keys or sorted(stored.keys() | current.keys())
    absent = "(absent)"
    return [
        f"{k}: {stored.get(k, absent)} -> {current.get(k, absent)}"
        for k in names
        if stored.get(k) != current.get(k)
    ]


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dicts as one dict with dotted names."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
