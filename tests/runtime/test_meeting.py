"""How processes find each other: what is refused, and what Slurm and TPUs are asked."""

import socket

import jax
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster
from tiny import CONFIG, TINY

from djepa_jax.main import main
from djepa_jax.runtime import rendezvous
from djepa_jax.runtime.distributed import HostsError

EXPLICIT = {"kind": "explicit", "coordinator": "host:1", "num_processes": 2, "process_id": 1}
WRONG = [
    ({"kind": "mpi"}, 'DJEPA_DISTRIBUTED) is "mpi"; it must be one of none, tpu, slurm, explicit'),
    (EXPLICIT | {"coordinator": ""}, "--distributed=explicit needs --coordinator"),
    *[
        (
            EXPLICIT | {"coordinator": address},
            f'--coordinator is "{address}"; it must be HOST:PORT, with a port from 1 to 65535',
        )
        for address in (
            "host",
            "host:",
            ":1234",
            " :1234",
            "host:0",
            "host:65536",
            "127.0.0.1:99999999",
            "host:-1",
            "host:x",
            "host:²",
        )
    ],
    (EXPLICIT | {"num_processes": 0}, "--distributed=explicit needs --num_processes"),
    (EXPLICIT | {"process_id": -1}, "--distributed=explicit needs --process_id"),
    (EXPLICIT | {"process_id": 2}, "--process_id is 2; it must be below --num_processes, 2"),
    ({"num_processes": 2}, "--num_processes is only for --distributed=explicit"),
    ({"kind": "tpu", "process_id": 0}, "--process_id is only for --distributed=explicit"),
    (EXPLICIT | {"timeout": 0}, "must be at least 1"),
    (EXPLICIT | {"heartbeat": 0}, "must be at least 1"),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(HostsError) as caught:
        rendezvous.Rendezvous(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["host:1", "10.0.0.1:65535", "[::1]:1234"])
def test_addresses_that_can_be_used(address):
    rendezvous.Rendezvous(**EXPLICIT | {"coordinator": address})


def test_wrong_flags_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(rendezvous.VARIABLE, "explicit")  # as launch scripts set it
    assert (
        main(
            [
                "djepa_jax",
                f"--config={CONFIG}",
                f"--workdir={tmp_path / 'run'}",
                *TINY,
                "--coordinator=host:1",
            ]
        )
        == 2
    )
    assert capsys.readouterr().err == "error: --distributed=explicit needs --num_processes.\n"
    assert not (tmp_path / "run").exists()


class Connected(Exception):
    """What would be told to JAX."""


@pytest.fixture
def told(monkeypatch):
    """What `jax.distributed.initialize` would be told, for a kind of rendezvous; None if it is not
    called.
    """

    def connect(**arguments):
        raise Connected(arguments)

    monkeypatch.setattr(jax.distributed, "initialize", connect)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # of the preemption service

    def ask(kind: str) -> dict | None:
        try:
            return rendezvous.start(rendezvous.Rendezvous(kind, timeout=30))
        except Connected as connected:
            return connected.args[0]

    return ask


# ---------------------------------------------------------------- the port of process 0


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_that_is_in_use_is_named(family):
    """By a service for one address or for all; JAX itself would end with SIGSEGV."""
    try:
        service = socket.create_server(
            ("127.0.0.1" if family == socket.AF_INET else "::", 0), family=family
        )
    except OSError:
        pytest.skip("no IPv6 here")
    with service:
        port = service.getsockname()[1]
        with pytest.raises(
            HostsError,
            match=rf"port {port} of this machine.*\(localhost:{port}\).*in use.*--coordinator",
        ):
            rendezvous._check_port(f"localhost:{port}")
    rendezvous._check_port(f"localhost:{port}")


def test_a_port_in_use_ends_the_first_process_alone(monkeypatch, capsys, told):
    with socket.create_server(("127.0.0.1", 0)) as service:
        place = {"coordinator": f"127.0.0.1:{service.getsockname()[1]}", "num_processes": 2}
        with pytest.raises(HostsError, match="cannot be opened"):
            rendezvous.start(rendezvous.Rendezvous("explicit", process_id=0, **place))
        with pytest.raises(Connected):  # it is process 0 that opens it
            rendezvous.start(rendezvous.Rendezvous("explicit", process_id=1, **place))


# ---------------------------------------------------------------- Slurm

JOB = {"NTASKS": "2", "PROCID": "1", "JOB_ID": "7", "LOCALID": "0", "STEP_NODELIST": "node[01-02]"}


def in_job(monkeypatch, variables: dict[str, str]) -> None:
    for name in rendezvous.SLURM:
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.mark.parametrize("name", JOB)
def test_a_variable_of_slurm_that_is_missing_is_named(name, monkeypatch, told):
    in_job(monkeypatch, JOB | {name: ""})
    with pytest.raises(
        HostsError,
        match=f"--distributed=slurm, but SLURM_{name} is not set: start the processes with srun",
    ):
        told("slurm")


def test_a_variable_of_slurm_that_is_no_number_is_named(monkeypatch, told):
    in_job(monkeypatch, JOB | {"PROCID": "first"})
    with pytest.raises(HostsError, match='SLURM_PROCID is "first"'):
        told("slurm")


def test_slurm_is_asked_only_when_told_to(monkeypatch, told, capsys):
    in_job(monkeypatch, JOB)
    assert told("none") is None
    arguments = told("slurm")
    assert (arguments["num_processes"], arguments["process_id"], arguments["local_device_ids"]) == (
        2,
        1,
        0,
    )
    address = clusters.SlurmCluster.get_coordinator_address(None, None)
    assert arguments["coordinator_address"] == address and address.startswith("node01:")
    line = (
        f"process 1 of 2 in Slurm job 7 on node[01-02], coordinator {address}: waiting up to 30 s "
        "for the others\n"
    )
    assert capsys.readouterr().out == line
    in_job(monkeypatch, {"NTASKS": "1", "PROCID": "0"})
    assert told("slurm") is None


def test_all_devices_of_a_node_may_be_named_beside_slurm(monkeypatch, told):
    """As `launch/train_slurm.sh` does; JAX reads the variable unless it is told something else."""
    in_job(monkeypatch, JOB)
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    assert told("slurm")["local_device_ids"] is None


# ---------------------------------------------------------------- TPUs


@pytest.fixture
def metadata(monkeypatch):
    """Makes this machine worker 2 of a TPU with three workers, as Google's metadata service would
    tell JAX.
    """
    answers = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "unused:1:127.0.0.1,unused:2:10.0.0.2,unused:3:10.0.0.3",
        "tpu-env": "TYPE: 'V4'",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
    for name in (
        "TPU_SKIP_MDS_QUERY",
        "TPU_PROCESS_ADDRESSES",
        "TPU_WORKER_HOSTNAMES",
        "JAX_COORDINATOR_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    return answers


def test_a_tpu_tells_who_meets_where(metadata, monkeypatch, told, capsys):
    in_job(monkeypatch, JOB)  # a Slurm job around it is not asked
    arguments = told("tpu")
    assert (arguments["num_processes"], arguments["process_id"]) == (3, 2)
    assert (
        arguments["coordinator_address"] == "127.0.0.1:8482"
        and arguments["cluster_detection_method"] == "deactivate"
    )
    line = (
        "process 2 of 3 of a TPU (its metadata), coordinator 127.0.0.1:8482: waiting up to 30 s "
        "for the others\n"
    )
    assert capsys.readouterr().out.endswith(line)


def test_a_kubernetes_pod_tells_it_by_variables(metadata, monkeypatch, told):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    arguments = told("tpu")
    assert (
        arguments["num_processes"],
        arguments["process_id"],
        arguments["coordinator_address"],
    ) == (2, 1, "localhost:8482")


def test_a_tpu_of_one_worker_waits_for_nobody(metadata, told):
    metadata["worker-network-endpoints"] = "unused:1:127.0.0.1"
    assert told("tpu") is None


def test_a_machine_without_a_tpu_is_told_so(monkeypatch, told):
    in_job(monkeypatch, JOB)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
    with pytest.raises(
        HostsError,
        match="but JAX finds no TPU on this machine; leave it out, or .*--distributed=explicit",
    ):
        told("tpu")


@pytest.mark.parametrize("broken", ["worker-network-endpoints", "agent-worker-number"])
def test_metadata_that_cannot_be_read_are_one_error(broken, metadata, told):
    metadata[broken] = "<html>a:b</html>"
    with pytest.raises(
        HostsError,
        match="the metadata of this TPU cannot be read .*ValueError.*--distributed=explicit",
    ) as caught:
        told("tpu")
    assert "\n" not in str(caught.value)


def test_another_jax_without_these_classes_is_one_error(monkeypatch, told):
    monkeypatch.delattr(clusters, "GceTpuCluster")
    with pytest.raises(
        HostsError, match=f"cannot be used with jax {jax.__version__}, which has no GceTpuCluster"
    ):
        told("tpu")
