"""SIGTERM and SIGINT: a run ends at a safe point, saved, with exit code 0; its resume is equal."""

import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest
from helpers import assert_on_loopback
from run_children import has_lines, run_cli_and_hang

from samebit.recipes.cli.main import main
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.run.recorder import Recorder
from samebit.recipes.run.sampling import RolloutSource
from samebit.recipes.run.signals import Stopped, StopSignals, stop_signals
from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer


def signal_before_call(monkeypatch, owner, name, number, which=signal.SIGTERM):
    """The call of this number raises a signal first; returns the list of all calls' names."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            signal.raise_signal(which)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def stop_and_resume(runs, monkeypatch, capsys, step, *overrides):
    """Run into the signal, look at what is left, and run to the end."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert main(["grpo", *runs.arguments("stopped", *overrides)]) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("samebit grpo: ")]
    assert len(lines) == 1
    where = f"saved in {runs.folder}/stopped/checkpoints" if step else "nothing to save"
    assert f": stopped after step {step}, {where}; resume=true goes on" in lines[0]
    newest = latest_checkpoint(runs.folder / "stopped" / "checkpoints")
    assert (newest.verify().step if newest else 0) == step
    assert not (runs.folder / "stopped" / "summary.json").exists()
    monkeypatch.undo()
    return runs.train("stopped", "resume=true", *overrides)


@pytest.mark.parametrize(
    ("owner", "name", "number", "step"),
    [
        (RolloutSource, "training_prompts", 4, 3),  # the engine is left at its first batch
        (RolloutSource, "training_prompts", 1, 0),  # no step is done yet
        (GrpoRecipe, "evaluate", 1, 0),
        (GrpoRecipe, "evaluate", 2, 3),  # step 3 is trained: its evaluation is finished
        (GrpoRecipe, "update", 4, 3),  # before the first micro-batch
        (Grpo, "loss", 5, 2),  # between micro-batches of step 3, which is given up
        (Recorder, "save", 1, 2),  # while a checkpoint is written: not written twice
    ],
)
def test_stopped_anywhere_and_resumed(runs, base, monkeypatch, capsys, owner, name, number, step):
    """A stop may drop work, never half of a step, and the result does not show it."""
    which = signal.SIGINT if number % 2 else signal.SIGTERM
    calls = signal_before_call(monkeypatch, owner, name, number, which)
    assert stop_and_resume(runs, monkeypatch, capsys, step) == base.result
    assert len(calls) == number


def test_a_second_optimizer_step_is_not_given_up(runs, monkeypatch, capsys):
    """Once the first of a rollout's optimizer steps has written, all of them are done."""
    split = ["trainer.batch_size=6"]
    expected = runs.train("split", *split)
    signal_before_call(monkeypatch, MegatronTrainer, "train_step", 6)  # the second of step 3
    assert stop_and_resume(runs, monkeypatch, capsys, 3, *split) == expected


def test_a_signal_after_the_last_poll_lets_the_run_end(runs, base, monkeypatch):
    """There is nothing left to stop."""
    signal_before_call(monkeypatch, GrpoRecipe, "evaluate", 3)
    assert runs.train("ended") == base.result


def test_a_second_signal_exits_at_once(runs, child):
    """Even where the run would never come to a safe point."""
    hangs = runs.folder / "hangs"
    with child(["grpo", *runs.arguments("twice")], run_cli_and_hang) as process:
        while not hangs.exists():
            assert process.is_alive()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        process.join(0.3)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
        assert process.exitcode == 128 + signal.SIGINT


def test_a_reward_that_never_returns_does_not_hold_up_a_signal(runs, base, child):
    """It is killed, the last whole step is saved, and the exit code is 0."""
    held = runs.held(30)
    with child(["grpo", *runs.arguments("hung")]) as process:
        while not held():
            assert process.is_alive()
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGTERM)
        process.join(20)
        assert process.exitcode == 0
    assert workers
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert latest_checkpoint(runs.folder / "hung" / "checkpoints").verify().step == 2
    runs.control.unlink()
    assert runs.train("hung", "resume=true") == base.result


def test_a_signal_to_the_engines_process_too(runs, base, child):
    """Ctrl-C and job schedulers signal every process: only the recipe's decides."""
    arguments = ["grpo", *runs.arguments("group", "placement=process")]
    has_begun = has_lines(runs.folder / "group" / "metrics.jsonl", 3)
    with child(arguments) as process:
        while not has_begun():
            assert process.is_alive()
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        assert_on_loopback(each.pid for each in [*children, process])
        for each in [*children, process]:
            os.kill(each.pid, signal.SIGINT)
        process.join(20)
        assert process.exitcode == 0
    assert children
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert latest_checkpoint(runs.folder / "group" / "checkpoints").step >= 2
    assert runs.train("group", "resume=true") == base.result


def test_nothing_is_handled_outside_the_main_thread():
    """Python allows handlers there only."""
    found = []

    def run():
        with stop_signals() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.received))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), None)]


def say_so_and_sleep(connection):
    connection.send("here")
    time.sleep(60)


def test_a_forked_child_can_be_terminated():
    """A reward may use processes; one that ignored SIGTERM would never end."""
    with stop_signals() as stop:
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        process = context.Process(target=say_so_and_sleep, args=(there,))
        process.start()
        assert here.recv() == "here"  # Python drops signals that come while it forks
        process.terminate()
        process.join(10)
        assert process.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        assert stop.received is None


def test_poll_raises_only_after_a_signal():
    """Signals that are handled nowhere stop nothing."""
    stop = StopSignals()
    stop.poll()
    stop.poll_together()
    stop.received = signal.SIGTERM
    for poll in (stop.poll, stop.poll_alone, stop.poll_together):
        with pytest.raises(Stopped, match="SIGTERM"):
            poll()
