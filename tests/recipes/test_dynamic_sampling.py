"""Dynamic sampling: which prompts a step draws and trains on is a function of rewards alone."""

import json
import re

import pytest
import torch
from helpers import tree
from run_children import open_run

from samebit.recipes.cli.compose import resolve
from samebit.recipes.config import ConfigError
from samebit.recipes.data.order import SampleIds, problem_index
from samebit.recipes.data.tasks.registry import load_datasets
from samebit.recipes.run.dynamic_sampling import TooFewGroupsError
from samebit.recipes.run.rollouts import list_rollouts, load_dropped, load_rollout
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint

PROMPTS, SAMPLES, STEPS, EVERY, SIZE = 3, 4, 4, 3, 50
DYNAMIC = ["rollout.dynamic_sampling=true", "reward.name=run_children:score_some"]
DYNAMIC += [f"reward.args.every={EVERY}", f"trainer.num_steps={STEPS}"]
DYNAMIC += ["logger.save_rollouts=true", "trainer.background_checkpoints=false"]
REFILLS = "rollout.refill_prompts=2"


@pytest.fixture(scope="module")
def whole(make_runs, tmp_path_factory):
    """One uninterrupted run; do not write to its folder."""
    runs = make_runs(tmp_path_factory.mktemp("dynamic"))
    runs.result = runs.train("run", *DYNAMIC, REFILLS)
    return runs


def expected_step(place):
    """What a step draws that begins at a place: problems, the places kept, and refills."""
    problems = [problem_index(place + i, SIZE, 0) for i in range(PROMPTS)]
    refills = 0
    while len(kept := [i for i, p in enumerate(problems) if p % EVERY == 0]) < PROMPTS:
        behind = place + len(problems)
        problems += [problem_index(behind + i, SIZE, 0) for i in range(2)]
        refills += 1
    return problems, kept[:PROMPTS], refills


def files_of(runs):
    """What must be equal in equal runs: the weights, and what was drawn, as bytes."""
    folder = runs.folder / "run"
    newest = latest_checkpoint(folder / "checkpoints")
    return tree(folder / "rollouts"), newest.manifest["progress"], tree(newest.path)


def test_prompts_order_and_ids_are_as_the_rewards_say(whole):
    """By hand, from the order of problems and which of them have a spread."""
    rows, folder, place = whole.result[1], whole.folder / "run", 0
    prompt_of = {p.index: p.prompt for p in load_datasets(whole.resolve("run", *DYNAMIC).data)[0]}
    seen = set()
    for step, file in list_rollouts(folder).items():
        problems, kept, refills = expected_step(place)
        row, drawn = rows[step], len(problems)
        assert (row["rollout/refills"], row["rollout/prompts_drawn"]) == (refills, drawn)
        assert row["rollout/kept_fraction"] == PROMPTS / drawn
        spread = sum(p % EVERY == 0 for p in problems)
        assert row["rollout/spread_fraction"] == spread / drawn
        ids = SampleIds().of_step(step - 1, drawn, SAMPLES)
        samples, dropped = load_rollout(file), load_dropped(file)
        assert [s.sample_id for s in samples] == [i for place in kept for i in ids[place]]
        prompts = [s.prompt_ids.tolist() for s in samples[::SAMPLES]]
        assert [len(p) for p in prompts] == [len(prompt_of[problems[i]]) for i in kept]
        same = {prompt_of[problems[i]]: tuple(p) for i, p in zip(kept, prompts, strict=True)}
        assert len(set(same.values())) == len(same)
        rest = [i for i in range(drawn) if i not in kept]
        assert list(dropped) == [i for place in rest for i in ids[place]]
        without = [i for place in rest if problems[place] % EVERY for i in ids[place]]
        assert {dropped[i] for i in without} == {0.25}
        rewards = [s.reward for s in samples]
        assert row["rollout/reward_mean"] == float(torch.tensor(rewards).double().mean())
        every = [*rewards, *dropped.values()]
        assert row["rollout/drawn_reward_mean"] == pytest.approx(sum(every) / len(every), rel=1e-14)
        seen.add((refills, spread > PROMPTS))
        place += drawn
    assert len(seen) > 2  # several numbers of refills, and groups beyond what is needed
    assert {beyond for _, beyond in seen} == {False, True}
    progress = latest_checkpoint(folder / "checkpoints").manifest["progress"]
    assert (progress["step"], progress["prompts_drawn"]) == (STEPS, place)


def test_scheduling_changes_nothing(runs, whole):
    """What the engine does when is no business of the choice; unset, a refill is a whole draw."""
    small = ["engine.page_size=16", "engine.kv_cache_tokens=64", "engine.max_num_seqs=3"]
    assert runs.train("run", *DYNAMIC, REFILLS, *small, "placement.transport=file") == whole.result
    wide = [f"rollout.refill_prompts={PROMPTS}", "trainer.num_steps=1"]
    assert runs.train("wide", *DYNAMIC, *wide) == runs.train("unset", *DYNAMIC, wide[1])


