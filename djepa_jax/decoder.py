"""An autoencoder with its weights, jitted on a mesh: pictures to moments, latents to pictures."""

import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from djepa_jax import sharding
from djepa_jax.config import ConfigError
from djepa_jax.interop.autoencoder import from_tensors
from djepa_jax.interop.tensor_files import SourceError, open_tensors
from djepa_jax.manifest import file_sha256
from djepa_jax.modalities.image_pixels import to_pixels, to_range
from djepa_jax.models.autoencoder_kl import AUTOENCODERS, decode_tiled, split_autoencoder

TILE, OVERLAP = 64, 16  # latents; maps up to 64 x 64 (1024 pixels with KL-16) are decoded whole


class Autoencoder:
    """An autoencoder as `config.autoencoder` describes it. Encoding is float32, decoding in the configured type.

    Attributes:
        config: shape of the networks.
        sha256: of the weight file.
        batch_size: images per call of a jitted function.

    Raises:
        ConfigError: no file is named.
        SourceError, MismatchError: the file cannot be read, or is of another autoencoder.
    """

    def __init__(self, settings, mesh):
        if not settings.path:
            raise ConfigError("config.autoencoder.path is empty; name the weights (kl16.ckpt, or a .safetensors file).")
        path = pathlib.Path(os.path.expanduser(settings.path))
        self.config, self._mesh = AUTOENCODERS[settings.name], mesh
        params = read_autoencoder(path, settings.name)
        self.sha256 = file_sha256(path)
        divisor = sharding.batch_divisor(mesh)
        self.batch_size = -(-settings.batch_size // divisor) * divisor
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._encode = jax.jit(make_encoder(settings.name), out_shardings=sharding.replicated(mesh))
        self._decode = jax.jit(make_decoder(settings.name, settings.dtype), out_shardings=sharding.replicated(mesh))

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Moments of images and of their mirror images: uint8 `[n, H, W, 3]` -> float32 `[n, 2, h, w, 2c]`."""
        return self._in_batches(self._encode, images)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents in the autoencoder's own scale, `[n, h, w, c]` -> uint8 `[n, H, W, 3]`."""
        return self._in_batches(self._decode, latents)

    def _in_batches(self, function: Callable, arrays: np.ndarray) -> np.ndarray:
        """Apply a jitted function batch by batch; the last one is padded, so that one program serves all."""
        place, results = sharding.batch_sharding(self._mesh), []
        for start in range(0, len(arrays), self.batch_size):
            chosen = np.arange(start, start + self.batch_size) % len(arrays)
            results.append(np.asarray(function(self._params, jax.device_put(arrays[chosen], place))))
        return np.concatenate(results)[: len(arrays)]


def read_autoencoder(path: pathlib.Path, name: str) -> dict:
    """Parameters of the autoencoder called `name` in `AUTOENCODERS`, from a file in either known layout.

    Raises:
        SourceError, MismatchError: the file cannot be read, or is of another autoencoder.
    """
    flag = "--config.autoencoder.path"
    try:
        file = open_tensors(path)
    except SourceError as error:
        raise SourceError(str(error).replace("--source", flag, 1)) from error
    tensors = next(iter(file.weights.values()))
    return from_tensors(tensors, AUTOENCODERS[name], f'{flag} "{path}"')


def make_encoder(name: str) -> Callable:
    """The function (params, uint8 images `[B, H, W, 3]`) -> moments `[B, 2, h, w, 2c]` of image and mirror image."""
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
