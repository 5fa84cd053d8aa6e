"""Files of autoencoders: names in every layout, what is passed over, and what is refused."""

import numpy as np
import pytest
import torch
from official_files import assert_same
from safetensors.numpy import save_file
from small_autoencoder import (
    NAME,
    SMALL,
    cache_config,
    registered,
    shapes_of,
    tensors,
    write_weights,
)

from djepa_jax.checkpoints.autoencoder import Autoencoder, read_autoencoder
from djepa_jax.checkpoints.convert.autoencoder_kl import (
    DIFFUSERS,
    LATENT_DIFFUSION,
    from_tensors,
    names_of,
)
from djepa_jax.checkpoints.convert.mismatch import MismatchError
from djepa_jax.checkpoints.convert.tensor_files import SourceError
from djepa_jax.config.convert import ConfigError
from djepa_jax.core import sharding
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS


@pytest.fixture(scope="module", autouse=True)
def small():
    with registered():
        yield


# Tensors of the autoencoder of Stable Diffusion as diffusers writes it.
KL8 = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down_blocks.0.resnets.0.norm1.weight": (128,),
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
    "encoder.down_blocks.2.downsamplers.0.conv.weight": (512, 512, 3, 3),
    "encoder.down_blocks.3.resnets.1.conv2.bias": (512,),
    "encoder.mid_block.attentions.0.group_norm.weight": (512,),
    "encoder.mid_block.attentions.0.to_q.weight": (512, 512, 1, 1),
    "encoder.mid_block.attentions.0.to_out.0.bias": (512,),
    "encoder.mid_block.resnets.1.norm2.bias": (512,),
    "encoder.conv_norm_out.weight": (512,),
    "encoder.conv_out.weight": (8, 512, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.bias": (4,),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.mid_block.attentions.0.to_k.bias": (512,),
    "decoder.up_blocks.0.resnets.2.conv1.weight": (512, 512, 3, 3),
    "decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
    "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
    "decoder.up_blocks.2.upsamplers.0.conv.bias": (256,),
    "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": (128, 256, 1, 1),
    "decoder.up_blocks.3.resnets.2.norm2.bias": (128,),
    "decoder.conv_norm_out.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}
NOT_IN_KL8 = (
    "encoder.down_blocks.3.downsamplers",
    "decoder.up_blocks.3.upsamplers",
    "decoder.up_blocks.1.resnets.0.conv_shortcut",
)


def test_f8_autoencoder_has_the_names_of_diffusers():
    shapes = shapes_of(AUTOENCODERS["kl8"], DIFFUSERS)
    assert KL8.items() <= shapes.items()
    assert not [name for name in shapes if name.startswith(NOT_IN_KL8)]
    assert (
        len(shapes) == 248
        and sum(np.prod(shape, dtype=int) for shape in shapes.values()) == 83_653_863
    )
    assert AUTOENCODERS["kl8"].stride == 8 and AUTOENCODERS["kl16"].stride == 16


def as_diffusers(old: bool = False, flat: bool = True) -> dict[str, np.ndarray]:
    """The small autoencoder in diffusers layout, with the names of early files or the newer
    ones.
    """
    names = dict(
        zip(
            names_of(SMALL, LATENT_DIFFUSION).values(),
            names_of(SMALL, DIFFUSERS).values(),
            strict=True,
        )
    )
    found = {}
    for name, value in tensors().items():
        name = names[name]
        if flat and ".attentions." in name and value.ndim == 4:
            value = value[:, :, 0, 0]
        if old:
            for new, early in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            ):
                name = name.replace(f".{new}.", f".{early}.")
        found[name] = value
    assert old == any("proj_attn" in name for name in found)
    return found


LOSS = {
    "loss.logvar": np.zeros((), np.float32),
    "loss.discriminator.main.0.weight": np.zeros((4, 3, 4, 4), np.float32),
}
COUNTER = {"loss.discriminator.main.3.num_batches_tracked": np.array(7)}
LAYOUTS = {  # what makes a file's tensors of those in latent-diffusion layout
    "latent diffusion": lambda whole: whole,
    "with training losses": lambda whole: LOSS | whole | COUNTER,
    "diffusers": lambda whole: as_diffusers(),
    "diffusers with convolutions": lambda whole: as_diffusers(flat=False),
    "early diffusers": lambda whole: as_diffusers(old=True),
}
CONTAINERS = {
    "plain PyTorch": lambda whole: whole,
    "early diffusers": lambda whole: as_diffusers(old=True),
    "MAR": lambda whole: {"model": whole},
    "Lightning": lambda whole: {"epoch": 3, "state_dict": whole | LOSS | COUNTER, "states": []},
}


def as_torch(tree):
    """numpy arrays in nested dicts as PyTorch tensors."""
    if isinstance(tree, dict):
        return {name: as_torch(value) for name, value in tree.items()}
    return torch.tensor(tree) if isinstance(tree, np.ndarray) else tree


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_every_layout_gives_the_same_parameters(tmp_path, ending):
    path, expected = tmp_path / f"file{ending}", from_tensors(tensors(), SMALL, "")
    theirs = tensors()["encoder.conv_in.weight"]  # [out, in, k, k]
    assert expected["encoder"]["conv_in"]["kernel"][0, 2, 1, 5] == theirs[5, 1, 0, 2]
    for content in (LAYOUTS if ending == ".safetensors" else CONTAINERS).values():
        if ending == ".safetensors":
            save_file(content(tensors()), path)
        else:
            torch.save(as_torch(content(tensors())), path)
        assert_same(read_autoencoder(path, NAME), expected)


def test_what_does_not_fit_is_one_table(tmp_path):
    content = tensors() | {
        "decoder.conv_in.bias": np.zeros(7, np.float32),
        "more": np.zeros(2, np.float32),
    }
    del content["encoder.mid.attn_1.q.weight"]
    save_file(content, tmp_path / "x.safetensors")
    with pytest.raises(MismatchError) as caught:
        read_autoencoder(tmp_path / "x.safetensors", NAME)
    first, _, *rows = str(caught.value).splitlines()
    assert first.startswith(f'--config.autoencoder.path "{tmp_path}/x.safetensors" does not fit')
    assert [" ".join(row.split()) for row in rows] == [
        "decoder.conv_in.bias shape (7,) (64,)",
        "encoder.mid.attn_1.q.weight missing - (64, 64, 1, 1)",
        "more surplus (2,) -",
    ]


def test_unusable_weights_are_named_by_their_flag(tmp_path):
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "text.ckpt").write_text("words")
    mesh = sharding.make_mesh((-1, 1, 1))
    with pytest.raises(ConfigError, match="config.autoencoder.path is empty; name"):
        Autoencoder(cache_config("", "").autoencoder, mesh)
    for name in ("no/such.ckpt", "a_folder", "text.ckpt"):
        path = str(tmp_path / name)
        with pytest.raises(SourceError, match=f'--config.autoencoder.path "{path}"'):
            Autoencoder(cache_config(path, "").autoencoder, mesh)


def test_weights_of_another_autoencoder_are_refused(tmp_path):
    path = write_weights(tmp_path / "x.safetensors")
    settings = cache_config(path, "", f"--config.autoencoder.sha256={'0' * 64}").autoencoder
    with pytest.raises(ConfigError, match=f"{path}.* has sha256 .*wrong pictures"):
        Autoencoder(settings, sharding.make_mesh((-1, 1, 1)))
