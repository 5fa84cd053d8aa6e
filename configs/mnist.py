"""MNIST, 28 x 28: legible handwriting in about an hour of one CPU core.

    djepa --config=mnist --workdir=runs/mnist --config.data.path=mnist_train.npz

Variants: `:patches` (four of 14 x 14 pixels, whose denoiser says the clean patch; the default) and
`:windows` (49 windows 4 pixels apart, flow matching). The file holds `images` (uint8
[n, 28, 28]) and `labels`; how to make it and measured results: docs/benchmarks.md.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin

VARIANTS = ("patches", "windows")


def get_config(variant: str = "patches") -> ConfigDict:
    """The MNIST configuration with one of the two kinds of tokens."""
    if variant not in VARIANTS:
        raise ValueError(f'mnist.py has no variant "{variant}"; it has {" and ".join(VARIANTS)}.')
    config = builtin("digits").get_config()
    config.checkpoint_every = 500
    config.evaluation.kind = "classifier"
    config.evaluation.count = 5000
    config.data.source = "npz"
    config.data.image_size = 28
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200
    config.sample.batch_size = 100
    (_set_patches if variant == "patches" else _set_windows)(config)
    return config


def _set_patches(config: ConfigDict) -> None:
    """Few large tokens: most of the work is the denoiser's, which is wider for it."""
    config.num_steps = 12_000
    config.batch_size = 64
    config.keep_every = 1000  # the first of them guides the last one, docs/benchmarks.md
    config.sample_every = 2000
    config.log_every = 100
    config.data.modality = "image_pixels"
    config.data.patch_size = 14
    config.model.denoiser_width = 512
    config.loss.name = "x_prediction"  # patches of pixels lie near few dimensions of their 196
    # Early times decide what is drawn
    config.loss.options = ConfigDict({"time_mean": -0.7, "time_deviation": 1.1, "time_shift": 1.5})
    config.optimizer.ema_decay = 0.999
    config.sample.sampler = "ancestral"
    config.sample.num_ar_steps = 4
    config.sample.num_denoise_steps = 25
    # The least distance at an accuracy of 0.98 with a guide, docs/benchmarks.md
    config.sample.cfg_scale = 1.5
    config.sample.cfg_schedule = "constant"
    config.sample.cfg_denoise_start = 0.45
    config.sample.guide_scale = 1.25
    config.sample.temperature = 1.04


def _set_windows(config: ConfigDict) -> None:
    """Many small tokens."""
    config.num_steps = 8500
    config.batch_size = 32  # more steps in the same time
    config.keep_every = 2000
    config.sample_every = 1700
    config.log_every = 50
    config.data.patch_size = 4
    # 13 of the 16 frequencies of overlapping windows: no seams, and learnt sooner than pixels
    config.data.modality = "image_lapped"
    config.data.options = ConfigDict({"cutoff": 0.8, "colour_cutoff": 0.8})
    config.optimizer.ema_decay = 0.998
    config.sample.cfg_scale = 4.0  # the least distance of a search, docs/benchmarks.md
    config.sample.num_ar_steps = 24
    config.sample.num_segments = 3
