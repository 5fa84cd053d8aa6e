"""A number for every array of a state, that another array does not have: what was saved must have
it when it is read.

Each element's bits are put together with a number that belongs to its place and stirred; the
fingerprint is the sum of that, modulo 2^32. Sums of whole numbers do not depend on their order, so
neither sharding nor device changes it. Stirring gives different bits different results, so no
change of a single element goes unnoticed; others do once in 2^32 times.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.core.sharding import path_name

STEP, START = (
    0x9E3779B1,
    0x85EBCA6B,
)  # odd and irregular, so that neighbouring places have unlike numbers
STIRRING = (
    (16, 0x7FEB352D),
    (15, 0x846CA68B),
)  # shifts and odd factors (Wellons' "lowbias32"); a plain product would not
LAST_SHIFT = 16  # do: two changes of the highest bit would cancel out
BLOCK = 2**18  # elements in the host's memory that are looked at together
UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32"}  # by bytes of an element


def fingerprints(tree) -> dict[str, int]:
    """Fingerprint by path of all arrays on devices; one small program, whatever their sharding."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    names = sorted(leaves)  # one order, and so one program, for what is saved and what is restored
    arrays = [leaves[name] for name in names]
    sums = np.asarray(_jitted_sums(getattr(arrays[0].sharding, "mesh", None))(arrays))
    return dict(zip(names, sums.tolist(), strict=True))


@functools.lru_cache(maxsize=8)
def _jitted_sums(mesh: jax.sharding.Mesh | None):
    """The sums of a list of arrays on a mesh, known to every process."""
    everywhere = (
        None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    return jax.jit(
        lambda arrays: jnp.stack([_device_sum(array) for array in arrays]), out_shardings=everywhere
    )


@jax.jit  # so that arrays of one shape and type are traced once
def _device_sum(x: jax.Array) -> jax.Array:
    """`[...]` -> scalar uint32."""
    bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        shape = [size if a == axis else 1 for a in range(x.ndim)]
        place = place + jnp.arange(size, dtype=jnp.uint32).reshape(shape) * np.uint32(stride)
    bits = bits ^ (place * np.uint32(STEP) + np.uint32(START))
    for shift, factor in STIRRING:
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return jnp.sum(bits ^ (bits >> LAST_SHIFT), dtype=jnp.uint32)


def host_fingerprint(x: np.ndarray) -> int:
    """The same of an array in the host's memory, block by block."""
    elements = np.ascontiguousarray(x).reshape(-1).view(UNSIGNED[x.dtype.itemsize])
    places = np.arange(min(BLOCK, elements.size), dtype=np.uint32) * np.uint32(STEP)
    total = 0
    for start in range(0, elements.size, BLOCK):
        part = elements[start : start + BLOCK]
        bits = places[: part.size] + np.uint32((start * STEP + START) % 2**32)
        bits ^= part
        for shift, factor in STIRRING:
            bits ^= bits >> np.uint32(shift)
            bits *= np.uint32(factor)
        bits ^= bits >> np.uint32(LAST_SHIFT)
        total = (total + int(bits.sum(dtype=np.uint64))) % 2**32
    return total
