"""MNIST, 28 x 28 pixels in 49 windows 4 apart: clean handwriting in 40 minutes of two CPU cores.

    djepa --config=mnist --workdir=runs/mnist --config.data.path=mnist_train.npz

The file holds `images` (uint8 [n, 28, 28]) and `labels`; how to make it and measured results:
docs/benchmarks.md.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config(variant: str = "") -> ConfigDict:
    """The MNIST configuration; takes no variant."""
    if variant:
        raise ValueError(f'mnist.py has no variant "{variant}".')
    config = builtin("digits").get_config()
    config.num_steps = 8500
    config.batch_size = 32  # more steps in the same time
    config.checkpoint_every = 500
    config.keep_every = 2000  # the first of them guides the last one, docs/benchmarks.md
    config.sample_every = 1700
    config.log_every = 50
    config.evaluation.kind = "classifier"
    config.evaluation.count = 5000
    config.data.source = "npz"
    config.data.image_size = 28
    config.data.patch_size = 4
    # 13 of the 16 frequencies of overlapping windows: no seams, and learnt sooner than pixels
    config.data.modality = "image_lapped"
    config.data.options = ConfigDict({"cutoff": 0.8, "colour_cutoff": 0.8})
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.998
    config.sample.cfg_scale = 4.0  # the least distance of a search, docs/benchmarks.md
    config.sample.num_ar_steps = 24
    config.sample.batch_size = 100
    config.sample.num_segments = 3
    return config
