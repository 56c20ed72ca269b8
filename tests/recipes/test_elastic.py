"""numerics.grad_segments in whole runs: a run that loses processes goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.cli.main import main, own_command
from samebit.recipes.launch import processes
from samebit.recipes.run.metrics import read_rows
from samebit.trainer.checkpoint import latest_checkpoint

WORDS = [
    "numerics.grad_segments=4",
    "algorithm=grpo_kl",
    "algorithm.kl_coef=0.1",
    "trainer.batch_size=6",
    "trainer.checkpoint_every=1",
    "rollout.eval_every=1",
]
SPLIT = "trainer.parallel.distributed_optimizer=true"
TWO = ["trainer.parallel.data=2", SPLIT]


def result_of(runs, name):
    """Summary, metrics without times, samples."""
    folder = runs.folder / name
    summary = json.loads((folder / "summary.json").read_text())
    return summary, runs.rows(name), read_rows(folder / "samples.jsonl")


def test_one_process_goes_on_for_two(runs, run_ranks, capsys):
    """Its rollouts, metrics and weights are those of one process from the start, to the byte. The
    second optimizer step of each rollout has ratios, and all are clipped. Another number of
    segments would be another run, and any other layout one with other bits."""
    alone = runs.train("alone", *WORDS, "trainer.num_steps=2")
    assert all(row["train/grad_norm"] > 1 for row in alone[1][1:])
    codes, said = run_ranks(runs.arguments("two", *WORDS, *TWO, "trainer.num_steps=1"))
    assert codes == [0, 0], said
    assert runs.rows("two") == alone[1][:2]
    assert runs.train("two", *WORDS, SPLIT, "trainer.num_steps=2", "resume=true") == alone
    told = "is resharded (data 2 -> 1): bits are those that they would have been"
    assert told in capsys.readouterr().err
    [change] = latest_checkpoint(runs.folder / "two" / "checkpoints").manifest["resharded"]
    assert change == {"step": 1, "changes": "data 2 -> 1"}
    for word, message in (
        ("numerics.grad_segments=8", "numerics.grad_segments 4 there, 8 here"),
        ("trainer.parallel.context=2", "another trainer.parallel (context 1 -> 2); with reshard"),
    ):
        more = [SPLIT, "trainer.num_steps=3", "resume=true", "dry_run=true", word]
        assert main(["grpo", *runs.arguments("two", *WORDS, *more)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_killed_with_four_and_with_two(runs):
    """By SIGKILL, and resumed with half the processes each time."""
    words = [*WORDS, "trainer.num_steps=6"]
    alone = runs.train("alone", *words)
    checkpoints = runs.folder / "killed" / "checkpoints"
    for copies, step in ((4, 2), (2, 4)):
        data = f"trainer.parallel.data={copies}"
        command = own_command(["grpo", *runs.arguments("killed", *words, data, "resume=true")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while not (checkpoints / f"step_{step:08d}").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        ranks = psutil.Process(process.pid).children()
        assert len(ranks) == copies
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not psutil.wait_procs(ranks, timeout=processes.GRACE_S)[1]
    assert runs.train("killed", *words, "resume=true") == alone


def test_what_it_is_not_promised_for_is_refused(runs, capsys):
    """In a dry run, with the key."""
    for words, message in (
        (["numerics.grad_segments=3"], "numerics.grad_segments is 3; it must be a power of two"),
        (["trainer.parallel.data=8"], "trainer.parallel.data is 8; it must be a power of two up"),
        ([*TWO, "trainer.parallel.overlap_grad_reduce=true"], "grad_reduce is True; it must be f"),
        (["numerics.attention=plain_attention:PlainAttention"], "it must be an invariant kind"),
        (
            ["numerics.grad_segments=0", "trainer.parallel.offload_segment_sums=true"],
            "trainer.parallel.offload_segment_sums is True; it must be False",
        ),
    ):
        assert main(["grpo", *runs.arguments("dry", *WORDS, *words, "dry_run=true")]) > 0
        assert message in capsys.readouterr().err
    few = ["trainer.num_steps=1", "rollout.prompts_per_step=1", "trainer.batch_size=2"]
    few += ["numerics.grad_segments=8", "trainer.parallel.data=4"]
    figures = describe_grpo(runs.resolve("few", *few))  # fewer samples than copies
    assert figures["segment_sums_mib"] == figures["gradients_mib"]
    assert "segment_sums_mib" not in describe_grpo(runs.resolve("none"))
