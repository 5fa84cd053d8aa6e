"""Spoken digits, told by digit and speaker, as sound at 8 kHz: forty minutes of one CPU core.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    djepa --config=spoken_digits --workdir=runs/spoken \\
        --config.data.path=free-spoken-digit-dataset/recordings

The recordings of the Free Spoken Digit Dataset (Zohar Jackson and contributors, CC BY-SA 4.0) are
called DIGIT_SPEAKER_NUMBER.wav. docs/audio.md says more.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config() -> ConfigDict:
    """The networks and losses of the digits, for tokens of a spectrogram."""
    config = builtin("digits").get_config()
    config.num_steps = 5500
    config.batch_size = 32
    config.checkpoint_every = 1000
    config.log_every = 50
    config.sample_every = 1000
    config.evaluation.kind = "classifier"  # or spoken_digits, a speech recogniser
    config.evaluation.count = 200
    config.model.condition = "class_pair"
    config.model.condition_options.second_classes = 6  # speakers
    config.model.denoiser_width = 384
    # Tokens of 320 values: docs/training.md
    config.loss.name = "x_prediction"
    config.loss.options = ConfigDict({"time_mean": -2.0, "time_deviation": 1.0, "time_shift": 3.0})
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.998
    _set_data(config.data)
    config.sample.count = 60
    config.sample.batch_size = 60
    config.sample.num_ar_steps = 16
    return config


def _set_data(data: ConfigDict) -> None:
    """Waves of 1.024 seconds; windows of 20 bands and 16 frames: 16 tokens of 320 values."""
    data.source = "folder"
    data.modality = "audio_mel"
    data.labels = "digit,speaker"
    options = data.options
    options.rate, options.n_fft, options.hop = 8000, 256, 64
    options.mels, options.frames = 40, 128
    options.patch_mels, options.patch_frames = 20, 16
    options.floor, options.mean, options.deviation = 100.0, 6.05, 2.12
