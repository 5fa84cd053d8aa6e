"""Real 8 x 8 digits: from nothing to legible handwriting in minutes on two CPU cores.

    djepa --config=digits --workdir=runs/digits

Variants: `:flow` (flow matching, the default) and `:diffusion`. The 1,797 images ship inside
scikit-learn. Measured results: docs/benchmarks.md.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin

VARIANTS = ("flow", "diffusion")


def get_config(variant: str = "flow") -> ConfigDict:
    """The digits configuration with one of the two token losses."""
    if variant not in VARIANTS:
        raise ValueError(f'digits.py has no variant "{variant}"; it has {" and ".join(VARIANTS)}.')
    config = builtin("default").get_config()
    config.num_steps = 600
    config.batch_size = 128
    config.compute_dtype = "float32"
    config.checkpoint_every = 200
    config.log_every = 20
    config.sample_every = 200
    config.evaluation.kind = "small_images+classifier"
    _set_model(config.model)
    _set_loss(config.loss)
    _set_optimizer(config.optimizer)
    _set_data(config.data)
    _set_sample(config.sample)
    if variant == "diffusion":
        config.loss.name = "diffusion"
        config.loss.options.clip_x0 = 1.0
        config.sample.sampler = "ddpm"
    return config


def _set_model(model: ConfigDict) -> None:
    """Two and a half million parameters."""
    model.size = "custom"
    model.width = 128
    model.encoder_depth = 4
    model.predictor_depth = 4
    model.num_heads = 4
    model.denoiser_depth = 3
    model.denoiser_width = 192
    model.num_prefix_tokens = 4
    model.dropout = 0.0
    model.attention_dropout = 0.0
    model.remat = "none"
    model.scan_unroll = 4  # a tenth faster on CPUs


def _set_loss(loss: ConfigDict) -> None:
    """Flow matching."""
    loss.name = "flow_matching"
    loss.noise_multiplicity = 2
    # With the recipe's 0.7 at most 4 of the 16 tokens are ever visible in training, too few to
    # learn what the later steps of sampling need: backgrounds turn grey (docs/benchmarks.md has
    # both figures).
    loss.mask_ratio_min = 0.2
    loss.mask_ratio_std = 0.4


def _set_optimizer(optimizer: ConfigDict) -> None:
    """A short training with a cosine."""
    optimizer.learning_rate = 2e-3
    optimizer.learning_rate_schedule = "cosine"
    optimizer.warmup_steps = 60
    optimizer.beta2 = 0.99
    optimizer.clip_norm = 1.0
    optimizer.ema_decay = 0.99


def _set_data(data: ConfigDict) -> None:
    """Images of 8 x 8 pixels in patches of 2 x 2: 16 tokens of 4 values."""
    data.source = "digits"
    data.modality = "image_pixels"
    data.image_size = 8
    data.channels = 1
    data.patch_size = 2
    data.num_classes = 10
    data.class_names = ""  # the digits themselves


def _set_sample(sample: ConfigDict) -> None:
    """Ten of each digit."""
    sample.count = 100
    sample.cfg_scale = 1.5
    sample.temperature = 1.0
    sample.num_ar_steps = 8
    sample.num_denoise_steps = 50
    sample.sampler = "euler"
    sample.batch_size = 100
    sample.num_segments = 2
