"""D-JEPA-L on ImageNet 256 in VAE latents: 688 M parameters, 480 epochs at batch 2048 (paper, table of results).

    python -m djepa_jax.main --config=configs/djepa_l.py --workdir=DIR --config.data.path=LATENTS.npz

Result of the paper: FID 2.32 without guidance, 1.58 with guidance 3.0; not reproduced here. Variants: `:diffusion` (the
default, as published) and `:flow`.
"""

from ml_collections import ConfigDict

from configs import default

STEPS_PER_EPOCH = 625  # 1,281,167 images in whole batches of 2048


def get_config(variant: str = "diffusion") -> ConfigDict:
    """The paper's row for size L."""
    if variant not in ("diffusion", "flow"):
        raise ValueError(f'djepa_l.py has no variant "{variant}"; it has diffusion and flow.')
    config = default.get_config()
    config.model.size = "L"
    config.num_steps = 480 * STEPS_PER_EPOCH
    config.optimizer.warmup_steps = 100 * STEPS_PER_EPOCH
    config.sample.cfg_scale = 3.0
    if variant == "flow":
        config.loss.name = "flow_matching"
        config.sample.sampler = "euler"
    return config
