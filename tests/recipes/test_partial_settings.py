"""rollout.partial_tokens: how much may be drawn, what becomes of parts, and what is refused."""

import random
import re
import sys
from dataclasses import replace
from itertools import product

import pytest
from partial_schedule import PROMPTS, schedule
from run_children import in_one_process

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.config import ConfigError
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.stints import joined
from samebit.recipes.run.waiting_rollouts import HOST_TOKEN_BYTES, PACKED_TOKEN_BYTES, packed
from samebit.rollout.types import Completion
from samebit.weight_sync.types import VersionSpan, WeightVersion


def test_parts_of_one_version_are_one_span():
    """Of others, each begins where its own tokens do."""
    old, new = (WeightVersion(step, "a") for step in (1, 2))

    def part(*versions):
        spans = tuple(VersionSpan(i, v) for i, v in enumerate(versions))
        return Completion(
            request_id="7",
            sample_id=3,
            token_ids=(1,) * len(versions),
            logprobs=(-1.0,) * len(versions),
            finish_reason="length",
            version_spans=spans,
        )

    first = part(old)
    assert joined(first, part(old)).version_spans == (VersionSpan(0, old),)
    both = joined(joined(first, part(old)), part(new))
    assert both.version_spans == (VersionSpan(0, old), VersionSpan(2, new, recomputed=True))
    mixed = joined(first, part(new, old)).version_spans
    assert mixed[1:] == (VersionSpan(1, new, recomputed=True), VersionSpan(2, old))


def test_how_much_may_be_drawn():
    """Stints of a step, and prompts of a run."""
    section = RolloutSection(prompts_per_step=5, max_new_tokens=10, partial_tokens=4)
    assert (section.most_stints, section.most_prompts_per_step) == (3, 15)
    assert section.most_prompts(4) == (4 + 2) * 5
    choosy = replace(section, dynamic_sampling=True, max_refills=2)
    assert (choosy.most_stints, choosy.most_rounds_per_step) == (3, 5)
    assert choosy.most_prompts(4) == 4 * choosy.most_prompts_per_step == 4 * 25
    assert RolloutSection(prompts_per_step=5).most_prompts(4) == 20
    assert (section.most_prompts_left, choosy.most_prompts_left) == (2 * 5, 3 * 5 - 1)
    assert RolloutSection(prompts_per_step=5).most_prompts_left == 0
    stale = [replace(x, max_staleness=4).most_token_staleness for x in (section, choosy)]
    assert stale == [4 + 2, 4 + 3]
    assert replace(choosy, prompts_per_step=1).most_token_staleness == 2
    assert RolloutSection(max_staleness=4, dynamic_sampling=True).most_token_staleness == 4


def test_sample_ids_name_the_prompts_of_a_stint():
    """However many stints a step may have; a refill of whole samples is of its step."""
    tiny = RolloutSection(prompts_per_step=500, max_new_tokens=1 << 14, partial_tokens=1)
    assert (tiny.most_prompts_named, tiny.most_prompts_per_step) == (500, 500 << 14)
    choosy = replace(tiny, dynamic_sampling=True)
    assert choosy.most_prompts_named == 500
    assert replace(choosy, partial_tokens=None).most_prompts_named == 5000


def test_what_a_drawn_token_takes():
    """In a checkpoint, and of a process: what dry runs and plans say of what is left."""
    tokens, logprobs = tuple(range(1000, 1512)), tuple(-i / 7 for i in range(1, 513))
    whole = Completion(
        request_id="",
        sample_id=3,
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason="length",
        version_spans=(),
    )
    state = packed([whole])
    assert sum(state[x].nbytes for x in ("token_ids", "logprobs")) == 512 * PACKED_TOKEN_BYTES
    sizes = sum(map(sys.getsizeof, (*tokens, *logprobs, tokens, logprobs)))
    assert sizes - 2 * sys.getsizeof(()) == 512 * HOST_TOKEN_BYTES


