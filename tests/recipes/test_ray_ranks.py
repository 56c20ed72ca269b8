"""placement.launcher=ray: the trainer's processes in places of a Ray cluster, as local ones are."""

import itertools
import json
import os
import re
import socket
import sys

import psutil
import pytest

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.launch import processes
from samebit.recipes.launch.ray_connections import end_actor
from samebit.recipes.launch.ray_package import RayError
from samebit.recipes.launch.ray_rank import Seat
from samebit.recipes.launch.ray_ranks import RayRanks, ranks_by_node
from samebit.weight_sync import meeting

RAY = ("placement.launcher=ray", "trainer.parallel.data=2")
APART = ("placement=process", "placement.replicas=2")

# In place of samebit: in its first life rank 1 kills its actor, and neither of the two ends. In the
# second it ends behind rank 0.
PROGRAM = """
import json, os, signal, sys
rank = os.environ["RANK"]
with open("starts." + rank, "a") as starts:
    print(os.getpid(), file=starts)
if len(open("starts." + rank).readlines()) == 1:
    if rank == "1":
        while not os.path.exists("starts.0"):
            pass
        os.kill(os.getppid(), signal.SIGKILL)
    while True:
        signal.pause()
told = {"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
told["masked"] = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
json.dump(told, open("told." + rank, "w"))
print("out " + rank, flush=True)
sys.stderr.write("err " + rank + "\\n")  # in one piece, whatever PYTHONUNBUFFERED says
if rank == "1":
    while len(open("starts.0").readlines()) < 2:
        pass
    while os.path.exists("/proc/" + open("starts.0").readlines()[1].strip()):
        pass
sys.exit(7 * int(rank))
"""


def losing_in_the_second(seats_of):
    """As RayRanks._seats; rank 0's actor dies behind the second call."""
    starts = itertools.count(1)

    def seats(ranks, actors):
        found = seats_of(ranks, actors)
        if next(starts) == 2:
            end_actor(actors[0])
        return found

    return seats


def test_ranks_live_and_die_as_local_ones(monkeypatch, tmp_path, capfd):
    """A dead actor is a crash, also before it has a process: all start again, once those before
    have ended. They are told what local ones are, speak where those do, and their exit code is the
    launcher's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    monkeypatch.setattr(processes, "GRACE_S", 2.0)
    monkeypatch.setenv("MINE", "also there")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(meeting, "_given", [])  # what this process was started with
    monkeypatch.setenv("SAMEBIT_SECRET", "0" * 64)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    words = ["model.path=m", "data=chain_sum", "device=cpu", "output_dir=o", *RAY]
    run = resolve("grpo", [*words, "max_restarts=2"])
    monkeypatch.setattr(RayRanks, "_seats", losing_in_the_second(RayRanks._seats))
    assert processes.launch(["python", "-c", PROGRAM, "a=b"], run) == 7
    said = capfd.readouterr()
    assert said.out == "out 0\n"
    # Each is written in one piece; Ray's own messages, which they may stand within, are not.
    assert all(said.err.count(f"err {rank}\n") == 1 for rank in (0, 1))
    [where, *told] = re.findall("samebit: (ranks? .*)\n", said.err)
    assert where.startswith("ranks 0-1 on ")
    assert f"; the run's folder is {tmp_path}/o/run on " in where
    lost = "rank 0 could not be started on a Ray cluster on this machine: The actor died "
    assert all(line.startswith(lost) for line in told[2:4])
    assert [line.rpartition("; ")[2] for line in told[2:4]] == [
        "the others are ended",
        "restart 2 of 2, from the newest checkpoint if any",
    ]
    assert told[:2] + told[4:] == [
        "rank 1 ended with SIGKILL; the others are ended within 2 s",
        "rank 1 ended with SIGKILL; restart 1 of 2, from the newest checkpoint if any",
        "rank 1 ended with exit code 7; the others are ended within 2 s",
        "rank 1 ended with exit code 7 after 2 of 2 restarts; resume=true goes on",
    ]
    found = [json.loads((tmp_path / f"told.{rank}").read_text()) for rank in (0, 1)]
    for rank, each in enumerate(found):
        first, _ = (tmp_path / f"starts.{rank}").read_text().split()
        assert not psutil.pid_exists(int(first))
        assert each["words"] == ["a=b"]
        assert each["folder"] == str(tmp_path)
        assert not each["masked"]
        for name, value in {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "3",
            "NCCL_ALGO": "Ring",
            "MINE": "also there",
        }.items():
            assert each["environment"][name] == value, name
    secret, other = (each["environment"]["SAMEBIT_SECRET"] for each in found)
    assert secret == other != "0" * 64
    assert found[0]["environment"]["MASTER_PORT"] == found[1]["environment"]["MASTER_PORT"]


def seat(node, address, has_folder=True):
    return Seat(node=node, address=address, interface=None, gpus="", has_folder=has_folder)


class Nodes:
    """In place of a cluster: places of nodes, each with a disk of its own."""

    tensor = 1
    num_groups = 2

    def __init__(self, disks):
        self.disks = disks

    def nodes(self):
        return sorted(self.disks)

    def ask(self, place, function, path, *more):
        disk = self.disks[self.nodes()[place]]
        own = function(disk / path.relative_to("/"), *more)
        return "/" / own.relative_to(disk) if isinstance(own, type(path)) else own


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_share_the_runs_folder(tmp_path, shared):
    """Or it is said which does not see it; nothing is left there."""
    disks = {node: tmp_path / ("one" if shared else node) for node in ("a", "b")}
    for disk in disks.values():
        (disk / "data").mkdir(parents=True, exist_ok=True)
    run = resolve("grpo", ["model.path=m", "data=chain_sum", "output_dir=/data/runs", *RAY])
    ranks = RayRanks(run, Nodes(disks))
    seats = [seat("a", "10.0.0.1"), seat("b", "10.0.0.2")]
    if shared:
        ranks._require_shared(seats)
    else:
        said = r"output_dir is '/data/runs'; .* 10.0.0.2 \(rank 1\) does not see what 10.0.0.1"
        with pytest.raises(RayError, match=said):
            ranks._require_shared(seats)
    assert not [each for each in tmp_path.rglob("*") if not each.is_dir()]


def ray_figures(output):
    """What a dry run has said of Ray."""
    lines = [line for line in output.splitlines() if line.startswith("ray_")]
    return dict(line.split(maxsplit=1) for line in lines)


def test_a_dry_run_says_what_ray_is_asked_for(runs, capsys):
    """Of a cluster of its own, that it does not start."""
    words = [*RAY, *APART, "cpu_threads=2", "dry_run=true"]
    assert main(["grpo", *runs.arguments("dry", *words)]) == 0
    figures = ray_figures(capsys.readouterr().out)
    assert (figures["ray_processes"], figures["ray_needs"]) == ("4", "8 CPU")
    assert "ray_has" not in figures


def test_a_dry_run_joins_the_cluster(runs, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [*RAY, f"placement.ray_address={address}", "dry_run=true"]
    assert main(["grpo", *runs.arguments("dry", *words)]) == 1
    assert f"the Ray cluster at {address} cannot be reached: " in capsys.readouterr().err


def test_where_ranks_are_is_told():
    seats = [seat("a", "10.0.0.1"), seat("a", "10.0.0.1"), seat("b", "10.0.0.2")]
    assert ranks_by_node(seats) == "ranks 0-1 on 10.0.0.1, rank 2 on 10.0.0.2"
