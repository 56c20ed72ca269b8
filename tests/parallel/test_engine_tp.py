"""Tensor parallel engines: every rank the same completions, whatever the schedule."""

import json

import pytest
from rank_programs import PARAMS, exact, prompts

from samebit.kernels.reduce import RankGroup
from samebit.recipes.verification.speculation import write_random_draft
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config


@pytest.fixture
def found(run_ranks, qwen3_path, tmp_path):
    """What each of two ranks reported."""
    # Its one kv head is no rank's part: each rank has the whole draft.
    write_random_draft(tmp_path / "draft", load_model_config(qwen3_path), num_kv_heads=1)
    run_ranks("engine", 2, qwen3_path, tmp_path / "out.json")
    return [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]


def test_two_ranks_are_one_engine(found, qwen3_path):
    """Batches, chunks, preemption, guesses and overlap move no bit; scores are the drawn log-probs;
    an update of shards commits under the digest of the whole; and the model is that of one rank."""
    assert found[0] == found[1]
    first = found[0]["generated"][0]
    assert all(generated == first for generated in found[0]["generated"])
    assert found[0]["updated"] == found[0]["bound"] == first
    assert [guessed["verifications"] > 0 for guessed in found[0]["guessed"]] == [True] * 3
    assert found[0]["profile"] == 2
    assert found[0]["capacity"] == (1 << 30) // (768 // 2) // 64 * 64  # each has half of the heads
    specs = load_model_config(qwen3_path).param_specs((0, 2))
    shards = {spec.shape for spec in specs if len(spec.shape) == 2}
    assert set(map(tuple, found[0]["checked"])) == shards | {(331, 48)}  # and the whole logits
    warm = [i for i, p in enumerate(PARAMS) if p.temperature not in (0.0, 1.0)]
    for i, (prompt, group) in enumerate(zip(prompts(), first, strict=True)):
        if i not in warm:
            assert found[0]["scores"][i][len(prompt) - 1 :] == group[0][1]
    draft = {"speculative": "eagle3", "draft_model": found[0]["draft"]["folder"]}
    alone = Engine(qwen3_path, device="cpu", seed=3, **draft)
    doubled = {name: 2 * param for name, param in alone.draft_control.params.items()}
    old, new, healed = found[0]["draft"]["versions"]
    assert old == vars(alone.draft_version)
    assert new == vars(alone.copy_weights(doubled, 3, selector="draft"))
    assert healed == {"step": 5, "digest": old["digest"]}
    assert "rank 1: NaN or Inf in 1 tensors: draft.fc.weight" in found[0]["draft"]["said"]
    versions = found[0]["versions"]
    assert [v["step"] for v in versions] == [0, 5, 7]
    assert {v["digest"] for v in versions} == {alone.weight_version.digest}
    contexts = [[*p, *c[0][0]] for p, c in zip(prompts(), first, strict=True)]
    for values, ours in zip(alone.score(contexts), found[0]["scores"], strict=True):
        assert values == pytest.approx([float.fromhex(v) for v in ours], abs=2e-5)
    assert exact(alone.generate(prompts(), PARAMS)) != first  # other sums, other last bits


def test_concurrent_callers_of_rank_0(run_ranks, qwen3_path, tmp_path):
    """Calls, streams, cancelled and broken ones at any step cannot make ranks differ; what is
    called alike before and after has one order and one row of ids."""
    run_ranks("followed_ranks.led", 2, qwen3_path, tmp_path / "out.json")
    led, follower = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert led["led"] == [led["alike"]] * 2
    assert follower["led"] == []
    assert led["alike"] == follower["alike"]
    assert led["after"] == follower["after"]
    assert not led["unfinished"]
    assert not follower["unfinished"]
    assert [led["refused"][0], follower["refused"][0]] == [
        "rank 0 cannot follow",
        "rank 1 cannot lead",
    ]
    for found in (led, follower):
        assert "2 tensor parallel ranks need Engine.leading on rank 0" in found["refused"][1]


def test_a_step_that_fails_on_one_rank(run_ranks, qwen3_path, tmp_path):
    """Both say so, and do not hang; one that fails on all alike is the caller's error alone, also
    if rank 0 finds it first, as it drains."""
    run_ranks("followed_ranks.parted", 2, qwen3_path, tmp_path / "out.json")
    led, follower = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert "NaN log-prob in request" in led["nan"]
    left, leaving, late = led["drained"]
    assert "NaN log-prob in request" in left
    assert "NaN log-prob in request" in leaving
    assert "need Engine.leading on rank 0" in late
    assert led["alike"] == follower["alike"]
    for found in (led, follower):
        assert "a step failed on some ranks, not on all: {1:" in found["parted"]
        assert "a card fell off" in found["parted"]
    assert "the tensor parallel ranks have parted: a step failed" in led["again"]


def test_bad_ranks_are_refused(qwen3_path):
    with pytest.raises(ValueError, match=r"tensor rank 2 is not in \[0, 2\)"):
        RankGroup(2, 2)
    with pytest.raises(ValueError, match="tensor size 2 with group None"):
        RankGroup(0, 2)


def test_what_one_rank_refuses_all_refuse_at_once(run_ranks, qwen3_path, tmp_path):
    """None waits for another: all learn which rank it was and why, and none serves a mixture."""
    run_ranks("session_ranks.refused", 2, qwen3_path, tmp_path / "out.json")
    found = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    reasons = {
        "shape": "rank 1: decoder.final_layernorm.weight is (48,)",
        "missing": "tensors never arrived: decoder.final_layernorm.weight, ",
        "extra": "rank 1: unknown tensor extra",
        "NaN": "rank 1: NaN or Inf in 1 tensors: decoder.final_layernorm.weight",
        "by hand": "rank 1: unknown tensor x",
        "fails": "rank 1: AttributeError(",
        "different": "the ranks commit different updates: ",
        "leased": "rank 1: tensors not shared with the engine: decoder.final_layernorm.weight",
    }
    for name, reason in reasons.items():
        for rank in range(2):
            told, served = found[rank][name]
            assert reason in told, (name, told)
            assert "broke off: " in served
        if name != "different":  # each has its own step
            assert found[0][name] == found[1][name], name
    served, (refusal, served_too) = (ranks["begun again"] for ranks in found)
    assert served == [served_too]
    assert "broke off: given up" in served_too
    assert "unknown tensor extra" in refusal
    others, own = (ranks["short"] for ranks in found)
    missing = "the memory of kv_cache is released; resume it first"
    assert others == ["rank 1: ResumeError('kv_cache needs 7 bytes')", missing]
    assert own == ["kv_cache needs 7 bytes", missing]
    told, raised = (ranks["no folder"] for ranks in found)
    assert told.startswith("rank 1: FileNotFoundError('model folder /nowhere")
    assert raised == "model folder /nowhere does not exist"


def test_ranks_pause_alike(run_ranks, qwen3_path, tmp_path):
    """Called alike or by rank 0 alone, with whole tensors taken apart and put together between."""
    run_ranks("session_ranks.paused", 2, qwen3_path, tmp_path / "out.json")
    led, follower = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    digest = Engine(qwen3_path, device="cpu").weight_version.digest
    for found in (led, follower):
        assert found["alike"] == [True, True]
        assert found["version"] == {"step": 3, "digest": digest}
        assert found["whole"]
        assert found["after"]
    assert led["led"]
