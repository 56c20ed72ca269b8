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
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.dynamic_sampling import TooFewGroupsError
from samebit.recipes.run.rollouts import list_rollouts, load_dropped, load_rollout
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint, manifest_text

PROMPTS, SAMPLES, STEPS, EVERY, SIZE, MORE, SEED = 3, 4, 3, 3, 50, 4, 2
DYNAMIC = ["rollout.dynamic_sampling=true", "reward.name=run_children:score_some"]
DYNAMIC += [f"reward.args.every={EVERY}", f"trainer.num_steps={STEPS}"]
DYNAMIC += ["logger.save_rollouts=true", "trainer.background_checkpoints=false"]
DYNAMIC += [f"seed={SEED}"]
REFILLS = f"rollout.refill_prompts={MORE}"


@pytest.fixture(scope="module")
def whole(make_runs, tmp_path_factory):
    """One uninterrupted run; do not write to its folder."""
    runs = make_runs(tmp_path_factory.mktemp("dynamic"))
    runs.result = runs.train("run", *DYNAMIC, REFILLS)
    return runs


def expected_choice(spread):
    """Of a step whose groups have a spread or not: how many are drawn, the places kept, refills."""
    drawn, refills = PROMPTS, 0
    while sum(spread[:drawn]) < PROMPTS:
        drawn, refills = drawn + MORE, refills + 1
    return drawn, [i for i in range(drawn) if spread[i]][:PROMPTS], refills


def files_of(runs):
    """What must be equal in equal runs: all that was drawn, the state's digests, the progress."""
    manifest = latest_checkpoint(runs.folder / "run" / "checkpoints").manifest
    return tree(runs.folder / "run" / "rollouts"), manifest["files"], manifest["progress"]


def test_prompts_order_and_ids_are_as_the_rewards_say(whole):
    """By hand, from the order of problems and which of them have a spread."""
    rows, folder, place = whole.result[1], whole.folder / "run", 0
    prompt_of = {p.index: p.prompt for p in load_datasets(whole.resolve("run", *DYNAMIC).data)[0]}
    seen = set()
    for step, file in list_rollouts(folder).items():
        row, samples, dropped = rows[step], load_rollout(file), load_dropped(file)
        rewards = {s.sample_id: s.reward for s in samples}
        drawn = (len(rewards) + len(dropped)) // SAMPLES
        ids = SampleIds().of_step(step - 1, drawn, SAMPLES)
        rewards |= dropped
        groups = [[rewards[i] for i in some] for some in ids]
        problems = [problem_index(place + i, SIZE, SEED) for i in range(drawn)]
        others = [g for g, p in zip(groups, problems, strict=True) if p % EVERY]
        assert all(group == [0.25] * SAMPLES for group in others)
        spread = [len(set(group)) > 1 for group in groups]
        expected, kept, refills = expected_choice(spread)
        assert (row["rollout/refills"], row["rollout/prompts_drawn"]) == (refills, expected)
        assert expected == drawn
        assert row["rollout/kept_fraction"] == PROMPTS / drawn
        assert row["rollout/spread_fraction"] == sum(spread) / drawn
        assert [s.sample_id for s in samples] == [i for place in kept for i in ids[place]]
        prompts = [s.prompt_ids.tolist() for s in samples[::SAMPLES]]
        assert [len(p) for p in prompts] == [len(prompt_of[problems[i]]) for i in kept]
        same = {prompt_of[problems[i]]: tuple(p) for i, p in zip(kept, prompts, strict=True)}
        assert len(set(same.values())) == len(same)
        rest = [i for i in range(drawn) if i not in kept]
        assert list(dropped) == [i for place in rest for i in ids[place]]
        trained = torch.tensor([s.reward for s in samples], dtype=torch.float64)
        assert row["rollout/reward_mean"] == float(trained.mean())
        mean = sum(rewards.values()) / len(rewards)
        assert row["rollout/drawn_reward_mean"] == pytest.approx(mean, rel=1e-14)
        seen.add((refills, sum(spread) > PROMPTS))
        place += drawn
    assert len({refills for refills, _ in seen}) > 1
    assert {beyond for _, beyond in seen} == {False, True}  # more than needed, too
    progress = latest_checkpoint(folder / "checkpoints").manifest["progress"]
    assert (progress["step"], progress["prompts_drawn"]) == (STEPS, place)


def test_scheduling_changes_nothing(runs, whole):
    """What the engine does when is no business of the choice."""
    small = ["engine.page_size=16", "engine.kv_cache_tokens=64", "engine.max_num_seqs=3"]
    assert runs.train("run", *DYNAMIC, REFILLS, *small, "placement.transport=file") == whole.result


