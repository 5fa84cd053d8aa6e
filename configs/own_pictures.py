"""Pictures of your own."""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config() -> ConfigDict:
    """Pictures in folders, 64 x 64 in colour."""
    config = builtin("digits").get_config()
    config.num_steps = 5000
    config.batch_size = 16
    config.checkpoint_every = 400
    config.log_every = 20
    config.sample_every = 800
    config.evaluation.kind = "none"
    config.optimizer.warmup_steps = 100
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.ema_decay = 0.995
    _set_data(config.data)
    _set_sample(config.sample)
    return config


def _set_data(data: ConfigDict) -> None:
    """64 tokens of 19 values."""
    data.source = "folder"
    data.modality = "image_lapped"
    data.image_size = 64
    data.channels = 3
    data.patch_size = 8
    data.options = ConfigDict({"cutoff": 0.45, "colour_cutoff": 0.13})
    data.num_classes = 0  # as many as there are folders, which name them


def _set_sample(sample: ConfigDict) -> None:
    """As many of each class as go into a grid."""
    sample.count = 64
    sample.batch_size = 64
    sample.cfg_scale = 2.0
    sample.num_ar_steps = 32
    sample.num_denoise_steps = 30
