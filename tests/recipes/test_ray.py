"""placement.launcher=ray beside a trainer that Ray has not started: its engines are actors of a Ray
cluster, which cannot change a bit."""

import itertools
import os
import signal
import socket
import sys
import threading

import pytest
from test_engine_replicas import INVARIANT, REPLICAS, dying

from samebit.recipes.cli.main import main
from samebit.recipes.launch.ray_cluster import RayCluster, environment_of_actors
from samebit.recipes.launch.ray_connections import end_actor
from samebit.rollout.engine_pool import EnginePool
from samebit.weight_sync.transports.shards import ShardSender

RAY = (*REPLICAS, "placement.launcher=ray")


def ray_processes():
    """Those of Ray that this process has started."""
    import psutil

    children = psutil.Process().children(recursive=True)
    return [child for child in children if "raylet" in child.name() or "gcs" in child.name()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("moments", "number", "words"),
    [
        ([], signal.SIGKILL, ()),
        ([("_take", 7), ("send", 3)], signal.SIGKILL, ()),
        ([("_take", 7)], signal.SIGSTOP, ("placement.replica_timeout_s=10",)),
    ],
    ids=["nobody dies", "two are killed", "one stands still"],
)
def test_ray_changes_no_bit(runs, base, monkeypatch, moments, number, words):
    """On a cluster of the run's own, which ends with it, and leaves signals to whom they were."""
    handler = signal.getsignal(signal.SIGTERM)
    came = dying(monkeypatch, moments, number)
    assert runs.train("ray", *RAY, *words) == base.result
    assert sorted(came) == sorted(name for name, _ in moments)
    assert not ray_processes()
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_engines_on_another_node_are_met_at_this_ones_address(runs, monkeypatch, size):
    """A cluster of two nodes that was there before; all places are on the other one. The run leaves
    it, and it is there still."""
    from ray.cluster_utils import Cluster

    cluster, places = Cluster(), []
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        cluster.add_node(num_cpus=2 * size)
        inner = ShardSender.__init__

        def init(self, group, *args, **more):
            places.append((group.is_local, group._address))
            inner(self, group, *args, **more)

        monkeypatch.setattr(ShardSender, "__init__", init)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.setenv(name, os.environ.get(name, "lo"))
        words = *RAY, f"placement.ray_address={cluster.address}", f"placement.engine_tensor={size}"
        expected = runs.train("here", *INVARIANT)
        assert runs.train("elsewhere", *INVARIANT, *words) == expected
        assert set(places) == {(False, cluster.head_node.node_ip_address)}
        assert not any(node.dead_processes() for node in cluster.list_all_nodes())
    finally:
        cluster.shutdown()


@pytest.mark.long
def test_an_engine_that_is_lost_as_it_starts(runs, base, monkeypatch, caplog):
    """It is replaced like any other that dies."""
    inner, starts = RayCluster.start_actor, itertools.count()

    def start(cluster, kind, place):
        actor = inner(cluster, kind, place)
        if next(starts) == 0:
            end_actor(actor)
        return actor

    monkeypatch.setattr(RayCluster, "start_actor", start)
    assert runs.train("lost", *RAY) == base.result
    assert next(starts) == 3
    assert "could not be started on a Ray cluster on this machine: The actor died" in caplog.text


@pytest.mark.long
def test_a_failed_run_leaves_no_ray(runs, base, monkeypatch):
    """Its own error is what is told."""

    def fail(self, *args):
        raise KeyError("mine")

    monkeypatch.setattr(EnginePool, "_drawn", fail)
    with pytest.raises(KeyError, match="mine"):
        runs.train("failed", *RAY)
    assert not ray_processes()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["placement.launcher=k8s"], "placement.launcher is 'k8s'; it must be"),
        (["placement.launcher=ray"], "local where the trainer is another launcher's"),
        ([*RAY[:1], RAY[2], "placement.transport=ipc"], "local with placement.transport 'ipc'"),
        ([*REPLICAS, "placement.ray_address=auto"], "unset without placement.launcher=ray"),
        ([*RAY, "placement.ray_address=ray://head:10001"], "auto, or host:port"),
        ([*RAY, "placement.ray_address=head"], "'head'; it must be auto, or host:port"),
        (
            [*RAY, "trainer.parallel.tensor=2"],
            "and trainer.parallel.tensor=2 unless numerics.tp_invariant=true",
        ),
        ([*RAY, "placement.transport=nccl"], "nccl needs CUDA devices: 3, there are 0"),
    ],
)
def test_refusals(runs, words, reason):
    with pytest.raises(ValueError, match=reason):
        runs.train("refused", *words)
    assert not (runs.folder / "refused").exists()


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_no_second_cluster_beside_the_one_that_is_named(runs, monkeypatch, capsys, dry_run):
    """Ray's jobs find its address in their environment."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.2:6379")
    assert main(["grpo", *runs.arguments("second", *RAY, f"dry_run={dry_run}")]) == 1
    said = capsys.readouterr().err
    assert "placement.ray_address is unset" in said
    assert "RAY_ADDRESS is '127.0.0.2:6379'; give auto or host:port, or unset" in said
    assert not (runs.folder / "second").exists()


def test_no_secret_is_told_to_actors():
    """What Ray's dashboard shows of them."""
    given = {"HF_HOME": "a", "HF_TOKEN": "b", "NCCL_DEBUG": "c", "TRITON_API_KEY": "d", "X": "e"}
    assert environment_of_actors(given) == {"HF_HOME": "a", "NCCL_DEBUG": "c"}


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_without_the_package_it_is_said_at_once(runs, monkeypatch, capsys, dry_run):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["grpo", *runs.arguments("missing", *RAY, f"dry_run={dry_run}")]) == 1
    assert "placement.launcher=ray needs the package ray: pip install" in capsys.readouterr().err
    assert not (runs.folder / "missing").exists()


@pytest.mark.parametrize(
    ("listens", "reason"),
    [(None, "Connection refused"), (b"HTTP/1.1 400 Bad Request\r\n", "listens there is not Ray")],
)
def test_no_ray_at_the_address(runs, capsys, listens, reason):
    """No wait for Ray's own tries, and none of its errors."""
    server = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{server.getsockname()[1]}"

    def answer():
        with server, server.accept()[0] as end:
            end.sendall(listens)
            end.recv(1)

    other = threading.Thread(target=answer if listens else server.close)
    other.start()
    if not listens:
        other.join()
    arguments = runs.arguments("nobody", *RAY, f"placement.ray_address={address}")
    assert main(["grpo", *arguments]) == 1
    other.join()
    said = capsys.readouterr().err
    assert f"the Ray cluster at {address} cannot be reached: " in said
    assert reason in said
    assert not (runs.folder / "nobody").exists()
