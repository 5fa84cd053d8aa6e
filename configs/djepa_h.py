"""D-JEPA-H on ImageNet 256 in KL-16 latents: 1,427 M parameters, 320 epochs at batch 2048.

    # the latents, once, from an image folder (a folder per class) or ILSVRC's archive
    djepa --mode=prepare --config=djepa_h --workdir=CACHE \\
        --config.prepare.source=folder --config.prepare.path=IMAGENET/train \\
        --config.autoencoder.path=kl16.ckpt
    # 8 H200
    bash launch/train_gpu.sh --config=configs/djepa_h.py --workdir=DIR \\
        --config.data.path=CACHE --config.autoencoder.path=kl16.ckpt
    # 32 TPU v6e, from a workstation; workers copy cache and autoencoder from the bucket
    bash launch/train_tpu_vm.sh --name=djepa-h --zone=ZONE --accelerator_type=v6e-32 \\
        --config=configs/djepa_h.py --workdir=gs://BUCKET/djepa_h \\
        --cache=gs://BUCKET/CACHE --autoencoder=gs://BUCKET/kl16.safetensors \\
        '--config.mesh=(1,-1,1)'
    # raw pixels, without latents and autoencoder
    bash launch/train_gpu.sh --config=configs/djepa_h.py:pixels --workdir=DIR \\
        --config.data.path=IMAGENET/train

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
