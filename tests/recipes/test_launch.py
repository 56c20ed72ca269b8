"""Runs of several processes: equal however they are disturbed, and never half of them left over."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
from helpers import assert_on_loopback

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main, own_command
from samebit.recipes.launch import launched, processes
from samebit.recipes.run.metrics import read_rows
from samebit.trainer.checkpoint import latest_checkpoint

LAYOUTS = {
    "tensor": ["trainer.parallel.tensor=2", "trainer.parallel.sequence=true"],
    "pipeline": ["trainer.parallel.pipeline=2", "placement.transport=stages"],
    "data": [
        "trainer.parallel.data=2",
        "trainer.parallel.distributed_optimizer=true",
        "placement.release_memory=true",
    ],
}
SAMPLING = {
    "data": [
        "rollout.dynamic_sampling=true",
        "reward.name=run_children:score_some",
        "reward.args.every=2",
    ],
}
STEPS = 8


@contextmanager
def started(runs, name, *overrides):
    """The launcher of a run; it and all its processes are gone afterwards."""
    arguments = runs.arguments(name, f"trainer.num_steps={STEPS}", *overrides)
    process = subprocess.Popen(
        own_command(["grpo", *arguments]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def launch(monkeypatch, capfd):
    """launch(words): the exit code of `samebit` that launches in this process, and what it and its
    processes say on each stream."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))

    def run(words):
        capfd.readouterr()
        return main(words), *capfd.readouterr()

    return run


def result_of(runs, name):
    """Summary, metrics without times, samples."""
    folder = runs.folder / name
    summary = json.loads((folder / "summary.json").read_text())
    return summary, runs.rows(name), read_rows(folder / "samples.jsonl")


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def processes_of(process):
    """The launched processes by rank."""
    children = psutil.Process(process.pid).children()
    return [sorted(children, key=lambda p: int(p.environ()["RANK"]))[i] for i in (0, 1)]


def kill_a_rank(process, ranks):
    """The other one notices and ends; the launcher says which it was."""
    ranks[1].kill()
    _, errors = process.communicate(timeout=processes.GRACE_S + 10)
    assert process.returncode == 128 + signal.SIGKILL
    assert "samebit: rank 1 ended with SIGKILL; the others are ended within 30 s" in errors


def kill_the_launcher(process, _ranks):
    process.kill()
    process.wait(10)


def stop(process, _ranks):
    """Both end after the same step, saved."""
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = {x for x in errors.splitlines() if x.startswith("samebit grpo: ")}
    assert len(lines) == 1
    assert "SIGTERM: stopped after step" in lines.pop()


DISTURBANCES = {"tensor": kill_the_launcher, "pipeline": kill_a_rank, "data": stop}


@pytest.mark.long
@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_disturbed_and_resumed(runs, base, run_ranks, layout, tmp_path, capsys):
    """Log-probs equal to the bit, the first rollouts those of one process, an exact resume, and a
    checkpoint of several ranks exported as one model. All ranks choose the same prompts."""
    sampling = SAMPLING.get(layout, [])
    own = LAYOUTS[layout] + sampling
    words = [f"trainer.num_steps={STEPS}", *own]
    codes, said = run_ranks(runs.arguments("whole", *words))
    assert codes == [0, 0], said
    whole = summary, rows, _ = result_of(runs, "whole")
    assert summary["logprob_mismatches"] == 0
    assert summary["logprob_tokens_compared"] > 100
    alone = runs.train("alone", "trainer.num_steps=1", *sampling) if sampling else base.result
    of_alone = {key: x for key, x in alone[1][1].items() if key.startswith("rollout/")}
    assert {key: rows[1][key] for key in of_alone} == of_alone
    assert (of_alone.get("rollout/refills", 0) > 0) == bool(sampling)
    folder = runs.folder / "disturbed"
    with started(runs, "disturbed", *own) as process:
        wait_for(process, (folder / "checkpoints" / "step_00000002").exists)
        ranks = processes_of(process)
        assert_on_loopback([process.pid, *(rank.pid for rank in ranks)])
        DISTURBANCES[layout](process, ranks)
        assert not psutil.wait_procs(ranks, timeout=processes.GRACE_S)[1]
    assert latest_checkpoint(folder / "checkpoints").verify().step >= 2
    assert not (folder / "summary.json").exists()
    codes, said = run_ranks(runs.arguments("disturbed", "resume=true", *words))
    assert codes == [0, 0], said
    assert result_of(runs, "disturbed") == whole
    out = tmp_path / "out"
    assert main(["export", f"checkpoint={folder}", f"model={runs.model}", f"out={out}"]) == 0
    assert f"weights of step {STEPS}, digest {summary['weights_digest']}" in capsys.readouterr().out


