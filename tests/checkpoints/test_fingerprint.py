"""Fingerprints of arrays: the same wherever an array lies, another for another array."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from djepa_jax.checkpoints import fingerprint
from djepa_jax.checkpoints.fingerprint import fingerprints, host_fingerprint
from djepa_jax.core import sharding

TYPES = ("float32", "bfloat16", "float16", "int32", "uint8")
SHAPES = ((), (0,), (5,), (3, 4), (2, 3, 5), (16, 8, 4))


def some(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = np.random.default_rng(len(shape)).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return bits.view(dtype).reshape(shape)


def test_devices_and_host_agree():
    arrays = {
        f"{dtype} {shape}": some(shape, dtype) for dtype, shape in itertools.product(TYPES, SHAPES)
    }
    found = fingerprints(jax.tree.map(jnp.asarray, arrays))
    assert found == {name: host_fingerprint(array) for name, array in arrays.items()}
    assert len(set(found.values())) == 1 + 3 * 5, (
        "equal for equal bits of one size alone, and for no elements"
    )


# Those of 0, 1, ... 23 by type, and of 0, 1, ... 262,146 as int32: written down, for every
# checkpoint holds such numbers.
KNOWN = {
    "float32": 4273486762,
    "bfloat16": 1806263833,
    "float16": 4116239401,
    "int32": 980826853,
    "uint8": 980826853,
}
KNOWN_OF_MANY = 2495930642


def test_fingerprints_are_those_of_earlier_versions():
    """Others would have every checkpoint there is refused."""
    for dtype, value in KNOWN.items():
        array = np.arange(24).reshape(2, 3, 4).astype(getattr(ml_dtypes, dtype, dtype))
        assert host_fingerprint(array) == value == fingerprints({"x": jnp.asarray(array)})["x"], (
            dtype
        )
    assert host_fingerprint(np.arange(2**18 + 3, dtype=np.int32)) == KNOWN_OF_MANY, (
        "more than one block"
    )


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_sharding_does_not_matter(mesh_shape):
    mesh = sharding.make_mesh(mesh_shape)
    arrays = {"table": some((16, 8, 4)), "row": some((16,)), "number": some(())}
    specs = {
        "table": ("data", "fsdp", "tensor"),
        "row": (("data", "fsdp", "tensor"),),
        "number": (),
    }
    place = {name: jax.NamedSharding(mesh, jax.P(*spec)) for name, spec in specs.items()}
    assert fingerprints(jax.device_put(arrays, place)) == {
        name: host_fingerprint(array) for name, array in arrays.items()
    }


def test_blocks_of_the_host_are_one_array(monkeypatch):
    array = some((1000,))
    whole = host_fingerprint(array)
    monkeypatch.setattr(fingerprint, "BLOCK", 64)
    assert host_fingerprint(array) == whole == fingerprints([jnp.asarray(array)])["0"]
    assert host_fingerprint(np.asfortranarray(array.reshape(20, 50))) == whole, (
        "the order in memory does not matter"
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_every_flipped_bit_is_noticed(dtype):
    array = some((3, 4), dtype)
    seen = {host_fingerprint(array)}
    for byte, bit in itertools.product(range(array.nbytes), range(8)):
        other = array.copy()
        other.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
        seen.add(host_fingerprint(other))
    assert len(seen) == 1 + 8 * array.nbytes


def test_two_changes_do_not_cancel_out():
    """Above all not those of two signs, which a sum of products would not notice."""
    array = some((16,)).view(np.uint32)
    values = {host_fingerprint(array)}
    for (i, j), bit in itertools.product(itertools.combinations(range(16), 2), range(32)):
        other = array.copy()
        other[[i, j]] ^= np.uint32(1 << bit)
        values.add(host_fingerprint(other))
    assert len(values) >= 1 + 120 * 32 - 2, "by chance two of them may be the same"
    assert host_fingerprint(array) not in [host_fingerprint(np.delete(array, i)) for i in range(16)]


def test_swapped_elements_are_noticed():
    for array in (
        some((16,)),
        np.array([1.0, -1.0] * 8, np.float32),
        np.arange(16, dtype=np.int32),
    ):
        for i, j in itertools.combinations(range(16), 2):
            other = array.copy()
            other[[i, j]] = array[[j, i]]
            assert (host_fingerprint(other) != host_fingerprint(array)) == (array[i] != array[j])
