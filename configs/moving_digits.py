"""Moving MNIST: clips of handwritten digits that bounce off the walls, made on the fly.

    djepa --config=moving_digits --workdir=runs/moving --config.data.path=mnist_train.npz

The file is that of the MNIST configuration (docs/benchmarks.md); without it the digits are those of
scikit-learn, 8 x 8 pixels enlarged. The default is one digit in 8 frames of 32 x 32, for two CPU
cores; `:gpu` is two digits in 16 frames of 64 x 64. How clips are continued: docs/video.md.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin

VARIANTS = ("cpu", "gpu")


def get_config(variant: str = "cpu") -> ConfigDict:
    """The moving digits for two CPU cores or a GPU."""
    if variant not in VARIANTS:
        raise ValueError(
            f'moving_digits.py has no variant "{variant}"; it has {" and ".join(VARIANTS)}.'
        )
    config = builtin("digits").get_config()
    config.num_steps = 6000
    config.batch_size = 64
    config.checkpoint_every = 500
    config.sample_every = 1000
    config.log_every = 50
    config.evaluation.kind = "moving_digits"
    config.evaluation.count = 500
    config.model.denoiser_width = 384
    # Tokens of 512 values: docs/training.md
    config.loss.name = "x_prediction"
    config.loss.options = ConfigDict({"time_mean": -2.0, "time_deviation": 1.0, "time_shift": 3.0})
    config.loss.mask_ratio_min = 0.25  # continuing a clip shows more of it than the recipe does
    config.loss.mask_modes = "random:0.6,frame_causal:0.2,ends:0.2"
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.998
    _set_data(config.data)
    config.sample.count = 30
    config.sample.cfg_scale = 3.0
    config.sample.num_ar_steps = 16
    config.sample.batch_size = 50
    if variant == "gpu":
        _set_gpu(config)
    return config


def _set_data(data: ConfigDict) -> None:
    """One digit of 24 x 24 pixels, in 16 boxes of 2 x 16 x 16.

    64 boxes of 2 x 8 x 8 gave specks in the same time, by flow matching: docs/video.md.
    """
    data.source = "moving_mnist"
    data.source_options = ConfigDict({"num_digits": 1, "digit_size": 48, "num_clips": 60_000})
    data.modality = "video_pixels"
    data.options = ConfigDict({"num_frames": 8, "patch_frames": 2})
    data.image_size = 32
    data.patch_size = 16


def _set_gpu(config: ConfigDict) -> None:
    """Two digits, of which the first is told; 512 tokens of 128 values."""
    config.num_steps = 40_000
    config.batch_size = 256
    config.compute_dtype = "bfloat16"
    config.checkpoint_every = 2000
    config.sample_every = 5000
    config.log_every = 100
    config.model.width = 384
    config.model.encoder_depth = 8
    config.model.predictor_depth = 8
    config.model.num_heads = 6
    config.model.denoiser_depth = 6
    config.model.denoiser_width = 768
    config.model.remat = "dots"
    config.model.scan_unroll = 1
    config.evaluation.kind = "none"  # the judge knows one digit
    config.loss.noise_multiplicity = 4
    config.loss.options = ConfigDict({"time_mean": -1.3, "time_deviation": 1.0, "time_shift": 2.0})
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.ema_decay = 0.9995
    config.data.source_options = ConfigDict(
        {"num_digits": 2, "digit_size": 28, "num_clips": 1_000_000}
    )
    config.data.options.num_frames = 16
    config.data.image_size = 64
    config.data.patch_size = 8
    config.sample.num_ar_steps = 64
    config.sample.num_segments = 8
