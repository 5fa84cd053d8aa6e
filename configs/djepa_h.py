"""D-JEPA-H on ImageNet 256 in KL-16 latents: 1,427 M parameters, 320 epochs at batch 2048.

Commands, from the archive of images to samples: docs/imagenet.md.
On 32 TPU v6e add '--config.mesh=(1,-1,1)', which splits the state.

Work: 1,163 EFLOP (`core/flops.py`, nothing wasted). Time at 40 % of the speed named, a calculation
and not a measurement:
    8 x H200, 790 TFLOP/s (what its bfloat16 products reach; data sheet 989): 128 hours
    32 x TPU v6e, 918 TFLOP/s (data sheet): 27 hours
    32 x TPU v4, 275 TFLOP/s (data sheet): 92 hours
Memory: 21.3 GiB of state; `config.grad_accumulation_steps` chooses itself by XLA's plan.
Result of the paper: FID 2.04 without guidance, 1.54 with guidance 3.9; not reproduced here.
Variants (joined with "+"): flow, no_jepa, unconditional, pixels, 512, debug; see recipes.py.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config(variant: str = "diffusion") -> ConfigDict:
    """The paper's row for size H."""
    return builtin("recipes").imagenet("H", epochs=320, cfg_scale=3.9, variant=variant)
