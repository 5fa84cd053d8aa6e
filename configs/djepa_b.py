"""D-JEPA-B on ImageNet 256 in KL-16 latents: 212 M parameters, 1400 epochs at batch 2048.

Commands, from the archive of images to samples: docs/imagenet.md.

Work: 834 EFLOP (`core/flops.py`, nothing wasted). Time at 40 % of the speed named, a calculation
and not a measurement:
    8 x H200, 790 TFLOP/s (what its bfloat16 products reach; data sheet 989): 92 hours
    32 x TPU v6e, 918 TFLOP/s (data sheet): 20 hours
    32 x TPU v4, 275 TFLOP/s (data sheet): 66 hours
Memory: 3.2 GiB of state; `config.grad_accumulation_steps` chooses itself by XLA's plan.
Result of the paper: FID 3.40 without guidance (with guidance not known here); not reproduced here.
Variants (joined with "+"): flow, no_jepa, unconditional, pixels, 512, debug; see recipes.py.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config(variant: str = "diffusion") -> ConfigDict:
    """The paper's row for size B."""
    recipes = builtin("recipes")
    # All 12 layers unrolled: an eighth faster on an H100, and twice as long to compile
    return recipes.imagenet("B", epochs=1400, cfg_scale=3.0, variant=variant, scan_unroll=12)
