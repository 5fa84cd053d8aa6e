"""Handwritten and spoken digits in one model: it draws what it hears, and says what it sees.

    djepa --config=say_and_draw --workdir=runs/pairs \\
        --config.data.source_options.pictures=mnist_train.npz \\
        --config.data.source_options.sounds=free-spoken-digit-dataset/recordings

The pictures are those of the MNIST configuration (docs/benchmarks.md), the recordings those of
spoken_digits, as wav files or an npz file; docs/audio.md says more. Its 6,000 steps take 1 h 37 min
of one CPU core.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config() -> ConfigDict:
    """The networks of the digits, for 4 tokens of a picture and 8 of a sound."""
    config = builtin("digits").get_config()
    config.num_steps = 6000
    config.batch_size = 128
    config.checkpoint_every = 1000
    config.log_every = 50
    config.sample_every = 1000
    config.evaluation.kind = "say_and_draw"
    config.evaluation.count = 200
    config.model.condition = "nothing"
    config.model.denoiser_width = 384
    # Tokens of 256 values: docs/training.md
    config.loss.name = "x_prediction"
    config.loss.options = ConfigDict({"time_mean": -2.0, "time_deviation": 1.0, "time_shift": 3.0})
    # Drawing begins with all of a sound, 8 of the 12 tokens: few ratios of the recipe show as many
    config.loss.mask_ratio_min = 0.05
    config.loss.mask_ratio_std = 1.0
    config.loss.mask_modes = "random:0.2,first:0.4,second:0.4"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.999
    _set_data(config.data)
    config.sample.count = 40
    config.sample.batch_size = 50
    config.sample.num_ar_steps = 8
    config.sample.cfg_scale = 3.0  # by what is given: there is no label
    return config


def _set_data(data: ConfigDict) -> None:
    """Pictures of 28 x 28 with edges, in 2 x 2 windows; 1.024 seconds of sound, in 2 x 4.

    Both have 256 values. Frames are 128 samples apart, not 64 as in spoken_digits, which takes half
    of the tokens, and of which a speech recogniser understands almost as much.
    """
    data.source = "paired"
    data.source_options.pictures = ""
    data.source_options.sounds = ""
    data.source_options.sound_labels = "digit"
    data.source_options.num_pairs = 60_000
    data.modality = "joint"
    data.image_size = 32
    data.patch_size = 16
    data.options.first = ConfigDict(
        {"modality": "image_lapped", "cutoff": 1.5, "colour_cutoff": 1.5}
    )
    second = {"modality": "audio_mel", "rate": 8000, "n_fft": 256, "hop": 128, "mels": 32}
    second |= {"frames": 64, "patch_mels": 16, "patch_frames": 16}
    second |= {"floor": 100.0, "mean": 6.05, "deviation": 2.12}
    data.options.second = ConfigDict(second)
