"""D-JEPA-H on ImageNet 256 in VAE latents: 1,427 M parameters, 320 epochs at batch 2048 (paper, table of results).

    python -m djepa_jax.main --mode=prepare --config=configs/djepa_h.py --workdir=CACHE \\
        --config.prepare.source=folder --config.prepare.path=IMAGENET/train --config.autoencoder.path=kl16.ckpt
    python -m djepa_jax.main --config=configs/djepa_h.py --workdir=DIR --config.data.path=CACHE \\
        --config.autoencoder.path=kl16.ckpt

Work: 1,160 EFLOP (flops.py, nothing wasted), 102 hours on 8 H200 at 40 % of their bfloat16 peak: a calculation, not a
measurement. Few devices: `--config.microbatches=8` gives the same result in an eighth of the activation memory.
Result of the paper: FID 2.04 without guidance, 1.54 with guidance 3.9; not reproduced here.
Variants (joined with "+"): flow, no_jepa, unconditional, 512, pixels, debug; see configs/recipes.py.
"""

from ml_collections import ConfigDict

from configs.recipes import imagenet


def get_config(variant: str = "diffusion") -> ConfigDict:
    """The paper's row for size H."""
    return imagenet("H", epochs=320, cfg_scale=3.9, variant=variant)
