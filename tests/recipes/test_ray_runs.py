"""Runs on real Ray clusters, disturbed or not: to the bytes of local ones."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
from test_demo import arguments as demo_words
from test_launch import result_of, wait_for
from test_ray_ranks import APART, RAY, ray_figures

from samebit.recipes import submit
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import own_command
from samebit.recipes.submit_config import RuntimeEnvSection
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.weight_sync.meeting import is_loopback

pytestmark = pytest.mark.long


@pytest.fixture
def ended():
    """ended(words, disturb): exit code, standard output and error of `samebit`, which `disturb` is
    given while it runs. It and all that it has started on this machine are gone afterwards."""
    started = []

    def run(words, disturb=lambda process: None):
        process = subprocess.Popen(
            own_command(words),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        disturb(process)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ranks_of(process):
    """The trainer's processes by rank."""
    found = {}
    for each in psutil.Process(process.pid).children(recursive=True):
        if "samebit.recipes.cli.main" in each.cmdline():
            found[each.environ()["RANK"]] = each
    return [found["0"], found["1"]]


def when_there(path, act):
    """A disturbance: once a file or folder is there."""

    def disturb(process):
        wait_for(process, path.exists)
        act(process)

    return disturb


def kill_an_actor(process):
    actor = ranks_of(process)[1].parent()
    assert actor.name().startswith("ray::")
    actor.kill()


SIDES = {
    "local": [],
    "colocated": ["placement.launcher=ray"],
    "apart": ["placement.launcher=ray", "placement.engine=process", "placement.transport=gloo",
              "placement.replicas=2"],
}  # fmt: skip


def test_the_demo_comes_to_the_same_weights(ended, tmp_path):
    """Trainers beside their engines, and beside engines in places of their own, as local ones do;
    also where an actor of theirs is killed."""
    data = [f"{phase}.trainer.parallel.data=2" for phase in ("sft", "grpo")]

    def digest_of(name, side, *more):
        words = [*demo_words(tmp_path, name), *data, *(f"grpo.{word}" for word in SIDES[side])]
        code, output, errors = ended([*words, *more[:1]], *more[1:])
        assert code == 0, errors
        assert ("; the run's folder is " in errors) == (side != "local")
        assert ("; restart 1 of 1, from" in errors) == bool(more)
        return json.loads(output.splitlines()[-1])["weights_digest"]

    expected = digest_of("local", "local")
    for side in ("colocated", "apart"):
        assert digest_of(side, side) == expected
        checkpoint = tmp_path / f"killed-{side}" / "grpo" / "checkpoints" / "step_00000002"
        dies = when_there(checkpoint, kill_an_actor)
        assert digest_of(f"killed-{side}", side, "max_restarts=1", dies) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_saves_and_stops(runs, ended, number):
    """All ranks after the same step; local processes go on with what Ray's have left."""
    words = ["trainer.parallel.data=2"]
    assert ended(["grpo", *runs.arguments("whole", *words)])[0] == 0
    stops = when_there(
        runs.folder / "stopped" / "checkpoints" / "step_00000002",
        lambda process: process.send_signal(number),
    )
    code, output, errors = ended(["grpo", *runs.arguments("stopped", *RAY)], stops)
    assert (code, output) == (0, ""), errors
    lines = {
        line[line.index("samebit grpo: ") :] for line in errors.splitlines() if "after step" in line
    }
    assert len(lines) == 1
    assert f"{number.name}: stopped after step" in lines.pop()
    assert latest_checkpoint(runs.folder / "stopped" / "checkpoints").verify().step >= 2
    code, _, errors = ended(["grpo", *runs.arguments("stopped", *words, "resume=true")])
    assert code == 0, errors
    assert result_of(runs, "stopped") == result_of(runs, "whole")