def test_killed_between_refills_and_resumed(runs, whole, kill_when):
    """In the scoring of refills of a step before and of one behind a checkpoint: equal bytes."""
    evaluated, drawn = 4, [len(expected_step(0)[0])]
    drawn.append(len(expected_step(drawn[0])[0]))
    assert expected_step(0)[2] > 0 < expected_step(sum(drawn))[2]
    arguments = ["grpo", *runs.arguments("run", "resume=true", *DYNAMIC, REFILLS)]
    kill_when(runs.held(evaluated + PROMPTS * SAMPLES + 1), arguments)
    assert latest_checkpoint(runs.folder / "run" / "checkpoints") is None
    kill_when(runs.held(evaluated + (sum(drawn) + PROMPTS) * SAMPLES + 1), arguments)
    newest = latest_checkpoint(runs.folder / "run" / "checkpoints")
    assert newest.manifest["progress"]["prompts_drawn"] == sum(drawn)
    runs.control.unlink()
    assert runs.train("run", "resume=true", *DYNAMIC, REFILLS) == whole.result
    there, here = files_of(whole), files_of(runs)
    assert here[:2] == there[:2]
    assert here[2].keys() == there[2].keys()


def test_a_run_is_bound_to_it(whole):
    """Off, or refills of another size: refused, and named."""
    words = [word for word in DYNAMIC if "dynamic" not in word]
    for changed, said in {
        (*words,): "rollout.dynamic_sampling true there, false here",
        (*DYNAMIC,): "rollout.refill_prompts 2 there, null here",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            open_run(whole.resolve("run", "resume=true", *changed))


def test_too_few_groups_are_an_error_with_the_numbers(runs, whole):
    """verl's way; with more refills the run goes on as if there had always been as many."""
    once = "rollout.max_refills=1"
    drawn = expected_step(0)[0][: PROMPTS + 2]
    found = sum(p % EVERY == 0 for p in drawn)
    message = f"step 1: of 5 prompts drawn {found} have samples of different rewards; rollout"
    message += ".prompts_per_step is 3 and rollout.max_refills is 1: give other prompts, or more"
    with pytest.raises(TooFewGroupsError, match=re.escape(message)):
        runs.train("run", *DYNAMIC, REFILLS, once)
    most = max(row["rollout/refills"] for row in whole.result[1][1:])
    by_step = [row.get("rollout/refills", 0) for row in whole.result[1]]
    assert max(by_step[1:3]) < most  # steps 1 and 2 are saved, a later one has too few
    with pytest.raises(TooFewGroupsError, match=f"max_refills is {most - 1}: "):
        runs.train("run", *DYNAMIC, REFILLS, f"rollout.max_refills={most - 1}", "overwrite=true")
    assert runs.train("run", *DYNAMIC, REFILLS, "resume=true") == whole.result


def test_too_few_groups_are_trained_on_where_asked(runs):
    """In as many optimizer steps as they need; none at all is an error there too."""
    words = [*DYNAMIC, "rollout.max_refills=0", "rollout.too_few_groups=train"]
    words += ["trainer.batch_size=4", "trainer.num_steps=2", "rollout.prompts_per_step=9"]
    summary, rows, _ = runs.train("run", *words)
    assert summary["logprob_mismatches"] == 0
    problems = [[problem_index(9 * step + i, SIZE, 0) for i in range(9)] for step in range(2)]
    kept = [sum(p % EVERY == 0 for p in some) for some in problems]
    assert [row["rollout/kept_fraction"] for row in rows[1:]] == [n / 9 for n in kept]
    assert 0 < min(kept) <= max(kept) < 9
    state = latest_checkpoint(runs.folder / "run" / "checkpoints").load()
    assert state["step"] == sum(kept)
    spans = [
        load_rollout(file)[0].version_spans for file in list_rollouts(runs.folder / "run").values()
    ]
    assert [span.version.step for [span] in spans] == [0, kept[0]]
    with pytest.raises(TooFewGroupsError, match="step 1: of 9 prompts drawn 0 have samples of"):
        runs.train("none", *words, "reward.args.every=1000003")


def test_a_checkpoint_that_does_not_say_what_was_drawn(runs, base):
    """Of an earlier version, where every step drew as many: the run goes on with its prompts."""
    runs.train("base", "trainer.num_steps=2")
    file = latest_checkpoint(runs.folder / "base" / "checkpoints").path / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["progress"].pop("prompts_drawn") == 2 * PROMPTS
    for key in [key for key in manifest["config"] if "dynamic" in key or "_few" in key]:
        del manifest["config"][key]
    file.write_text(json.dumps(manifest))
    _, rows, _ = runs.train("base", "trainer.num_steps=3", "resume=true")
    assert rows == base.result[1][:4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.max_refills=3"], "rollout.max_refills is 3; it must be 9, its default: nothing"),
        (["rollout.refill_prompts=3"], "nothing reads it where rollout.dynamic_sampling is false"),
        (["rollout.too_few_groups=train"], "nothing reads it where rollout.dynamic_sampling is"),
        ([*DYNAMIC[:1], "rollout.max_refills=-1"], "rollout.max_refills is -1; it must be 0 or"),
        ([*DYNAMIC[:1], "rollout.refill_prompts=0"], "rollout.refill_prompts is 0; it must be pos"),
        (
            [*DYNAMIC[:1], "rollout.max_refills=0", "rollout.refill_prompts=2"],
            "nothing reads it where rollout.max_refills is 0",
        ),
        ([*DYNAMIC[:1], "rollout.too_few_groups=skip"], "it must be one of ('error', 'train')"),
        ([*DYNAMIC[:1], "rollout.samples_per_prompt=1"], "at least 2 with rollout.dynamic_sampling"),
        (
            [*DYNAMIC[:1], "rollout.too_few_groups=train", "trainer.batch_size=12"]
            + ["rollout.prompts_per_step=3", "trainer.parallel.data=5"],
            "trainer.parallel.data is 5; it must be at most 4, the samples that too few groups",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve("grpo", ["model.path=m", "device=cpu", *words])
