"""samebit submit: a command as a job of a Ray cluster, checked here before anything is sent."""

import os
import shlex
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from samebit.recipes import submit
from samebit.recipes.cli.commands import with_keys
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.run.secrets import to_yaml

NOBODY = "address=http://127.0.0.1:1"
GRPO = ("grpo", "model.path=m", "data=chain_sum", "output_dir=/o", "device=cpu")


def submission(*words):
    return resolve("submit", list(with_keys("submit", words)))


def test_the_command_arrives_word_by_word():
    """As it is typed, also what the shell, Hydra or OmegaConf would read otherwise."""
    words = [
        *GRPO,
        "run_name=${oc.env:NAME}",
        "data.prompt_key=it's a,b",
        "x=\\${y}",
        "[1,'2']",
        "",
    ]
    run = submission(NOBODY, "--follow", "python=/a b/python", *words)
    assert run.command == words
    assert run.follow
    assert shlex.split(submit.entrypoint_of(run)) == [
        *("/a b/python", "-P", "-m", "samebit.recipes.cli.main"),
        *words,
    ]


def test_a_dry_run_checks_and_sends_nothing(capsys, monkeypatch):
    """Interpolations find what they will find in the job; secrets are not shown."""
    monkeypatch.delenv("NAME", raising=False)
    words = [*GRPO, "run_name=${oc.env:NAME}", "reward.name=a:b", "reward.args.api_key=xyz"]
    own = [NOBODY, "dry_run=true", "runtime_env.env_vars={NAME: mine, N: 2}"]
    assert main(["submit", *own, *words]) == 0
    out = capsys.readouterr().out
    assert "run_name: ${oc.env:NAME}" in out
    assert f"{NOBODY[8:]} would run: python -P -m samebit.recipes.cli.main grpo" in out
    assert "xyz" not in out
    assert "NAME" not in os.environ
    environment = submit.environment_of(submission(*own, *words))
    to_save = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
    assert environment == {"env_vars": to_save | {"NAME": "mine", "N": "2"}}
    own = [NOBODY, "runtime_env.env_vars.RAY_JOB_STOP_WAIT_TIME_S=9", *GRPO]
    environment = submit.environment_of(submission(*own))
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "9"}}
    assert main(["submit", NOBODY, "dry_run=true", *words]) == 2
    assert "submit: grpo: run_name=${oc.env:NAME}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["verify"], "required: address=..."),
        ([NOBODY], "command is []; it must be a command with its words, such as grpo"),
        (["adress=http://h:1", "verify"], "unknown key: adress. Did you mean: address"),
        (["address=h:8265", "verify"], "address is 'h:8265'; it must be the address of the"),
        (["address=ray://h:10001", "verify"], "'ray://h:10001'; it must be the address of the"),
        (["address=http://h:x", "verify"], "'http://h:x'; it must be the address of the"),
        (["address=http://h/jobs", "verify"], "'http://h/jobs'; it must be the address of the"),
        ([NOBODY, "gpro"], "command is 'gpro'; it must be one of: grpo, plan"),
        ([NOBODY, "bench"], "command is 'bench'; it must be one of: grpo, plan"),
        ([NOBODY, "bench", "engines"], "command is 'bench engines'; it must be one of"),
        ([NOBODY, "submit", NOBODY, "verify"], "command is 'submit'; it must be one of"),
        ([NOBODY, "watch", "run"], "command is 'watch'; it must be one of"),
        ([NOBODY, *GRPO, "follow=true"], "grpo: unknown key: follow"),
        ([NOBODY, *GRPO, "trainer.num_steps=0"], "grpo: trainer.num_steps is 0"),
        ([NOBODY, *GRPO, "output_dir=o"], "grpo: output_dir is 'o'; it must be absolute in a job"),
        (
            [NOBODY, *GRPO, "placement=process", "placement.launcher=ray"],
            "grpo: placement.ray_address is unset, which starts another cluster; it must be auto",
        ),
        (
            [NOBODY, "entrypoint_num_gpus=1", *GRPO, "placement.launcher=ray"]
            + ["placement.ray_address=auto"],
            "grpo: entrypoint_num_gpus is 1; it must be 0 with placement.launcher=ray",
        ),
        (
            [NOBODY, "entrypoint_num_gpus=1", *GRPO, "trainer.parallel.data=2"],
            "entrypoint_num_gpus is 1; it must be at least 2, the run's processes",
        ),
        ([NOBODY, "entrypoint_num_cpus=-1", "verify"], "entrypoint_num_cpus is -1.0; it must be"),
        (
            [NOBODY, "runtime_env.env_vars.A=1.10", "verify"],
            "runtime_env.env_vars.A is 1.1; it must be a text: quote it",
        ),
        ([NOBODY, "runtime_env.py_modules=['']", "verify"], "runtime_env.py_modules is ['']"),
        (
            [NOBODY, "dry_run=true", "runtime_env.working_dir=/no/folder", *GRPO],
            "runtime_env.working_dir names '/no/folder', which does not exist on this machine",
        ),
        (
            [NOBODY, "runtime_env.py_modules=[s3://a/b.zip,/no/c.whl]", *GRPO],
            "runtime_env.py_modules names '/no/c.whl', which does not exist on this machine",
        ),
    ],
)
def test_refusals(capsys, words, reason):
    """By key, before Ray is looked for."""
    assert main(["submit", *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_without_the_package_it_is_said_at_once(monkeypatch, capsys, dry_run):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["submit", NOBODY, f"dry_run={dry_run}", *GRPO]) == 1
    assert "samebit submit needs the package ray: pip install" in capsys.readouterr().err


def test_a_plan_is_asked_for_no_more_than_it_takes(capsys):
    """It runs and keeps nothing, whatever the run that it is of would do."""
    words = ["plan", "model.path=m", "data.path=d", "trainer.parallel.data=4"]
    assert main(["submit", NOBODY, "entrypoint_num_gpus=1", "dry_run=true", *words]) == 0
    assert f"would run: python -P -m samebit.recipes.cli.main {' '.join(words)}" in (
        capsys.readouterr().out
    )


class NoRay(BaseHTTPRequestHandler):
    """Answers 404 to everything."""

    code = 404

    def do_GET(self):
        self.send_error(self.code)

    def log_message(self, *_):
        pass


class Locked(NoRay):
    """As a dashboard that wants a token."""

    code = 401


@contextmanager
def serving(handler):
    """The address of an HTTP server."""
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        other = threading.Thread(target=server.serve_forever)
        other.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            other.join()


def test_no_dashboard_at_the_address(monkeypatch, capsys):
    """Whatever else the environment says of Ray clusters, this one is meant."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.2:1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    said = "submit: the dashboard of the Ray cluster at {} cannot be reached: {}"
    assert main(["submit", f"address={closed}", *GRPO]) == 1
    assert said.format(closed, "[Errno 111] Connection refused") in capsys.readouterr().err
    with serving(NoRay) as address:
        assert main(["submit", f"address={address}", *GRPO]) == 1
    assert said.format(address, "Version check returned 404") in capsys.readouterr().err
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.2:1"


def test_a_cluster_that_wants_a_token(capsys):
    """How to give it is said: Ray alone looks for none, even where there is one."""
    with serving(Locked) as address:
        assert main(["submit", f"address={address}", *GRPO]) == 1
    said = capsys.readouterr().err
    assert f"the Ray cluster at {address} cannot be reached: Authentication required: " in said
    assert "; set RAY_AUTH_MODE=token, with its token in RAY_AUTH_TOKEN or in" in said
    assert said.count("\n") == 1


@pytest.fixture
def cluster(monkeypatch):
    """The address of the dashboard of a Ray cluster at the loopback."""
    import ray

    from samebit.recipes.run.signals import handlers_given_back

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with handlers_given_back():
        context = ray.init(
            "local", num_cpus=1, num_gpus=0, object_store_memory=100 << 20, log_to_driver=False,
            include_dashboard=True, dashboard_port=port, _node_ip_address="127.0.0.1",
        )  # fmt: skip
    try:
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


class InterruptedBy:
    """A standard output that is a terminal's, whose user types Ctrl-C at a word."""

    def __init__(self, word):
        self.word, self.text = word, ""

    def write(self, text):
        self.text += text
        if self.word in text:
            signal.raise_signal(signal.SIGINT)

    def flush(self):
        pass


@pytest.mark.long
def test_jobs_of_a_real_cluster(cluster, monkeypatch, tmp_path, capsys):
    """One that ends well, on files that it is sent; one whose exit code is ours; one that goes on
    when its follower is interrupted, until it is stopped."""
    from samebit.recipes.launch.ray_jobs import RayJobs

    own = [f"address={cluster}", "follow=true"]
    sent = tmp_path / "sent"
    (sent / "one").mkdir(parents=True)
    (sent / "one" / "config.yaml").write_text(
        to_yaml(submit.require_command(submission(NOBODY, *GRPO)))
    )
    (sent / "one" / "metrics.jsonl").write_text('{"step": 0, "eval/reward_mean": 0.5}\n')
    python = f"runtime_env.env_vars.PYTHONPATH={os.pathsep.join(p for p in sys.path if p)}"
    words = [f"python={sys.executable}", f"runtime_env.working_dir={sent}", python]
    assert main(["submit", *own, *words, "diff", "one", "one"]) == 0
    job_id, *said = capsys.readouterr().out.splitlines()
    assert job_id.startswith("raysubmit_")
    assert "no difference" in "\n".join(said)

    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\n[ "$4" = verify ] && exec sleep 600\n'
        'echo "$NAME $RAY_JOB_STOP_WAIT_TIME_S $4 $5"\nexit 7\n'
    )
    script.chmod(0o755)
    words = [f"python={script}", "runtime_env.env_vars.NAME=mine"]
    assert main(["submit", *own, *words, "diff", "$a", "b"]) == 7
    found = capsys.readouterr()
    assert "mine 300 diff $a" in found.out
    assert "submit: the job raysubmit_" in found.err
    assert "ended with exit code 7" in found.err

    terminal = InterruptedBy("entrypoint for job")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert main(["submit", *own, f"python={script}", "verify", "output_dir=/o"]) == 130
    job_id = terminal.text.splitlines()[0]
    words = f"--address {cluster} {job_id}"
    said = f"the job goes on: ray job logs --follow {words} follows it, ray job stop {words} ends"
    assert said in capsys.readouterr().err
    jobs = RayJobs(cluster)
    assert jobs._client.stop_job(job_id)
    code, ending = jobs.follow(job_id, lambda text: None)
    assert (code, ending.partition(":")[0]) == (1, "was stopped")
