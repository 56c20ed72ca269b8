"""Runs whose reference is refreshed, and kept in the host's memory."""

import json

import pytest

from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.trainer.checkpoint import latest_checkpoint

KL = ["algorithm=grpo_kl", "algorithm.kl_coef=0.5"]
EVERY_2 = [*KL, "algorithm.kl_refresh_every=2", "rollout.eval_every=9"]
EVERY_3 = [*KL, "algorithm.kl_refresh_every=3"]
OFFLOAD = "trainer.parallel.offload_reference=true"
PLACES = "device", "host"


def test_a_refreshed_reference_is_part_of_resume(runs):
    """The KL begins at exactly 0 again after every second step; a run that goes on behind step 3,
    with its reference elsewhere, has that of step 2."""
    summary, rows, _ = runs.train("whole", *EVERY_2, "trainer.num_steps=4")
    assert [row["train/kl"] == 0.0 for row in rows[1:]] == [True, False] * 2
    assert all(row["train/kl"] >= 0.0 for row in rows[1:])
    runs.train("parts", *EVERY_2, OFFLOAD, "trainer.num_steps=3")
    resumed, again, _ = runs.train("parts", *EVERY_2, "trainer.num_steps=4", "resume=true")
    assert resumed["weights_digest"] == summary["weights_digest"]
    assert again[4]["train/kl"] == rows[4]["train/kl"] > 0


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [["tensor=2"], ["pipeline=2"], ["data=2", "distributed_optimizer=true"], ["context=2"]],
    ids=lambda words: words[0],
)
def test_layouts_refresh_alike(runs, run_ranks, layout):
    """Two processes, and their reference on the device and in the host's memory: the same run,
    whose KL is 0 behind a refresh."""
    words = [*EVERY_2, "trainer.num_steps=3", *(f"trainer.parallel.{word}" for word in layout)]
    words += ["placement.transport=stages"] if layout == ["pipeline=2"] else []
    for name, more in zip(PLACES, ([], [OFFLOAD]), strict=True):
        codes, said = run_ranks(runs.arguments(name, *words, *more))
        assert codes == [0, 0], said
    summaries = [json.loads((runs.folder / x / "summary.json").read_text()) for x in PLACES]
    assert summaries[0] == summaries[1]
    rows, other = map(runs.rows, PLACES)
    assert rows == other
    assert [row["train/kl"] == 0.0 for row in rows[1:]] == [True, False, True]


@pytest.mark.long
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_killed_and_resumed(runs, kill_when, place):
    """By SIGKILL between a checkpoint and the next refresh; the offloaded run is the other."""
    words = [*EVERY_3, f"algorithm.kl_in={place}", "trainer.background_checkpoints=false"]
    alone = runs.train("alone", *words)
    assert runs.train("never", *words, "algorithm.kl_refresh_every=0")[0] != alone[0]
    kill_when(runs.held(60), ["grpo", *runs.arguments("killed", *words, OFFLOAD)])
    runs.control.unlink()
    assert latest_checkpoint(runs.folder / "killed" / "checkpoints").step == 4
    assert runs.train("killed", *words, OFFLOAD, "resume=true") == alone


def test_settings_of_no_reference_are_refused(runs, capsys):
    """With the key, and in a dry run."""
    with pytest.raises(ConfigError, match="algorithm.kl_refresh_every is 2; it must be 0"):
        runs.resolve("run", "algorithm.kl_refresh_every=2")
    with pytest.raises(ConfigError, match="algorithm.kl_refresh_every is -1; it must be at least"):
        runs.resolve("run", *KL, "algorithm.kl_refresh_every=-1")
    assert main(["grpo", *runs.arguments("run", "dry_run=true", OFFLOAD)]) != 0
    message = "trainer.parallel.offload_reference is True; it must be False, its default: nothing"
    assert message in capsys.readouterr().err
