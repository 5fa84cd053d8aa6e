"""D-JEPA-B on ImageNet 256 in KL-16 latents: 212 M parameters, 1400 epochs at batch 2048.

    # the latents, once, from an image folder (a folder per class) or ILSVRC's archive
    djepa --mode=prepare --config=djepa_b --workdir=CACHE \\
        --config.prepare.source=folder --config.prepare.path=IMAGENET/train \\
        --config.autoencoder.path=kl16.ckpt
    # 8 H200
    bash launch/train_gpu.sh --config=configs/djepa_b.py --workdir=DIR \\
        --config.data.path=CACHE --config.autoencoder.path=kl16.ckpt
    # 32 TPU v6e, from a workstation; workers copy cache and autoencoder from the bucket
    bash launch/train_tpu_vm.sh --name=djepa-b --zone=ZONE --accelerator_type=v6e-32 \\
        --config=configs/djepa_b.py --workdir=gs://BUCKET/djepa_b \\
        --cache=gs://BUCKET/CACHE --autoencoder=gs://BUCKET/kl16.safetensors
    # raw pixels, without latents and autoencoder
    bash launch/train_gpu.sh --config=configs/djepa_b.py:pixels --workdir=DIR \\
        --config.data.path=IMAGENET/train

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
    return builtin("recipes").imagenet("B", epochs=1400, cfg_scale=3.0, variant=variant)
