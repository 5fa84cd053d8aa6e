"""What a feature network is, running one over any number of pictures, and layers they share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from djepa_jax.runtime.errors import UserError

Params = dict[str, dict[str, np.ndarray]]  # name of a layer -> "kernel" [k, k, I, O], "bias" [O]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
EPSILON = 1e-3  # of batch norms, in Inception and EfficientNet alike
MAX_NAMED = 3  # tensors that an error names
BATCH_SIZE = 16  # CPUs are no faster with more, and the last batch is padded


class Features(Protocol):
    """A network that turns pictures into vectors."""

    name: str  # as it stands in names of figures
    sha256: str  # of its weights

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Of uint8 pictures `[n, H, W, C]`, C 1 or 3: float32 "pool" `[n, D]`.

        Where the network has them, "spatial" `[n, S]` (for sFID) and "logits" `[n, K]` (for the
        Inception Score and accuracy), too.
        """


class FeatureError(UserError, ValueError):
    """Weights or pictures that a feature network cannot use."""


class Network:
    """`Features` by a function `(params, uint8 [B, H, W, 3]) -> {tap: [B, D]}`, a base.

    It runs in float32 (which accelerators do not by themselves), in batches of one size shared out
    among the devices of this process; pictures of another size are another compilation.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        params: dict,
        function: Callable,
        batch_size: int = BATCH_SIZE,
    ):
        devices = jax.local_devices()[:batch_size]
        mesh = Mesh(np.asarray(devices), ("batch",))
        self.name, self.sha256 = name, sha256
        self._batch_size = -(-batch_size // len(devices)) * len(devices)
        self._split = NamedSharding(mesh, PartitionSpec("batch"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

        def apply(params, images):
            colour = jnp.broadcast_to(images, (*images.shape[:3], 3))
            with jax.default_matmul_precision("highest"):
                return function(params, colour)

        self._apply = jax.jit(apply)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """See `Features`; the last batch is padded, so that one program serves all."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise FeatureError(
                f'features "{self.name}" are of uint8 pictures [n, H, W, 1 or 3], these are '
                f"{images.dtype} {list(images.shape)}; convert them to those."
            )
        batches = []
        for start in range(0, max(len(images), 1), self._batch_size):
            batch = images[start : start + self._batch_size]
            padding = [(0, self._batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]
            batch = jax.device_put(np.pad(batch, padding), self._split)
            batches.append(jax.device_get(self._apply(self._params, batch)))
        return {tap: np.concatenate([b[tap] for b in batches])[: len(images)] for tap in batches[0]}


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Raise FeatureError unless the tensors of a file are those of a network."""
    found, expected = set(found), set(expected)
    problems = {"lacks": sorted(expected - found), "has unknown": sorted(found - expected)}
    told = [
        f"{problem} {len(names)} tensors ({', '.join(map(ascii, names[:MAX_NAMED]))}"
        f"{', ...' * (len(names) > MAX_NAMED)})"
        for problem, names in problems.items()
        if names
    ]
    if told:
        raise FeatureError(f"{where} {' and '.join(told)}; name a file with its weights.")


def without_batch_norm(tensors: Mapping, convolution: str, norm: str) -> dict[str, np.ndarray]:
    """A convolution without bias and the batch norm behind it, as one kernel and bias."""
    kernel = np.asarray(tensors[f"{convolution}.weight"]).astype(np.float64)  # [O, I, k, k]
    scale, shift, mean, variance = (
        np.asarray(tensors[f"{norm}.{part}"]).astype(np.float64) for part in BATCH_NORM
    )
    scale /= np.sqrt(variance + EPSILON)
    kernel = kernel.transpose(2, 3, 1, 0) * scale  # [k, k, I, O]
    return {"kernel": np.float32(kernel), "bias": np.float32(shift - mean * scale)}


def convolve(layer: dict, x: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    """A convolution of `[B, H, W, I]`; where a stride leaves odd padding, the end gets more."""
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    out = jax.lax.conv_general_dilated(
        x, layer["kernel"], strides, padding, dimension_numbers=layout
    )
    return out + layer["bias"]


def resize_bicubic(images: jax.Array, size: int) -> jax.Array:
    """Uint8 `[B, H, W, C]` as a whole to float32 `[B, size, size, C]` in the same range.

    With antialiasing, as Pillow does it, which also rounds to bytes.
    """
    shape = (len(images), size, size, images.shape[-1])
    return jnp.clip(jax.image.resize(images.astype(jnp.float32), shape, "cubic"), 0, 255)