@pytest.fixture
def made(monkeypatch):
    """A cluster without nodes."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster()
    yield made
    made.shutdown()


@pytest.fixture
def cluster(made):
    """A cluster of a head without CPUs and of nodes of one each: that of `count` is made by it."""

    def make(count):
        made.add_node(num_cpus=0, include_dashboard=False)
        for _ in range(count):
            made.add_node(num_cpus=1)
        return f"placement.ray_address={made.address}"

    return make


def test_ranks_of_several_nodes(runs, ended, cluster):
    """They meet at an address of the network, with a secret; two draw for them on other nodes. A
    dry run asks the cluster what it has."""
    words = ["trainer.parallel.data=2"]
    assert ended(["grpo", *runs.arguments("local", *words)])[0] == 0
    there = [*RAY, *APART, cluster(4)]
    environments = []

    def look(process):
        environments.extend(rank.environ() for rank in ranks_of_machine(runs.folder))

    looks = when_there(runs.folder / "nodes" / "checkpoints" / "step_00000002", look)
    code, output, errors = ended(["grpo", *runs.arguments("nodes", *there)], looks)
    assert code == 0, errors
    assert result_of(runs, "nodes") == result_of(runs, "local")
    for environment in environments:
        assert environment["LOCAL_WORLD_SIZE"] == "1"
        assert not is_loopback(environment["MASTER_ADDR"])
    assert {environment["RANK"] for environment in environments} == {"0", "1"}
    code, output, errors = ended(["grpo", *runs.arguments("dry", *there, "dry_run=true")])
    assert code == 0, errors
    figures = ray_figures(output)
    assert figures["ray_processes"] == "4"
    assert figures["ray_needs"] == figures["ray_has"] == "4 CPU"


def test_a_node_is_lost(runs, ended, cluster):
    """With the rank that was there: all start again, one of them on a node that had none."""
    words = ["trainer.parallel.data=2", "trainer.num_steps=12"]
    assert ended(["grpo", *runs.arguments("whole", *words)])[0] == 0
    there = [*RAY, *words, cluster(3), "max_restarts=1"]
    is_held = runs.held(40)

    def lose(process):
        wait_for(process, is_held)
        [rank] = [r for r in ranks_of_machine(runs.folder) if r.environ()["RANK"] == "1"]
        psutil.Process(int(rank.environ()["RAY_RAYLET_PID"])).kill()
        runs.control.unlink()  # the next rank 0 is not held

    code, _, errors = ended(["grpo", *runs.arguments("lost", *there)], lose)
    assert code == 0, errors[-3000:]
    assert errors.count("; restart 1 of 1, from") == 1
    assert result_of(runs, "lost") == result_of(runs, "whole")


def test_the_head_is_lost(runs, ended, made, cluster, monkeypatch):
    """For longer than Ray waits for it: the run ends, says so and is resumed without it."""
    words = ["trainer.parallel.data=2", "trainer.num_steps=12"]
    assert ended(["grpo", *runs.arguments("whole", *words)])[0] == 0
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")  # of 60
    there = [*RAY, *words, cluster(2), "max_restarts=1"]
    is_held = runs.held(40)

    def lose(process):
        wait_for(process, is_held)
        made.head_node.kill_gcs_server()

    code, output, errors = ended(["grpo", *runs.arguments("lost", *there)], lose)
    assert (code, output) == (1, ""), errors[-3000:]
    assert "Failed to connect to GCS within 2 seconds" in errors
    while ranks_of_machine(runs.folder):
        time.sleep(0.01)
    runs.control.unlink()
    code, _, errors = ended(["grpo", *runs.arguments("lost", *words, "resume=true")])
    assert code == 0, errors[-3000:]
    assert result_of(runs, "lost") == result_of(runs, "whole")


def ranks_of_machine(folder):
    """The processes of ranks of runs in a folder, whoever has started them."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            words = each.cmdline()
            if f"output_dir={folder}" in words and "RANK" in each.environ():
                found.append(each)
    return found


@pytest.fixture
def dashboard(monkeypatch):
    """The address of the dashboard of a cluster of three CPUs."""
    import ray

    from samebit.recipes.run.signals import handlers_given_back

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"include_dashboard": True, "dashboard_port": port, "log_to_driver": False}
    with handlers_given_back():
        context = ray.init("local", num_cpus=3, object_store_memory=100 << 20, **options)
    try:
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


def test_a_job_is_stopped_and_saved(runs, dashboard, tmp_path):
    """`ray job stop`: it saves. Ranks find what the job's working folder has."""
    from samebit.recipes.launch.ray_jobs import RayJobs

    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "own_reward.py").write_text(
        "from run_children import score_digits as mine"
    )
    own = ["trainer.parallel.data=2", "placement=process", "trainer.num_steps=12"]
    own = runs.arguments("job", *own, "reward.name=own_reward:mine")
    there = ["placement.launcher=ray", "placement.ray_address=auto"]
    paths = os.pathsep.join(p for p in sys.path if p)
    run = resolve("submit", [f"address={dashboard}", "command=[grpo]", f"python={sys.executable}"])
    run.command = ["grpo", *own, *there]
    run.runtime_env = RuntimeEnvSection(
        working_dir=str(tmp_path / "sent"), env_vars={"PYTHONPATH": paths}
    )
    submit.require_command(run)
    jobs = RayJobs(dashboard)
    job_id = jobs.submit(submit.entrypoint_of(run), submit.environment_of(run), 0, 0)
    checkpoint = runs.folder / "job" / "checkpoints" / "step_00000002"
    said = []

    def tell(text):
        said.append(text)

    follower = threading.Thread(target=jobs.follow, args=(job_id, tell))
    follower.start()
    while not checkpoint.exists():
        assert follower.is_alive(), "".join(said)
        time.sleep(0.01)
    assert jobs._client.stop_job(job_id)
    follower.join()
    assert "SIGTERM: stopped after step" in "".join(said)
    assert latest_checkpoint(checkpoint.parent).verify().step >= 2
    assert not (runs.folder / "job" / "summary.json").exists()
