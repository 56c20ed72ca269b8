"""Dynamic sampling, an async reward and samples of several turns in one run: whatever their delays,
and whenever it is killed, its weights are the same."""

import json
import random
import time

import pytest
from run_children import ended, generated, has_lines

from samebit.recipes.cli.main import main

STEPS = 6


def words(seed, *others):
    """What a run is told; the seed draws all delays."""
    return [
        "rollout.dynamic_sampling=true",
        "rollout.refill_prompts=4",
        "rollout.generate=run_children:two_turns",
        f"rollout.generate_args.seed={seed}",
        "reward.name=run_children:score_some_later",
        "reward.concurrency=5",
        f"reward.args={{every: 3, seed: {seed}}}",
        f"trainer.num_steps={STEPS}",
        "seed=2",
        *others,
    ]


class Together:
    """Runs of all three, under one folder."""

    def __init__(self, runs):
        self.runs, self.folder = runs, runs.folder

    def arguments(self, name, seed, *others):
        given = [w for w in self.runs.arguments(name) if not w.startswith("reward.")]
        return ["grpo", *given, *words(seed, *others)]

    def result(self, name):
        """What must be equal between equal runs."""
        summary = json.loads((self.folder / name / "summary.json").read_text())
        return summary, self.runs.rows(name)


@pytest.fixture(scope="module")
def whole(make_runs, tmp_path_factory):
    """One uninterrupted run, and the seconds that it took."""
    whole = Together(make_runs(tmp_path_factory.mktemp("together")))
    start = time.perf_counter()
    ended.clear()
    generated.clear()
    assert main(whole.arguments("whole", 1)) == 0
    whole.seconds, whole.ended = time.perf_counter() - start, ended.copy()
    return whole


def test_delays_are_not_to_be_seen(runs, whole):
    """Of samples and of scores, in another order."""
    other = Together(runs)
    ended.clear()
    generated.clear()
    assert main(other.arguments("other", 7)) == 0
    assert ended != whole.ended
    assert sorted(ended) == sorted(whole.ended)
    assert other.result("other") == whole.result("whole")
    rows = other.runs.rows("other")[1:]
    assert max(row["rollout/refills"] for row in rows) > 1
    assert {row["rollout/turns_mean"] for row in rows} == {2.0}
    assert all(row["train/grad_norm"] > 0.01 for row in rows)


@pytest.mark.long
def test_killed_at_ten_random_instants_and_resumed(runs, whole, child):
    """SIGKILL, each time within a share of the time that the whole run took: the kills spread over
    drawing, scoring, training and saving. Delays are other ones in each process."""
    killed, rng = Together(runs), random.Random(9)
    provenance = killed.folder / "killed" / "provenance.jsonl"
    saves = ["resume=true", "trainer.checkpoint_every=1"]
    for number in range(10):
        has_begun = has_lines(provenance, number + 1)
        with child(killed.arguments("killed", 3, *saves)) as process:
            while not has_begun():
                assert process.is_alive()
                time.sleep(0.001)
            time.sleep(rng.uniform(0, whole.seconds / 15))
            assert process.is_alive()
    assert main(killed.arguments("killed", 3, *saves)) == 0
    assert killed.result("killed") == whole.result("whole")
