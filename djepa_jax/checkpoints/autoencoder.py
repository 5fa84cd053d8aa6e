"""An autoencoder with its weights, jitted on a mesh: pictures to moments, latents to pictures."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from djepa_jax.checkpoints.convert.autoencoder_kl import from_tensors
from djepa_jax.checkpoints.convert.tensor_files import SourceError, open_tensors
from djepa_jax.checkpoints.integrity import file_sha256
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.experiment import Experiment
from djepa_jax.core import sharding
from djepa_jax.core.modalities.image import to_pixels, to_range
from djepa_jax.core.models.autoencoder_kl import AUTOENCODERS, decode_tiled, split_autoencoder
from djepa_jax.runtime.staging import local_copy

TILE, OVERLAP = 64, 16  # latents; maps up to 64 x 64 (1024 pixels with KL-16) are decoded whole
FLAG = "--config.autoencoder.path"


class Autoencoder:
    """As `config.autoencoder` describes it: it encodes in float32, decodes in the configured type.

    Attributes:
        config: shape of the networks.
        sha256: of the weight file.
        batch_size: images per call of a jitted function.
    """

    def __init__(self, settings, mesh, staging: str = ""):
        self.config, self._mesh = AUTOENCODERS[settings.name], mesh
        path, self.sha256 = find_weights(settings, staging)
        divisor = sharding.batch_divisor(mesh)
        self.batch_size = -(-settings.batch_size // divisor) * divisor
        replicated = sharding.replicated(mesh)
        self._params = jax.device_put(read_autoencoder(path, settings.name), replicated)
        self._encode = jax.jit(make_encoder(settings.name), out_shardings=replicated)
        decoder = make_decoder(settings.name, settings.dtype)
        self._decode = jax.jit(decoder, out_shardings=replicated)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Uint8 `[n, (T,) H, W, 3]` -> moments `[n, 2, (T,) h, w, 2c]`, also of mirror images."""
        moments = self._in_batches(self._encode, images.reshape(-1, *images.shape[-3:]))
        return np.moveaxis(moments.reshape(*images.shape[:-3], *moments.shape[1:]), -4, 1)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents in its own scale, `[n, (T,) h, w, c]` -> uint8 `[n, (T,) H, W, 3]`."""
        images = self._in_batches(self._decode, latents.reshape(-1, *latents.shape[-3:]))
        return images.reshape(*latents.shape[:-3], *images.shape[1:])

    def _in_batches(self, function: Callable, arrays: np.ndarray) -> np.ndarray:
        """Apply a jitted function; the last batch is padded, so that one program serves all."""
        results = []
        for start in range(0, len(arrays), self.batch_size):
            chosen = np.arange(start, start + self.batch_size) % len(arrays)
            batch = jax.device_put(arrays[chosen], sharding.batch_sharding(self._mesh))
            results.append(np.asarray(function(self._params, batch)))
        return np.concatenate(results)[: len(arrays)]


def find_weights(settings, staging: str = "") -> tuple[pathlib.Path, str]:
    """The file that `config.autoencoder` names, and its sha256; from a bucket, below `staging`.

    Raises:
        ConfigError: none is named, or its sha256 is not the one that is asked for.
        SourceError: it is not there.
    """
    if not settings.path:
        raise ConfigError(f"{FLAG} is empty; name the weights (kl16.ckpt, or a .safetensors file).")
    path = local_copy(settings.path, staging, FLAG.removeprefix("--"))
    if not path.is_file():
        raise SourceError(f'{FLAG} "{settings.path}" does not exist; name the file of weights.')
    found = file_sha256(path)
    if settings.sha256 and found != settings.sha256:
        raise ConfigError(
            f'{FLAG} "{settings.path}" has sha256 {found}, but the latents are those of the '
            f"autoencoder with sha256 {settings.sha256} (config.autoencoder.sha256): another one "
            "makes wrong pictures of them. Name that file."
        )
    return path, found


def weights_sha256(experiment: Experiment) -> str:
    """The sha256 that `find_weights` gives for a configuration."""
    return find_weights(experiment.autoencoder, experiment.data.staging)[1]


def read_autoencoder(path: pathlib.Path, name: str) -> dict:
    """Parameters of the autoencoder called `name` in `AUTOENCODERS`, from a file in any layout."""
    file = open_tensors(path, FLAG)
    return from_tensors(file.groups[file.average], AUTOENCODERS[name], f'{FLAG} "{path}"')


def make_encoder(name: str) -> Callable:
    """The function (params, uint8 `[B, H, W, 3]`) -> moments `[B, 2, h, w, 2c]`, also mirrored."""
    graph, _ = split_autoencoder(AUTOENCODERS[name])

    def encode(params, images):
        both = jnp.concatenate([images, images[:, :, ::-1]])  # [2B, H, W, 3]
        moments = nnx.merge(graph, params).encode(to_range(both))
        return jnp.stack(jnp.split(moments, 2), axis=1)

    return encode


def make_decoder(name: str, dtype: str) -> Callable:
    """The function (params, latents `[B, h, w, c]`) -> uint8 images `[B, H, W, 3]`."""
    graph, _ = split_autoencoder(AUTOENCODERS[name], jnp.dtype(dtype))

    def decode(params, latents):
        return to_pixels(decode_tiled(nnx.merge(graph, params).decode, latents, TILE, OVERLAP))

    return decode
