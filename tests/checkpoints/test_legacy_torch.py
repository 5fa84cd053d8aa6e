"""Files of early PyTorch, read without it: as they were written, and nothing in them is run."""

import collections
import pickle

import numpy as np
import pytest

from djepa_jax.checkpoints.convert.legacy_torch import read_legacy_torch
from djepa_jax.checkpoints.convert.tensor_files import SourceError


def test_tensors_are_pytorchs(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.arange(24.0).reshape(2, 3, 4)
    state = collections.OrderedDict(
        whole=values, turned=values.transpose(0, 2)[1:], count=torch.tensor(7)
    )
    path = tmp_path / "legacy.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    tensors = read_legacy_torch(path)
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy(), strict=True)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("place", range(5))
def test_nothing_in_a_file_is_run(tmp_path, place):
    path, victim = tmp_path / "evil.pth", tmp_path / "victim"
    pickles = [0x1950A86A20F9469CFC6C, 1001, {}, {}, []]
    pickles[place] = Attack(str(victim))
    path.write_bytes(b"".join(pickle.dumps(value, 2) for value in pickles))
    with pytest.raises(SourceError, match=r"asks for .*open, .*nothing in it was run"):
        read_legacy_torch(path)
    assert not victim.exists()


def test_a_view_beyond_its_storage_is_refused(tmp_path):
    """It would read whatever lies behind it in memory."""
    # _rebuild_tensor_v2(("storage", FloatStorage, "0", "cpu", 2, None), 0, (3,), (1,))
    content = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02Nt"
        b"QK\x00K\x03\x85K\x01\x85tR."
    )
    path = tmp_path / "beyond.pth"
    path.write_bytes(b"".join(pickle.dumps(value, 2) for value in (0, 1001, {})) + content)
    with pytest.raises((TypeError, ValueError), match="buffer"):
        read_legacy_torch(path)
