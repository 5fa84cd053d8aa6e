"""How processes find each other; `test_distributed_processes.py` has real ones."""

import socket

import jax
import pytest
from tiny import CONFIG, TINY

from djepa_jax.main import main
from djepa_jax.runtime import distributed
from djepa_jax.runtime.distributed import HostsError, connect

EXPLICIT = {"kind": "explicit", "coordinator": "host:1", "num_processes": 2, "process_id": 1}
ADDRESSES = ["", "host", "host:", ":1234", "a b:1", "host:0", "host:65536", "host:-1", "host:²"]
WRONG = [  # settings, and words of the error
    ({"kind": "mpi"}, ["--distributed", distributed.VARIABLE, '"mpi"', "slurm, explicit"]),
    ({"kind": "none", "num_processes": 2}, ["--num_processes", "only for --distributed=explicit"]),
    ({"kind": "tpu", "process_id": 0}, ["--process_id", "only for --distributed=explicit"]),
    *[(EXPLICIT | {"coordinator": text}, [f'"{text}"', "HOST:PORT"]) for text in ADDRESSES],
]


@pytest.fixture
def told(monkeypatch):
    """What `jax.distributed.initialize` is told of the place; None if it is not called."""

    def stop(**arguments):
        raise KeyboardInterrupt(arguments)

    monkeypatch.setattr(jax.distributed, "initialize", stop)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of the preemption service

    def ask(**settings) -> dict | None:
        try:
            return connect(**settings)
        except KeyboardInterrupt as stopped:
            given = stopped.args[0]
            return {name: given[name] for name in given if not name.endswith(("out", "seconds"))}

    return ask


def test_wrong_settings_are_one_line(told):
    for settings, words in WRONG:
        with pytest.raises(HostsError) as caught:
            told(**settings)
        text = str(caught.value)
        assert all(word in text for word in words) and "\n" not in text, (settings, text)


@pytest.mark.parametrize("address", ["host:1", "10.0.0.1:65535", "[::1]:1234"])
def test_jax_is_told_an_explicit_place_and_finds_others_itself(told, capsys, address):
    place = told(**EXPLICIT | {"coordinator": address})
    assert place == {
        "coordinator_address": address,
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }
    line = f"process 1 of 2, coordinator {address}: waiting up to 300 s for the others\n"
    assert capsys.readouterr().out == line
    assert told(kind="none") is None
    assert [told(kind=kind) for kind in ("auto", "tpu", "slurm")] == [{}, {}, {}]


def test_wrong_flags_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(distributed.VARIABLE, "explicit")  # as launch scripts set it
    flags = [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *TINY, "--coordinator=host"]
    for extra, word in (("--process_id=0", "HOST:PORT"), ("--heartbeat_timeout=0", "heart")):
        assert main(["djepa_jax", *flags, extra]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and word in error
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_named_by_the_process_that_opens_it(told):
    """JAX itself would end with SIGSEGV."""
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        place = {"kind": "explicit", "coordinator": f"localhost:{port}", "num_processes": 2}
        with pytest.raises(HostsError, match=f"port {port} .*in use.*--coordinator"):
            told(**place, process_id=0)
        assert told(**place, process_id=1)
    assert told(**place, process_id=0)


def test_what_jax_cannot_connect_is_one_line(monkeypatch):
    def fail(**arguments):
        raise ValueError("metadata\nare not there")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(HostsError, match="auto.*metadata are not there.*srun.*explicit"):
        connect("auto")
