"""numerics.grad_segments in whole runs: a run that loses processes goes on to the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from programs import elastic

from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.cli.main import main, own_command
from samebit.recipes.launch import processes
from samebit.recipes.run.binding import binding_layout, bits_changed, bound_keys
from samebit.recipes.run.metrics import read_rows
from samebit.trainer.checkpoint import latest_checkpoint

WORDS = [
    "numerics.grad_segments=4",
    "algorithm=grpo_kl",
    "algorithm.kl_coef=0.1",
    "algorithm.off_policy_mask_threshold=0.001",
    "reward.normalize=running",
    "reward.clip=0.7",
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


def test_two_processes_go_on_for_one(runs, run_ranks):
    """After the checkpoint of the first of two steps: their rollouts, metrics and weights are those
    of the one process, to the byte. The second optimizer step of each has ratios, all are clipped.
    Rewards are on the scale of those of both steps, which each process keeps.
    """
    alone = runs.train("alone", *WORDS, "trainer.num_steps=2")
    assert alone[1][2]["rollout/reward_running_mean"] != alone[1][2]["rollout/reward_mean"]
    assert alone[1][2]["train/off_policy_mask_fraction"] > 0
    assert all(row["train/grad_norm"] > 1 for row in alone[1][1:])
    two = shutil.copytree(runs.folder / "alone", runs.folder / "two")
    shutil.rmtree(two / "checkpoints" / "step_00000002")
    (two / "summary.json").unlink()
    words = [*WORDS, "trainer.num_steps=2", "trainer.parallel.data=2", "resume=true"]
    words += ["trainer.parallel.offload_reference=true"]
    codes, said = run_ranks(runs.arguments("two", *words))
    assert codes == [0, 0], said
    assert result_of(runs, "two") == alone
    assert "is resharded (data 1 -> 2): bits are those that they would have been" in said
    [change] = latest_checkpoint(two / "checkpoints").manifest["resharded"]
    assert change == {"step": 1, "changes": "data 1 -> 2"}


def test_only_the_number_of_copies_is_free(runs):
    """Another number of segments is another run; any other layout is one with other bits, and so is
    another number of copies without segments."""
    run = runs.resolve("run", *WORDS, *TWO)
    layout = binding_layout(run)
    assert bits_changed(run, layout | {"data": 4}, layout) == ""
    for key, value in layout.items():
        other = not value if isinstance(value, bool) else value + 1
        changed = bits_changed(run, layout | {key: other}, layout)
        assert changed == ("" if key == "data" else f"{key} {other} -> {value}")
    plain = runs.resolve("run", *TWO, SPLIT)
    assert bits_changed(plain, layout | {"data": 4}, layout) == "data 4 -> 2"
    assert bound_keys(run)["numerics.grad_segments"] == 4
    assert "trainer.parallel.offload_segment_sums" not in bound_keys(run)
    assert "offload_segment_sums" not in layout


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
        (["algorithm=ppo"], "numerics.grad_segments is 4; it must be 0 with a critic or draft.t"),
        (
            ["draft.train=online", "engine.speculative=eagle3"],
            "numerics.grad_segments is 4; it must be 0 with a critic or draft.train=online",
        ),
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


def test_the_program_says_what_differs():
    """A step's digest, a log-prob, a step without effect, a case that failed; of optimizers that
    are whole and split each by itself."""
    case = {"copies": 1, "segments": 4, "split": False, "initial_digest": "a", "step_s": 2.0}
    case |= {"steps": [["b", "1"], ["c", "2"]]}
    case |= {"logprob_tokens_compared": 9, "logprob_mismatches": 0}
    plain = case | {"segments": 0, "steps": [["x", "1"], ["y", "2"]], "step_s": 1.0}
    split = case | {"split": True, "steps": [["b", "1"], ["d", "2"]]}
    good = [plain, case, case | {"copies": 2}, split]
    assert elastic.problems(good) == []
    assert not elastic.optimizers_agree(good)
    assert elastic.optimizers_agree(good[:3])
    assert elastic.costs(good[:2]) == {"1 copies, whole optimizer": 2.0}
    two = "2 copies, 4 segments, split False: "
    for change, message in (
        ({"steps": [["b", "1"], ["c", "3"]]}, "its steps are not those of 1 copies, 4 segments"),
        ({"logprob_mismatches": 1}, "1 of 9 log-probs differ"),
        ({"logprob_tokens_compared": 0}, "0 of 0 log-probs differ"),
        ({"failed": "exit code 1"}, "exit code 1"),
    ):
        [said] = elastic.problems([case, case | {"copies": 2} | change])
        assert said.startswith(two + message)
    [said] = elastic.problems([case | {"steps": [["b", "1"], ["b", "2"]]}])
    assert said.endswith("a step trained nothing")
    assert elastic.problems([]) == ["no case was run"]


@pytest.mark.long
def test_the_program_runs(demo_model, tmp_path):
    """On a CPU, with copies that have nothing to compute."""
    words = ["device=cpu", f"model={demo_model}", "samples=3", "max_len=20", "steps=2"]
    assert elastic.main(str(tmp_path / "out.json"), *words, "micro_batch_tokens=64") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["optimizers_agree"]
    assert len(found["cases"]) == 6
