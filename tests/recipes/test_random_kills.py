"""SIGKILL at seeded random instants after a run's files reach a state, and resume: equal bytes."""

import random
import shutil
import time

import psutil
import pytest
from run_children import has_begun_to_save, has_lines

from samebit.trainer.checkpoint import latest_checkpoint


def test_killed_at_random_and_resumed(runs, base, kill_when):
    """The delays spread the kills over rollout, training, sync, evaluation and saving."""
    folder = runs.folder / "killed"
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    rng = random.Random(5)
    arguments = ["grpo", *runs.arguments("killed", "resume=true", "placement.transport=file")]
    moments = [
        has_lines(metrics, 1),
        has_begun_to_save(checkpoints, 2),
        lambda: any(folder.glob(".weight_sync.samebit-*")),
        has_lines(metrics, 4),
        has_begun_to_save(checkpoints, 4),
        has_lines(metrics, 6),
    ]
    for moment in moments:
        for leftover in folder.glob(".weight_sync.samebit-*"):  # of the kill before
            shutil.rmtree(leftover)
        delay = rng.uniform(0, 0.1)
        kill_when(lambda m=moment, d=delay: m() and (time.sleep(d) or True), arguments)
        newest = latest_checkpoint(checkpoints)
        assert newest is None or newest.verify().step == newest.step
    assert runs.train("killed", "resume=true") == base.result


@pytest.mark.long
def test_the_engines_process_dies_with_its_recipe(runs, base, child):
    """Or it would hold the GPU that the resumed run needs; and weights on their way are dropped."""
    arguments = ["grpo", *runs.arguments("killed", "placement=process", "resume=true")]
    has_begun = has_lines(runs.folder / "killed" / "metrics.jsonl", 4)
    with child(arguments) as process:
        while not has_begun():
            assert process.is_alive()
            time.sleep(0.001)
        children = psutil.Process(process.pid).children(recursive=True)
    assert children
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert runs.train("killed", "resume=true") == base.result
