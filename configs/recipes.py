"""What the three ImageNet configurations share: the paper's recipe, and variations of it.

    djepa --config=djepa_b:no_jepa+flow --workdir=DIR --config.data.path=CACHE
    djepa --config=djepa_b:pixels --workdir=DIR --config.data.path=IMAGENET/train
    djepa --config=djepa_b:debug --workdir=DIR

Variants are joined with "+" in any order. `:512` needs latents of its own, so it goes to
`--mode=prepare` as well.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin

STEPS_PER_EPOCH = 625  # 1,281,167 images in whole batches of 2048


def flow(config: ConfigDict) -> None:
    """Flow matching in place of diffusion."""
    config.loss.name = "flow_matching"
    config.loss.options = ConfigDict()
    config.sample.sampler = "euler"


def no_jepa(config: ConfigDict) -> None:
    """Without the JEPA loss and its head; nothing else changes."""
    config.loss.jepa_weight = 0.0


def unconditional(config: ConfigDict) -> None:
    """One class for all images, and no guidance."""
    config.data.unconditional = True
    config.data.num_classes = 1
    config.data.class_names = ""
    config.loss.label_drop_prob = 0.0
    config.sample.cfg_scale = 1.0
    config.sample.temperature = 0.94


def pixels(config: ConfigDict) -> None:
    """Raw pixels in patches of 16 x 16, no autoencoder; images are decoded while training."""
    config.data.modality = "image_pixels"
    config.data.source = "folder"
    config.data.image_size = 256
    config.data.channels = 3
    config.data.patch_size = 16
    if config.loss.name == "diffusion":
        config.loss.options.clip_x0 = 1.0


def size_512(config: ConfigDict) -> None:
    """Images of 512 x 512 pixels, 1024 tokens: 32 x 32 latents, or patches of 16 x 16 pixels."""
    config.data.image_size *= 2
    config.prepare.image_size = 512


def debug(config: ConfigDict) -> None:
    """The same code, tiny, on made-up examples, to see it run in about a minute."""
    config.data.source = "synthetic"
    config.model.size = "custom"
    config.model.width, config.model.num_heads = 32, 2
    config.model.encoder_depth = config.model.predictor_depth = config.model.denoiser_depth = 1
    config.model.denoiser_width = 32
    config.model.num_prefix_tokens = 4
    config.batch_size = 8
    config.num_steps = 20
    config.optimizer.warmup_steps = 5
    config.log_every, config.sample_every, config.checkpoint_every = 5, 20, 10
    config.sample.count = config.sample.batch_size = 4
    config.sample.num_ar_steps = 4
    config.sample.num_denoise_steps = 5
    config.sample.num_segments = 1


# In the order in which they are applied, whatever the order typed: a later one may build on those
# before it.
VARIANTS: dict[str, Callable[[ConfigDict], None]] = {
    "diffusion": lambda config: None,
    "flow": flow,
    "no_jepa": no_jepa,
    "unconditional": unconditional,
    "pixels": pixels,
    "512": size_512,
    "debug": debug,
}
LOSSES = ("diffusion", "flow")  # of which a training has one


def imagenet(
    size: str, epochs: int, cfg_scale: float, variant: str, scan_unroll: int = 1
) -> ConfigDict:
    """The paper's row for a size, varied by one of `VARIANTS`, or by several joined with "+".

    Raises:
        ValueError: a variant that there is not, one named twice, or two that exclude each other.
    """
    chosen = parse_variants(f"djepa_{size.lower()}.py", variant)
    config = builtin("default").get_config()
    config.model.size = size
    config.model.scan_unroll = scan_unroll
    config.num_steps = epochs * STEPS_PER_EPOCH
    config.optimizer.warmup_steps = 100 * STEPS_PER_EPOCH
    config.data.random_flip = True
    config.sample.cfg_scale = cfg_scale
    for name in chosen:
        VARIANTS[name](config)
    return config


def parse_variants(file: str, variant: str) -> list[str]:
    """The names in a `variant` such as "flow+debug", in the order in which they are applied.

    Raises:
        ValueError: as `imagenet`, naming the file.
    """
    names = variant.split("+")
    for name in names:
        if name not in VARIANTS:
            raise ValueError(
                f'{file} has no variant "{name}"; it has {", ".join(VARIANTS)}, also joined with '
                '"+".'
            )
        if names.count(name) > 1:
            raise ValueError(f'{file}:{variant} names the variant "{name}" twice; name it once.')
    if set(LOSSES) <= set(names):
        raise ValueError(
            f"{file}:{variant} asks for two token losses, {' and '.join(LOSSES)}; name one of them."
        )
    return [name for name in VARIANTS if name in names]
