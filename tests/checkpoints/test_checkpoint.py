"""Workdirs: locks, permissions, what is kept and what is refused."""

import os
import signal
import subprocess
import sys

import pytest

from djepa_jax.runtime.lock import lock_workdir
from djepa_jax.runtime.storage import PathError, check_writable, write_json


def test_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys, time; from djepa_jax.runtime.lock import lock_workdir\n"
        "with lock_workdir(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PathError, match=f"process {holder.pid} on "), lock_workdir(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with lock_workdir(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_unwritable_workdir_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(PathError, match="cannot be written"):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder with spaces")
    assert list((tmp_path / "new" / "folder with spaces").iterdir()) == []


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert (tmp_path / "a.json").read_text() == '{\n  "x": 2\n}\n'
    assert len(list(tmp_path.iterdir())) == 1
