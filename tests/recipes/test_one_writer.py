"""Of several processes one alone writes what there is one of."""

import pytest

from samebit.recipes import grpo, sft
from samebit.recipes.cli.compose import resolve
from samebit.recipes.run import session
from samebit.trainer.checkpoint import list_checkpoints
from samebit.trainer.checkpoint_writer import CheckpointWriter


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_another_process_writes_checkpoints_alone(runs, monkeypatch, capfd, command):
    """No rows, samples, rollouts, report, summary or export; and it shows no bar."""
    monkeypatch.setattr(session, "is_first", lambda: False)
    polled, poll = [], CheckpointWriter.poll
    monkeypatch.setattr(CheckpointWriter, "poll", lambda self: polled.append(poll(self)))
    arguments = runs.arguments("run", "trainer.num_steps=2", "logger.save_rollouts=true")
    if command == "sft":
        idle = ("reward", "rollout", "logger.save")
        arguments = [a for a in arguments if not a.startswith(idle)]
        sft.train(resolve("sft", [*arguments, "trainer.batch_size=4"]))
    else:
        grpo.train(resolve("grpo", arguments))
    folder = runs.folder / "run"
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [2]
    assert "step" not in capfd.readouterr().err
    assert len(polled) == 2  # once a step: one that failed is told before the next is due