def test_places_of_refills():
    """One behind the other; unset, a refill is as large as the first draw."""
    some = RolloutSection(
        prompts_per_step=5, dynamic_sampling=True, refill_prompts=2, max_refills=3
    )
    assert [some.places_of(i) for i in range(3)] == [range(5), range(5, 7), range(7, 9)]
    assert some.most_prompts_per_step == 11
    unset = RolloutSection(prompts_per_step=5, dynamic_sampling=True)
    assert [unset.places_of(i) for i in (0, 2)] == [range(5), range(10, 15)]
    assert unset.most_prompts_per_step == 50
    assert RolloutSection(prompts_per_step=5).most_prompts_per_step == 5


def test_killed_between_refills_and_resumed(runs, whole, kill_when):
    """SIGKILL in the scoring of a refill, a step behind the checkpoint: equal bytes."""
    evaluated, rows = 4, whole.result[1]
    drawn = [row["rollout/prompts_drawn"] for row in rows[1:3]]
    assert rows[3]["rollout/refills"] > 1
    arguments = ["grpo", *runs.arguments("run", "resume=true", *DYNAMIC, REFILLS)]
    calls = evaluated + (sum(drawn) + PROMPTS + MORE) * SAMPLES + 1
    kill_when(runs.held(calls), arguments)
    newest = latest_checkpoint(runs.folder / "run" / "checkpoints")
    assert newest.manifest["progress"]["prompts_drawn"] == sum(drawn)
    runs.control.unlink()
    assert runs.train("run", "resume=true", *DYNAMIC, REFILLS) == whole.result
    assert files_of(runs) == files_of(whole)


def test_a_run_is_bound_to_it(whole):
    """Off, or refills of another size: refused, and named."""
    words = [word for word in DYNAMIC if "dynamic" not in word]
    for changed, said in {
        (*words,): "rollout.dynamic_sampling true there, false here",
        (*DYNAMIC,): f"rollout.refill_prompts {MORE} there, null here",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            open_run(whole.resolve("run", "resume=true", *changed))


def test_too_few_groups_are_an_error_with_the_numbers(runs, whole):
    """verl's way; of records in a file the run goes on with more refills, as if there had always
    been as many. Of a generated task they say what is checked as it starts: it is bound to them."""
    by_step = [row["rollout/refills"] for row in whole.result[1][1:]]
    assert max(by_step[:2]) < by_step[2]  # of the steps before it there is a checkpoint
    drawn, fewer = PROMPTS + MORE * (by_step[2] - 1), f"rollout.max_refills={by_step[2] - 1}"
    message = rf"step 3: of {drawn} prompts drawn [12] have samples of different rewards; rollout"
    message += rf".prompts_per_step is 3 and rollout.max_refills is {by_step[2] - 1}: give other"
    with pytest.raises(TooFewGroupsError, match=message):
        runs.train("run", *DYNAMIC, REFILLS, fewer)
    with pytest.raises(CheckpointError, match="rollout.max_refills [0-9] there, 9 here"):
        runs.train("run", *DYNAMIC, REFILLS, "resume=true")
    paths = {"path": runs.folder / "train.jsonl", "eval_path": runs.folder / "held_out.jsonl"}
    parts = load_datasets(runs.resolve("run", *DYNAMIC).data)
    for path, part in zip(paths.values(), parts, strict=True):
        lines = [json.dumps({"prompt": p.prompt, "label": p.label}) + "\n" for p in part]
        path.write_text("".join(lines))
    every = runs.arguments
    of_task = {"data=reverse_digits", "data.args.length=2", f"data.size={SIZE}", "data.eval_size=4"}
    runs.arguments = lambda *words: [word for word in every(*words) if word not in of_task]
    words = [*DYNAMIC, REFILLS, *(f"data.{key}={path}" for key, path in paths.items())]
    with pytest.raises(TooFewGroupsError, match=message):
        runs.train("of_files", *words, fewer)
    again = runs.train("of_files", *words, "resume=true")
    assert again == runs.train("with_more", *words)


def test_too_few_groups_are_trained_on_where_asked(runs):
    """In as many optimizer steps as they need; none at all is an error there too."""
    words = [*DYNAMIC, "rollout.max_refills=0", "rollout.too_few_groups=train"]
    words += ["trainer.batch_size=4", "trainer.num_steps=2", "rollout.prompts_per_step=9"]
    summary, rows, _ = runs.train("run", *words)
    assert summary["logprob_mismatches"] == 0
    problems = [[problem_index(9 * step + i, SIZE, SEED) for i in range(9)] for step in range(2)]
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
    file.write_text(manifest_text({k: v for k, v in manifest.items() if k != "digest"}))
    _, rows, _ = runs.train("base", "trainer.num_steps=3", "resume=true")
    assert rows[3] == base.result[1][3]


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
        ([*DYNAMIC[:1], "rollout.samples_per_prompt=1"], "at least 2 with rollout.dynamic"),
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
