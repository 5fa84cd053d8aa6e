"""Real 8 x 8 digits: trains from nothing to legible digits on two CPU cores.

    python -m djepa_jax.main --config=configs/digits.py --workdir=runs/digits

Variants: `:flow` (flow matching, the default) and `:diffusion`. The 1,797 images ship inside scikit-learn.
"""

from ml_collections import ConfigDict

from configs import default

VARIANTS = ("flow", "diffusion")


def get_config(variant: str = "flow") -> ConfigDict:
    """The digits configuration with one of the two token losses."""
    if variant not in VARIANTS:
        raise ValueError(f'digits.py has no variant "{variant}"; it has {" and ".join(VARIANTS)}.')
    config = default.get_config()
    config.num_steps = 1500
    config.batch_size = 128
    config.compute_dtype = "float32"
    config.checkpoint_every = 500
    config.log_every = 25
    config.sample_every = 500

    config.model.update(
        size="custom", width=128, encoder_depth=4, predictor_depth=4, num_heads=4, denoiser_depth=3, denoiser_width=256,
        num_prefix_tokens=4, dropout=0.0, attention_dropout=0.0, remat="none", scan_unroll=4,
    )  # fmt: skip
    config.loss.update(name="flow_matching", noise_multiplicity=4)
    config.optimizer.update(
        learning_rate=2e-3, learning_rate_schedule="cosine", warmup_steps=100, ema_decay=0.99, clip_norm=1.0, beta2=0.99
    )
    config.data.update(source="digits", modality="image_pixels", image_size=8, channels=1, patch_size=2, num_classes=10)
    config.sample.update(
        count=100, cfg_scale=2.0, cfg_schedule="linear", temperature=1.0, num_ar_steps=16, num_denoise_steps=50, sampler="euler",
        batch_size=100,
    )  # fmt: skip
    config.evaluation.update(kind="small_images", count=1000)
    if variant == "diffusion":
        config.loss.name = "diffusion"
        config.sample.update(sampler="ddpm", clip_x0=1.0)
    return config
