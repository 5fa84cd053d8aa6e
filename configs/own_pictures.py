"""Pictures of your own, 64 x 64 in colour: recognisable things in half an hour on two CPU cores.

    bash launch/setup.sh cpu && source .venv/bin/activate
    djepa --config=own_pictures --workdir=runs/mine --config.data.path=IMAGES
    djepa --workdir=runs/mine --mode=sample --out=grid.png

IMAGES holds a folder of pictures per class (or pictures alone), of any size. Grids appear in
runs/mine/samples, beside `real.png`, real examples of the same classes. With 3,068 photographs of
clothing they showed blobs of the right colours, full of specks, after 5 minutes; first outlines
after 9; things with clear outlines after 17; and docs/images/own_pictures_clothing.png after 26.

What is young gets fewer specks from grid to grid. Something is wrong if real.png does not show your
pictures, if `token_loss` has not halved after 400 steps, or if there is no outline by step 1,600:
docs/own_data.md.

`own_pictures:gpu` has four times as many parameters and eight times as large batches, for a GPU.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin

VARIANTS = ("cpu", "gpu")


def get_config(variant: str = "cpu") -> ConfigDict:
    """The digits' networks on tokens of larger pictures; small batches, for many steps count."""
    if variant not in VARIANTS:
        raise ValueError(
            f'own_pictures.py has no variant "{variant}"; it has {" and ".join(VARIANTS)}.'
        )
    config = builtin("digits").get_config()
    config.model.denoiser_width = 256  # with which docs/own_data.md was measured
    config.num_steps = 5000
    config.batch_size = 16
    config.checkpoint_every = 400
    config.log_every = 20
    config.sample_every = 800
    config.evaluation.kind = "auto"
    config.optimizer.warmup_steps = 100
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.ema_decay = 0.995
    _set_data(config.data)
    _set_sample(config.sample)
    if variant == "gpu":
        set_gpu(config)
    return config


def set_gpu(config: ConfigDict) -> None:
    """Eleven million parameters; ten minutes of one H100 are about 250 rounds of 3,000 pictures."""
    config.num_steps = 6000
    config.batch_size = 128
    config.checkpoint_every = 1000
    config.log_every = 100
    config.sample_every = 2000
    config.model.width = 256
    config.model.encoder_depth = 6
    config.model.predictor_depth = 6
    config.model.dropout = 0.1
    config.model.scan_unroll = 1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.999


def _set_data(data: ConfigDict) -> None:
    """64 tokens of 19 values; more frequencies are sharper and harder to learn."""
    data.source = "folder"
    data.modality = "image_lapped"
    data.image_size = 64
    data.channels = 3
    data.patch_size = 8
    data.options = ConfigDict({"cutoff": 0.45, "colour_cutoff": 0.13})
    data.num_classes = 0  # as many as there are folders, which name them


def _set_sample(sample: ConfigDict) -> None:
    """A grid of 8 x 8, the classes in turn."""
    sample.count = 64
    sample.batch_size = 64
    sample.cfg_scale = 3.0
    sample.cfg_schedule = "constant"  # shapes are decided by the first tokens
    sample.num_ar_steps = 32
    sample.num_denoise_steps = 30