def waits_of(trained, stints):
    """By how many steps each prompt is trained on behind the one that began it."""
    begun = [step for step, count in enumerate(stints) for _ in range(PROMPTS * count)]
    return [step - begun[place] for step, places in enumerate(trained) for place in places]


def test_no_prompt_waits_for_long():
    """Whatever its samples' lengths and those of others; and no step draws too much."""
    most, waits = 2, set()
    for needed in product(range(1, most + 1), repeat=3 * PROMPTS):
        trained, stints = schedule([*needed, *[most] * 9], 4)
        assert sum(stints) <= 4 + most - 1
        waits |= {*waits_of(trained, stints)}
    assert max(waits) == section_of(most).most_token_staleness == most - 1


def section_of(most, **others):
    """Samples that draw one token a stint."""
    return RolloutSection(prompts_per_step=PROMPTS, max_new_tokens=most, partial_tokens=1, **others)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_nor_where_prompts_are_dropped(most):
    """More may be finished at once than a step trains on."""
    rng, waits, later = random.Random(most), set(), 99 * PROMPTS
    for _ in range(500):
        needed = rng.choices((1, most), k=6 * PROMPTS)
        dropped = rng.sample(range(len(needed)), k=rng.randrange(5 * PROMPTS))
        waits |= {*waits_of(*schedule([*needed, *[most] * later], 6, dropped))}
    assert max(waits) == section_of(most, dynamic_sampling=True).most_token_staleness == most


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.partial_tokens=0"], "rollout.partial_tokens is 0; it must be 1 to 256, roll"),
        (["rollout.partial_tokens=257"], "rollout.partial_tokens is 257; it must be 1 to 256, r"),
        (
            ["rollout.dynamic_sampling=true", "rollout.refill_prompts=4"],
            "rollout.refill_prompts is 4; it must be unset with rollout.partial_tokens",
        ),
        (["rollout.generate=a:b"], "rollout.generate is 'a:b'; it must be unset with rollout.par"),
        (
            ["rollout.top_k=5", "rollout.logprobs=truncated"],
            "rollout.logprobs is 'truncated'; it must be full with rollout.partial_tokens",
        ),
    ],
)
def test_settings_that_cannot_be(words, message):
    words = ["model.path=m", "device=cpu", "rollout.partial_tokens=8", *words]
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve("grpo", words)


def test_a_command_that_trains_no_policy_refuses_it():
    """eagle3's target does not change."""
    meaning = "rollout.partial_tokens is 8; it must be None, its default: nothing reads it where"
    with pytest.raises(ConfigError, match=meaning):
        resolve("eagle3", ["model.path=m", "rollout.partial_tokens=8"])


def test_a_dry_run_says_how_much_is_drawn_at_once(runs, monkeypatch):
    """All samples that may be unfinished, the stints of one, and what may be left; of steps that
    wait each leaves as much."""
    in_one_process(monkeypatch.setattr)
    words = ("rollout.partial_tokens=2", "engine.max_num_seqs=1000")
    more = ("rollout.samples_per_prompt=3000", "placement=process", "rollout.max_staleness=2")
    described = [words, words[1:], (*words, more[0]), (*words, *more)]
    figures, plain, many, ahead = (describe_grpo(runs.resolve("run", *x)) for x in described)
    assert figures["stints_of_a_sample"] == 3
    assert [x["most_token_staleness"] for x in (figures, ahead)] == [2, 2 + 2]
    samples = plain["samples_per_step"]
    assert figures["most_samples_at_once"] == 3 * samples
    assert figures["most_samples_left"] == 2 * samples
    key = "kv_mib_if_all_run_at_once"
    assert figures[key] > plain[key] > 0
    tokens = 2 * 3 * 3000 * 6
    for found, steps in ((many, 1), (ahead, 2)):
        assert found["most_samples_left"] == 2 * 3 * 3000
        assert found["left_in_checkpoint_mib"] == round(8 * steps * tokens / 2**20, 1) > 0.5
        assert found["left_on_host_mib"] == round(68 * steps * tokens / 2**20, 1)
    assert ahead["step_s_is_drawn_after"] == "max(0, s - 3)"
