"""Very small runs, and child processes to kill."""

import os
import secrets
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from helpers import run_logged

from samebit.recipes import grpo
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import own_command
from samebit.recipes.launch import processes
from samebit.recipes.models.tiny_model import make_demo_model
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.weight_sync.meeting import host_store, loopback_listener

# Rewards are named as module:function, here and in child processes: run_children.
sys.path.append(str(Path(__file__).parent))

from run_children import Runs  # noqa: E402


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory):
    """The demo's model with random weights. Do not write to it."""
    path = tmp_path_factory.mktemp("models") / "demo"
    make_demo_model(path, seed=3)
    return path


class GrpoRuns(Runs):
    """Runs of six steps of twelve samples, with a checkpoint every two, under one folder."""

    def __init__(self, model, folder):
        super().__init__(model, folder)
        self.control = folder / "control"

    @property
    def words(self):
        return (
            "data.size=50",
            "data.eval_size=4",
            "reward.name=run_children:score_digits",
            f"reward.args.control={self.control}",
            "reward.num_workers=1",  # whose calls are counted
            "rollout.prompts_per_step=3",
            "rollout.samples_per_prompt=4",
            "rollout.max_prompt_len=8",
            "rollout.max_new_tokens=6",
            "rollout.eval_every=3",
            "trainer.num_steps=6",
            "trainer.checkpoint_every=2",
            "trainer.micro_batch_tokens=64",
            "trainer.optimizer.lr=1e-2",
        )

    def resolve(self, run_name, *overrides):
        return resolve("grpo", self.arguments(run_name, *overrides))

    def train(self, run_name, *overrides):
        """Run in this process; what must be equal between equal runs."""
        summary = grpo.train(self.resolve(run_name, *overrides))
        return summary, self.rows(run_name), read_rows(self.folder / run_name / "samples.jsonl")

    def rows(self, run_name):
        """metrics.jsonl without times."""
        return without_times(read_rows(self.folder / run_name / "metrics.jsonl"))

    def held(self, number):
        """A condition: the reward's call of this number (in a run) was reached, and blocks."""
        marker = self.control.with_suffix(".held")
        marker.unlink(missing_ok=True)
        self.control.write_text(f"hold {number}")
        return marker.exists


@pytest.fixture(scope="session")
def make_runs(demo_model):
    """make_runs(folder): runs in a folder."""
    return lambda folder: GrpoRuns(demo_model, folder)


@pytest.fixture(scope="module")
def resolved(make_runs, tmp_path_factory):
    """The configuration of these words; to compose one takes longer than a step."""
    runs = make_runs(tmp_path_factory.mktemp("resolved"))
    return cache(lambda words: runs.resolve("run", *words))


@pytest.fixture(scope="module")
def train(resolved):
    """train(folder, words, **changed): run in this process; what equal runs have in common."""

    def run(folder, words, **changed):
        config = replace(resolved(words), output_dir=str(folder), **changed)
        summary = grpo.train(config)
        return summary, without_times(read_rows(folder / "run" / "metrics.jsonl"))

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """whole(words): the folder of an uninterrupted run, and what it gave. Do not write to it."""

    @cache
    def run(words):
        folder = tmp_path_factory.mktemp("whole")
        return folder, train(folder, words)

    return run


@pytest.fixture
def runs(make_runs, tmp_path):
    """Runs in a folder of this test."""
    return make_runs(tmp_path)


@pytest.fixture(scope="session")
def base(make_runs, tmp_path_factory):
    """One uninterrupted run, with what it gave in `result`. Do not write to its folder."""
    runs = make_runs(tmp_path_factory.mktemp("base"))
    runs.result = runs.train("base")
    return runs


@pytest.fixture
def child(forkserver):
    """`with child(arguments) as process:` runs `samebit` and kills it with SIGKILL at the end."""
    from run_children import run_cli

    @contextmanager
    def run(arguments, target=run_cli):
        process = forkserver.Process(target=target, args=(arguments,))
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    return run


@pytest.fixture
def kill_when(child):
    """kill_when(condition, arguments): a run that dies as soon as the condition holds."""

    def run(condition, arguments, *target):
        with child(arguments, *target) as process:
            while not condition():
                assert process.is_alive() or condition(), "the run ended before its time"
                os.sched_yield()
                time.sleep(0.001)

    return run


@pytest.fixture(scope="session")
def run_ranks(forkserver, tmp_path_factory):
    """run_ranks(arguments, size): what two ranks, or more, of `samebit grpo` end with and say,
    without launcher and imports. target: module and function in place of run_cli_as_rank."""

    def run(arguments, size=2, target=("run_children", "run_cli_as_rank")):
        store = host_store(loopback_listener())  # which lives as long as they
        place = str(size), store.port, secrets.token_hex(32)
        folder = tmp_path_factory.mktemp("ranks")
        logs = [folder / f"rank_{rank}.log" for rank in range(size)]
        ranks = [
            forkserver.Process(
                target=run_logged,
                args=(log, *target, rank, *place, "grpo", *arguments),
            )
            for rank, log in enumerate(logs)
        ]
        for rank in ranks:
            rank.start()
        try:
            for rank in ranks:
                rank.join(120)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return [rank.exitcode for rank in ranks], "".join(log.read_text() for log in logs)

    return run


@pytest.fixture
def launch_script(monkeypatch, tmp_path):
    """launch_script(text): the exit code of two processes of a shell script in place of samebit."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(processes, "GRACE_S", 0.2)

    def run(text, *overrides):
        script = tmp_path / "interpreter"
        script.write_text(f"#!/bin/sh\ncd {tmp_path}\n{text}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        words = ["model.path=m", "data=chain_sum", "trainer.parallel.data=2", "device=cpu"]
        words += [f"output_dir={tmp_path}", *overrides]
        return processes.launch(own_command(["grpo", "a=b"]), resolve("grpo", words))

    return run
