"""Real 8 x 8 digits: from nothing to legible handwriting in minutes on two CPU cores.

    djepa --config=digits --workdir=runs/digits

Variants: `:flow` (flow matching, the default) and `:diffusion`. The 1,797 images ship inside
    scikit-learn. Measured
results: docs/benchmarks.md.
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

    config.model.size = "custom"
    config.model.width = 128
    config.model.encoder_depth = 4
    config.model.predictor_depth = 4
    config.model.num_heads = 4
    config.model.denoiser_depth = 3
    config.model.denoiser_width = 256
    config.model.num_prefix_tokens = 4
    config.model.dropout = 0.0
    config.model.attention_dropout = 0.0
    config.model.remat = "none"
    config.model.scan_unroll = 4  # a tenth faster on CPUs

    config.loss.name = "flow_matching"
    config.loss.noise_multiplicity = 2
    # With the recipe's 0.7 at most 4 of the 16 tokens are ever visible in training, too few to
    # learn what the later
    # steps of sampling need: backgrounds turn grey (docs/benchmarks.md has both figures).
    config.loss.mask_ratio_min = 0.2
    config.loss.mask_ratio_std = 0.4

    config.optimizer.learning_rate = 2e-3
    config.optimizer.learning_rate_schedule = "cosine"
    config.optimizer.warmup_steps = 60
    config.optimizer.beta2 = 0.99
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.99

    config.data.source = "digits"
    config.data.modality = "image_pixels"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.patch_size = 2
    config.data.num_classes = 10
    config.data.class_names = ""  # the digits themselves

    config.sample.count = 100
    config.sample.cfg_scale = 1.5
    config.sample.temperature = 1.0
    config.sample.num_ar_steps = 8
    config.sample.num_denoise_steps = 50
    config.sample.sampler = "euler"
    config.sample.batch_size = 100
    config.sample.num_segments = 2
    config.evaluation.kind = "small_images"
    if variant == "diffusion":
        config.loss.name = "diffusion"
        config.sample.sampler = "ddpm"
        config.loss.options.clip_x0 = 1.0
    return config
