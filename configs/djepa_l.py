"""D-JEPA-L on ImageNet 256 in VAE latents: 688 M parameters, 480 epochs at batch 2048 (paper, table of results).

    python -m djepa_jax.main --mode=prepare --config=configs/djepa_l.py --workdir=CACHE \\
        --config.prepare.source=folder --config.prepare.path=IMAGENET/train --config.autoencoder.path=kl16.ckpt
    python -m djepa_jax.main --config=configs/djepa_l.py --workdir=DIR --config.data.path=CACHE \\
        --config.autoencoder.path=kl16.ckpt

Work: 840 EFLOP (flops.py, nothing wasted), 74 hours on 8 H200 at 40 % of their bfloat16 peak: a calculation, not a
measurement. Few devices: `--config.microbatches=8` gives the same result in an eighth of the activation memory.
Result of the paper: FID 2.32 without guidance, 1.58 with guidance 3.0; not reproduced here.
Variants (joined with "+"): flow, no_jepa, unconditional, 512, pixels, debug; see configs/recipes.py.
"""

from ml_collections import ConfigDict

from configs.recipes import imagenet


def get_config(variant: str = "diffusion") -> ConfigDict:
    """The paper's row for size L."""
    return imagenet("L", epochs=480, cfg_scale=3.0, variant=variant)
