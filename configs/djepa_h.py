"""D-JEPA-H on ImageNet 256 in VAE latents: 1,427 M parameters, 320 epochs at batch 2048 (paper, table of results).

    python -m djepa_jax.main --config=configs/djepa_h.py --workdir=DIR --config.data.path=LATENTS.npz

Result of the paper: FID 2.04 without guidance, 1.54 with guidance 3.9; not reproduced here. Variants: `:diffusion` (the
default, as published) and `:flow`.
"""

from ml_collections import ConfigDict

from configs import default

STEPS_PER_EPOCH = 625  # 1,281,167 images in whole batches of 2048


def get_config(variant: str = "diffusion") -> ConfigDict:
    """The paper's row for size H."""
    if variant not in ("diffusion", "flow"):
        raise ValueError(f'djepa_h.py has no variant "{variant}"; it has diffusion and flow.')
    config = default.get_config()
    config.model.size = "H"
    config.num_steps = 320 * STEPS_PER_EPOCH
    config.optimizer.warmup_steps = 100 * STEPS_PER_EPOCH
    config.sample.cfg_scale = 3.9
    if variant == "flow":
        config.loss.name = "flow_matching"
        config.sample.sampler = "euler"
    return config
