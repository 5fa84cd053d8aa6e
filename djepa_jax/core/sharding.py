"""The device mesh and where every array lives.

Mesh axes: `data` replicates parameters and splits the batch, `fsdp` splits both, `tensor` splits
attention heads and MLP widths. One device is the 1 x 1 x 1 mesh; there is no second code path.
"""

import math
import re

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# First match wins. Axes count from the last one, so the stacked layer axis in front is never split.
RULES = (
    (r"attention/qkv/kernel$", ("fsdp", None, "tensor")),
    (r"attention/qkv/bias$", (None, "tensor")),
    (r"(attention/out|mlp/down|jepa_head/down|denoiser/blocks/down)/kernel$", ("tensor", "fsdp")),
    (r"(mlp|jepa_head|denoiser/blocks)/up/kernel$", ("fsdp", "tensor")),
    (r"(mlp|jepa_head|denoiser/blocks)/up/bias$", ("tensor",)),
    (r"modulation/kernel$", ("fsdp", None, None)),
    (r"input_proj/kernel$", (None, "fsdp")),  # a token has too few channels to split
    (r"kernel$", ("fsdp", None)),
    (r"(positions|prefix_table|class_embedding/table)$", (None, "fsdp")),
)


def path_name(path: tuple) -> str:
    """A tree path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_mesh(shape: tuple[int, int, int], devices: list | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) that uses all devices; one entry may be -1, "what is left"."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(shape)
    if len(shape) != 3 or shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(
            f"mesh is {shape}; it takes three sizes (data, fsdp, tensor), at most one of them -1."
        )
    known = math.prod(n for n in shape if n != -1)
    if len(devices) % known or (-1 not in shape and known != len(devices)):
        raise ValueError(
            f"mesh {shape} does not fit {len(devices)} devices; write -1 for what is left, for "
            "example (-1, 1, 1)."
        )
    shape = tuple(len(devices) // known if n == -1 else n for n in shape)
    # Neighbours on a TPU's network along the last axes.
    placed = mesh_utils.create_device_mesh(shape, devices)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where an array of the training state lives; an axis that does not divide evenly is whole."""
    for pattern, axes in RULES:
        if re.search(pattern, path) and len(shape) >= len(axes):
            axes = (None,) * (len(shape) - len(axes)) + axes
            sized = zip(axes, shape, strict=True)
            return P(*(a if a and size % mesh.shape[a] == 0 else None for a, size in sized))
    return P()


def state_shardings(abstract, mesh: Mesh):
    """Shardings of a tree (parameters, moving average, optimiser moments) from its shapes."""

    def place(path, leaf):
        return NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis split over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value everywhere."""
    return NamedSharding(mesh, P())


def batch_divisor(mesh: Mesh) -> int:
    """Devices that share a batch; 1 outside a mesh."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def keep_batch_split(x: jax.Array) -> jax.Array:
    """Say of `x` `[B, ...]` that it is split along the batch and nothing else; changes no value.

    With kernels split over `fsdp` the compiler is free to gather the activations of the whole batch
    on every device in place of a layer's kernels, and it does so. Outside a mesh, or where the
    batch does not divide, it says nothing.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1 or x.shape[0] % batch_divisor(mesh):
        return x
    split = P(BATCH_AXES, *[None] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, split))


def has_whole_params(x: jax.Array) -> bool:
    """Whether `x` is traced for a mesh on which every device holds all parameters, or for none."""
    mesh = jax.typeof(x).sharding.mesh
    return all(mesh.shape.get(axis, 1) == 1 for axis in ("fsdp", "tensor"))


def host_device() -> jax.Device:
    """The CPU, for arrays that no device needs to hold; the first device where JAX has no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
