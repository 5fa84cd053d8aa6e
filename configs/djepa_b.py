"""D-JEPA-B on ImageNet 256 in VAE latents: 212 M parameters, 1400 epochs at batch 2048 (paper, table of results).

    python -m djepa_jax.main --config=configs/djepa_b.py --workdir=DIR --config.data.path=LATENTS.npz

Result of the paper: FID 3.40 without guidance, with guidance not known here; not reproduced here. Variants: `:diffusion` (the
default, as published) and `:flow`.
"""

from ml_collections import ConfigDict

from configs import default

STEPS_PER_EPOCH = 625  # 1,281,167 images in whole batches of 2048


def get_config(variant: str = "diffusion") -> ConfigDict:
    """The paper's row for size B."""
    if variant not in ("diffusion", "flow"):
        raise ValueError(f'djepa_b.py has no variant "{variant}"; it has diffusion and flow.')
    config = default.get_config()
    config.model.size = "B"
    config.num_steps = 1400 * STEPS_PER_EPOCH
    config.optimizer.warmup_steps = 100 * STEPS_PER_EPOCH
    config.sample.cfg_scale = 3.0
    if variant == "flow":
        config.loss.name = "flow_matching"
        config.sample.sampler = "euler"
    return config