def test_a_run_goes_on_under_another_layout(runs, run_ranks, launch, capfd):
    """From one process to two, whose rollouts go on from the same weights; and back."""
    layout, (_, first_rows, _) = LAYOUTS["tensor"], runs.train("run")
    words = runs.arguments("run", f"trainer.num_steps={STEPS}", "resume=true", *layout)
    codes, errors = run_ranks(words)
    assert codes == [1, 1]
    assert "another trainer.parallel (tensor 1 -> 2, sequence False -> True)" in errors
    code, output, errors = launch(["grpo", *words, "reshard=true"])
    assert code == 0, errors
    assert errors.count("is resharded (tensor 1 -> 2, sequence False -> True): bits are") == 1
    summary, rows = json.loads(output), runs.rows("run")  # said once, not by every process
    assert rows[: len(first_rows)] == first_rows
    assert (rows[-1]["step"], summary["logprob_mismatches"]) == (STEPS, 0)
    back = [f"trainer.num_steps={STEPS + 2}", "resume=true", "reshard=true"]
    summary, rows, _ = runs.train("run", *back)
    assert "is resharded (tensor 2 -> 1, sequence True -> False)" in capfd.readouterr().err
    assert (rows[-1]["step"], summary["logprob_mismatches"]) == (STEPS + 2, 0)
    manifest = latest_checkpoint(runs.folder / "run" / "checkpoints").manifest
    there, back_again = manifest["resharded"]
    assert there == {"step": 6, "changes": "tensor 1 -> 2, sequence False -> True"}
    assert back_again == {"step": STEPS, "changes": "tensor 2 -> 1, sequence True -> False"}


def test_an_error_is_every_process_s(runs, launch):
    """A folder in use: told once for each, before anything is changed, and all end for good."""
    (runs.folder / "used").mkdir()
    (runs.folder / "used" / "precious").write_text("x")
    words = runs.arguments("used", "max_restarts=2", *LAYOUTS["data"])
    code, _, errors = launch(["grpo", *words])
    assert code == 1
    assert errors.count("is not empty; give resume=true to go on with its run") == 2
    assert [p.name for p in (runs.folder / "used").iterdir()] == ["precious"]


def test_processes_are_started_only_where_they_are_needed(monkeypatch):
    """Not for a plan, and not under another launcher; and not more than there are GPUs."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*overrides):
        return resolve("grpo", ["model.path=m", "data=chain_sum", *overrides])

    assert launched.num_processes(run("trainer.parallel.data=2", "trainer.parallel.tensor=2")) == 4
    assert launched.needs_launch(run("trainer.parallel.data=2"))
    assert not launched.needs_launch(run("trainer.parallel.data=2", "dry_run=true"))
    assert not launched.needs_launch(run())
    demo = [f"{phase}.trainer.parallel.data=2" for phase in ("sft", "grpo")]
    assert launched.needs_launch(resolve("demo", ["device=cpu", *demo]))
    assert not launched.needs_launch(resolve("export", ["checkpoint=c", "model=m", "out=o"]))
    with pytest.raises(ValueError, match="99 processes, each on a GPU of its own; torch finds"):
        processes.launch([], run("trainer.parallel.data=99", "device=cuda"))
    monkeypatch.setenv("RANK", "0")
    assert not launched.needs_launch(run("trainer.parallel.data=2"))


@pytest.mark.parametrize(("how", "code"), [("exit 7", 7), ("kill -TERM $$", 128 + 15)])
def test_the_first_failure_is_told(launch_script, capsys, how, code):
    """Not what became of the others, which wait for it until they are ended."""
    assert launch_script(f'[ "$RANK" = 1 ] && {how}\nexec cat') == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("samebit: rank 1 ended with ")
    assert launch_script("exit 0") == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("ends", ["exit 7", "exit 0"])
def test_what_a_failed_rank_has_started_ends_with_it(launch_script, tmp_path, ends):
    """Also what stands still, or whose rank has ended before."""
    child = "sleep 300 & kill -STOP $!; echo $! > child.$RANK"
    script = f"{child}\n[ $RANK = 1 ] && while [ ! -s child.0 ]; do :; done; {ends}\nexec cat"
    assert launch_script(script.replace("exec cat", "")) == int(ends[-1])
    for rank in (0, 1):
        number = int((tmp_path / f"child.{rank}").read_text())
        if ends == "exit 0":
            child = psutil.Process(number)
            assert child.status() == psutil.STATUS_STOPPED
            child.kill()
        else:
            with suppress(psutil.NoSuchProcess):  # else whoever adopted it is yet to notice
                assert psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def test_what_processes_are_told(launch_script, monkeypatch, tmp_path):
    """The command, their places and one secret; of the rest, what the user has set stays."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    assert launch_script('env > env.$RANK; echo "$@" > command.$RANK') == 0
    found = []
    for rank in (0, 1):
        command = (tmp_path / f"command.{rank}").read_text()
        assert command == "-P -m samebit.recipes.cli.main grpo a=b\n"
        lines = (tmp_path / f"env.{rank}").read_text().splitlines()
        found.append(dict(line.split("=", 1) for line in lines if "=" in line))
        for name, value in {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "3",
            "NCCL_ALGO": "Ring",
        }.items():
            assert found[rank][name] == value, name
    for name in ("SAMEBIT_SECRET", "MASTER_PORT"):
        assert found[0][name] == found[1][name]
    assert len(found[0]["SAMEBIT_SECRET"]) == 64
