"""Emoji from their names, 64 x 64 in colour: 40 minutes on one core of a CPU.

    djepa --config=emoji --workdir=runs/emoji --config.data.path=emoji.npz
    djepa --workdir=runs/emoji --mode=sample --out=heart.png --config.sample.prompt="red heart|cat"

The file holds `images` (uint8 [n, 64, 64, 3]) and `captions` (texts [n]). Of Noto emoji (Google,
Apache 2.0 and OFL; github.com/googlefonts/noto-emoji, `png/128`) and the names of `pip install
emoji`, it is made by

    import emoji, glob, os, numpy as np
    from PIL import Image
    images, captions = [], []
    for path in sorted(glob.glob("noto-emoji/png/128/emoji_u*.png")):
        codes = os.path.basename(path)[7:-4].split("_")
        name = emoji.demojize("".join(chr(int(code, 16)) for code in codes)).strip(":")
        if name.isascii() and "skin_tone" not in name:
            picture = Image.open(path).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            images.append(np.asarray(white.convert("RGB").resize((64, 64), Image.LANCZOS)))
            captions.append(name.replace("_", " "))
    np.savez("emoji.npz", images=np.stack(images), captions=np.array(captions))

A fifth of the names is never learnt, some colours of things among them that are learnt in others.
The judge can learn from another drawing of the same names, such as Blobmoji, packed as above:
--config.evaluation.captions=blobmoji.npz. docs/text.md says more.
"""

from ml_collections import ConfigDict

from djepa_jax.config.files import builtin


def get_config(variant: str = "cpu") -> ConfigDict:
    """The recipe of own pictures (or its `gpu`), with a reader of names in place of classes."""
    own_pictures = builtin("own_pictures")
    if variant not in own_pictures.VARIANTS:
        raise ValueError(f'emoji.py has no variant "{variant}"; it has cpu and gpu.')
    config = own_pictures.get_config()
    config.num_steps = 7000
    config.batch_size = 32
    config.checkpoint_every = 500
    config.log_every = 50
    config.sample_every = 3500
    config.evaluation.kind = "captions"
    config.evaluation.count = 600
    config.model.num_prefix_tokens = 8
    config.model.condition = "text"
    config.model.condition_options = ConfigDict(
        {"length": 48, "width": 96, "depth": 2, "num_heads": 3}
    )
    config.optimizer.warmup_steps = 200
    config.optimizer.ema_decay = 0.998
    # 16 tokens for the 64 of own pictures: names are learnt from four times as many pictures in the
    # same time, and in 4,000 steps of 16 with 64 tokens they were not learnt at all
    config.data.patch_size = 16
    config.sample.num_ar_steps = 16
    if variant == "gpu":
        own_pictures.set_gpu(config)
        config.data.patch_size, config.sample.num_ar_steps = 8, 32
    config.data.source = "npz"
    config.data.options = ConfigDict({"cutoff": 0.5, "colour_cutoff": 0.26})
    config.data.held_out = 0.2
    return config
