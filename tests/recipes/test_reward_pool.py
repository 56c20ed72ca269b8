"""Rewards in worker processes: whatever foreign code does, the run goes on or names it."""

import os
import select
import signal
import subprocess
import sys

import psutil
import pytest

from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.reward_pool import RewardPool, Worker, load_reward
from samebit.recipes.data.rewards import RewardError, score
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.run.signals import Stopped, StopSignals

REWARDS = """
import ctypes, os, signal, sys, threading, time

class Mute(Exception):
    def __str__(self):
        raise RuntimeError

def acts(text, problem, *, scale=1.0):
    if text == "exit":
        sys.exit(0)
    if text == "interrupt":
        raise KeyboardInterrupt
    if text == "_exit":
        os._exit(0)
    if text == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "sleep":
        while True:
            signal.pause()
    if text == "write":
        for fd in range(3, 4096):
            try:
                os.write(fd, b"[\\"ok\\", 1.0]\\n" * 3)
            except OSError:
                pass
    if text == "close":
        os.closerange(3, 4096)
        time.sleep(60)
    if text == "mute":
        raise Mute
    if text == "lines":
        raise ValueError("one\\ntwo")
    if text == "huge":
        return 10 ** 400
    if text == "read":
        return len(sys.stdin.read())
    if text == "print":
        print("said by a reward")
    if text == "fork" and os.fork() == 0:
        raise ValueError("the copy")
    if text == "torch":
        return "torch" in sys.modules
    if text == "pid":
        time.sleep(0.01)
        return os.getpid()
    return len(text) * scale + problem.index / 8

def no_arguments():
    return 0.0
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A folder of modules of a user."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "foreign.py").write_text(REWARDS)
    (folder / "exits.py").write_text("import sys\nsys.exit('set up wrongly')\n")
    (folder / "dies.py").write_text("import os\nos._exit(7)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def pool(module):
    """Two workers that have a second and a half for a completion."""
    config = RewardConfig(name="foreign:acts", timeout_s=1.5, num_workers=2)
    pool = load_reward(config)
    yield pool
    pool.close()


def children(pid):
    return set(psutil.Process(pid).children(recursive=True))


def problem(index, where=""):
    return Problem(index=index, prompt="?", label="1", metadata={"x": [1.5]}, where=where)


def scores(pool, *texts):
    return score(pool, texts, [problem(i) for i in range(len(texts))])


def test_order_is_kept_over_workers(pool):
    texts = ["x" * (i % 7) for i in range(300)]
    assert scores(pool, *texts) == [len(t) + i / 8 for i, t in enumerate(texts)]
    pids = set()
    while len(pids) < 2:  # the second one may still be starting
        pids.update(scores(pool, *["pid"] * 8))
    assert len(pids) == 2
    assert pool("abc", problem(0)) == 3.0


def test_a_workers_surroundings(module, capfd):
    """No torch, no input to wait for, and the standard output is the command's own."""
    pool = load_reward(RewardConfig(name="foreign:acts", num_workers=1))
    assert scores(pool, "torch", "read", "print", "fork") == [0.0, 0.0, 5.25, 4.375]
    out, err = capfd.readouterr()
    assert (out, "said by a reward" in err) == ("", True)
    pool.close()


def test_pipes_of_a_worker_are_closed():
    worker = Worker()
    pipes = (worker._commands, worker.results)
    worker.kill()
    for pipe in pipes:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(pipe)


def test_each_completion_has_its_own_time(module):
    """An answer begins the time of the next one, however many are asked for together."""
    worker = Worker()

    def answers():
        found = []
        while worker.owed:
            select.select([worker.results], [], [])
            found += worker.receive(6000.0)
        return found

    worker.send("load", [("foreign:acts", {}, "reward", False, None, 600.0)], [-1], 600.0)
    assert answers() == [(-1, ["loaded", False, False])]
    worker.send("score", [("a", problem(0)), ("b", problem(1))], [0, 1], 600.0)
    first = worker.deadline
    assert answers() == [(0, ["ok", 1.0]), (1, ["ok", 1.125])]
    worker.kill()
    assert worker.deadline - first > 5000


