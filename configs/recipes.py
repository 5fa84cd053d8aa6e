"""What the three ImageNet configurations share: the paper's recipe, and variations of it."""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import default

STEPS_PER_EPOCH = 625  # 1,281,167 images in whole batches of 2048


def flow(config: ConfigDict) -> None:
    """Flow matching in place of diffusion."""
    config.loss.name = "flow_matching"
    config.sample.sampler = "euler"


def no_jepa(config: ConfigDict) -> None:
    """Without the JEPA loss and its head: masked generation with a denoiser, nothing else changed."""
    config.loss.jepa_weight = 0.0


def unconditional(config: ConfigDict) -> None:
    """One class for all images, and no guidance."""
    config.data.unconditional = True
    config.data.num_classes = 1
    config.data.class_names = ""
    config.loss.label_drop_prob = 0.0
    config.sample.cfg_scale = 1.0
    config.sample.temperature = 0.94


def size_512(config: ConfigDict) -> None:
    """Images of 512 x 512 pixels: 32 x 32 latents, 1024 tokens."""
    config.data.image_size = 32
    config.prepare.image_size = 512


def pixels(config: ConfigDict) -> None:
    """Raw pixels in patches of 16 x 16: 256 tokens of 768 values, no autoencoder."""
    config.data.modality = "image_pixels"
    config.data.source = "folder"
    config.data.image_size = 256
    config.data.channels = 3
    config.data.patch_size = 16
    config.sample.clip_x0 = 1.0


def debug(config: ConfigDict) -> None:
    """The same code, tiny, on made-up latents: a minute on a CPU, to see that everything runs."""
    config.data.source = "synthetic"
    config.model.size = "custom"
    config.model.width, config.model.num_heads = 32, 2
    config.model.encoder_depth = config.model.predictor_depth = config.model.denoiser_depth = 1
    config.model.denoiser_width = 32
    config.model.num_prefix_tokens = 4
    config.batch_size = 8
    config.num_steps = 20
    config.optimizer.warmup_steps = 5
    config.log_every, config.sample_every, config.checkpoint_every = 5, 0, 10
    config.sample.count = config.sample.batch_size = 4
    config.sample.num_ar_steps, config.sample.num_denoise_steps, config.sample.num_segments = 4, 5, 1


VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "diffusion": lambda config: None,
    "flow": flow,
    "no_jepa": no_jepa,
    "unconditional": unconditional,
    "512": size_512,
    "pixels": pixels,
    "debug": debug,
}


def imagenet(size: str, epochs: int, cfg_scale: float, variant: str) -> ConfigDict:
    """The paper's row for a size, varied by one of `VARIANTS`, or by several joined with "+"."""
    config = default.get_config()
    config.model.size = size
    config.num_steps = epochs * STEPS_PER_EPOCH
    config.optimizer.warmup_steps = 100 * STEPS_PER_EPOCH
    config.data.random_flip = True
    config.sample.cfg_scale = cfg_scale
    for name in variant.split("+"):
        if name not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f'djepa_{size.lower()}.py has no variant "{name}"; it has {known}, also joined with "+".')
        VARIANTS[name](config)
    return config