FOREIGN = {
    "exit": "raised SystemExit: 0",
    "interrupt": "raised KeyboardInterrupt",
    "_exit": "ended its process with exit code 0",
    "crash": "ended its process by SIGSEGV",
    "sleep": r"took longer than 1.5 s \(reward.timeout_s\) and was killed",
    "write": "",
    "close": "closed a file of ours",
    "mute": "raised Mute: its text cannot be made, RuntimeError",
    "lines": "raised ValueError: one two ",
    "huge": r"returned 1000.*; return a finite number",
}


@pytest.mark.parametrize("text", FOREIGN)
def test_foreign_code_ends_no_run(pool, text):
    """The error names reward, problem, place and completion; the next call has new workers."""
    texts, problems = ["a", text, "b"], [problem(i, f"d.jsonl, line {i + 1}") for i in range(3)]
    message = f"^the reward 'foreign:acts' on problem 1 .d.jsonl, line 2., completion '{text}' "
    if not FOREIGN[text]:  # which completion it was is not to be known
        message = "^the reward 'foreign:acts' on problem . .* wrote to a file of ours"
    with pytest.raises(RewardError, match=message + FOREIGN[text]):
        score(pool, texts, problems)
    assert scores(pool, "a") == [1.0]


def test_a_signal_ends_the_wait(module):
    """At once, and no process is left."""
    others = children(os.getpid())
    pool = load_reward(RewardConfig(name="foreign:acts", num_workers=2))
    stop, polls, workers = StopSignals(), [], set()

    def poll():
        polls.append(1)
        if len(polls) == 5:
            workers.update(children(os.getpid()) - others)
            stop.received = signal.SIGTERM
        stop.poll()

    with pytest.raises(Stopped, match="SIGTERM"):
        score(pool, ["sleep", "a", "sleep"], [problem(i) for i in range(3)], poll)
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=5)[1]


def test_signals_to_everybody_leave_workers_alone(pool):
    """Terminals and job schedulers send them to all processes; the run decides."""
    [pid, *_] = {int(pid) for pid in scores(pool, "pid")}
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert pid in {int(pid) for pid in scores(pool, *["pid"] * 8)}


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("exits:f", {}, "'exits:f', which cannot be imported: SystemExit.'set up wrongly'"),
        ("dies:f", {}, "'dies:f', which cannot be imported: it ended its process with exit code 7"),
        ("foreign:no_arguments", {}, "'foreign:no_arguments' is called as reward.text, problem"),
        ("foreign:acts", {"scal": 1}, "reward.args is {'scal': 1}.*'scal'"),
        ("math_verify", {"timeout_s": 0.5}, "reward.args.timeout_s is 0.5; give whole seconds"),
        ("math_verify", {"timeout_s": True}, "reward.args.timeout_s is True; give whole seconds"),
        ("math_verify", {"timeout_s": 0}, "reward.args.timeout_s is 0; give whole seconds"),
        ("reasoning_gym", {"answer_tag": 3}, "reward.args.answer_tag is 3; give the name of a tag"),
    ],
)
def test_what_cannot_be_loaded_is_told_at_the_start(module, name, args, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(RewardConfig(name=name, args=args), lambda: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_s": 0}, "reward.timeout_s is 0; give seconds above 0"),
        ({"timeout_s": float("inf")}, "reward.timeout_s is inf"),
        ({"num_workers": 0}, "reward.num_workers is 0; give at least 1, or unset"),
    ],
)
def test_settings_of_the_workers(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)


SCORES_FOR_EVER = """
from samebit.recipes.data.reward_pool import load_reward
from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.tasks.base import Problem

pool = load_reward(RewardConfig(name="foreign:acts", num_workers=1))
problem = Problem(index=0, prompt="", label="", metadata={})
pool.score(["sleep"], [problem], lambda: print("here", flush=True))
"""


def test_workers_end_with_their_run(module):
    """Also where it is killed while they work."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-P", "-c", SCORES_FOR_EVER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"here\n"
        workers = children(run.pid)
        run.kill()
    assert len(workers) == 1
    assert not psutil.wait_procs(workers, timeout=5)[1]
