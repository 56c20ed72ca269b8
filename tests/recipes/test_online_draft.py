"""GRPO runs that train their draft: the same runs, with a draft beside them that learns."""

import json
import re
import shutil

import pytest
import torch
from helpers import assert_same_bits, tree

from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.run.binding import bound_keys
from samebit.recipes.run.metrics import is_repeated, read_rows
from samebit.rollout.runtime.draft_folder import open_draft
from samebit.trainer.checkpoint import CheckpointError, latest_checkpoint
from samebit.weight_sync.digest import weights_digest

ONLINE = (
    "draft.train=online",
    "draft.layers=[1,2]",
    "draft.optimizer.lr=3e-3",
    "ttt.passes=3",
    "engine.speculative=eagle3",
    "engine.adaptive_drafts=false",
    "engine.num_draft_tokens=3",
)


@pytest.fixture(scope="module")
def online(make_runs, tmp_path_factory):
    """One uninterrupted run that trains a new draft, with its rows whole. Do not write to it."""
    runs = make_runs(tmp_path_factory.mktemp("online"))
    runs.result = runs.train("base", *ONLINE)
    runs.rows = read_rows(runs.folder / "base" / "metrics.jsonl")
    return runs


def without_draft(result):
    """What a run of the same words gives that trains none."""
    summary, rows, samples = result
    rows = [{k: v for k, v in row.items() if not k.startswith("draft/")} for row in rows]
    return {k: v for k, v in summary.items() if k != "draft_digest"}, rows, samples


def test_a_run_with_a_draft_in_training_is_the_same_run(online, base):
    """Weights, rewards, samples: nothing of the target moves."""
    assert without_draft(online.result) == base.result


def test_guesses_are_told_of_every_step(online):
    """How many there were, and how many were right; not of an evaluation."""
    assert not any(key.startswith("rollout/spec_") for key in online.rows[0])
    for row in online.rows[1:]:
        assert {k for k in row if not is_repeated(k)} > {"perf/step_s", "rollout/spec_accept_rate"}
        spec = {k.removeprefix("rollout/spec_"): v for k, v in row.items()}
        assert 0 < spec["verifications"] <= spec["draft_tokens"]
        assert spec["accepted_tokens"] <= spec["draft_tokens"]
        tokens = spec["verifications"] + spec["accepted_tokens"]
        assert spec["accept_length"] == tokens / spec["verifications"]
        assert spec["accept_rate"] == spec["accepted_tokens"] / spec["draft_tokens"]
    assert "Accept length" in (online.folder / "base" / "report.html").read_text()


def test_a_draft_is_trained_and_left(online):
    """Its loss falls, and its folder is what the last checkpoint holds."""
    summary, rows, _ = online.result
    losses = [row["draft/loss"] for row in rows[1:]]
    assert losses[-1] < losses[0] - 0.1
    assert all(row["draft/num_rows"] > 0 and row["draft/grad_norm"] > 0 for row in rows[1:])
    assert {"draft/acceptance_2", "draft/match_0", "draft/learning_rate"} < rows[1].keys()
    state = latest_checkpoint(online.folder / "base" / "checkpoints").load()["draft"]
    assert state["step"] == 6
    found = open_draft(online.folder / "base" / "draft", num_target_layers=2)
    assert found.config.captured_layers == (1, 2)
    assert found.config.draft_vocab_size == found.config.vocab_size
    params = {name: torch.empty_like(p) for name, p in state["params"].items()}
    found.fill(params)
    for name, param in state["params"].items():
        assert_same_bits(params[name], param, name)
    assert summary["draft_digest"] == weights_digest(found.config.param_specs(), params)
    report = (online.folder / "base" / "report.html").read_text()
    assert "Draft loss" in report
    assert summary["draft_digest"] in report


def test_a_resumed_run_ends_in_the_same_bytes(online, runs):
    """From the checkpoint after step 4, in a copy of the run's folder: also its draft's state."""
    shutil.copytree(online.folder / "base", runs.folder / "base")
    shutil.rmtree(runs.folder / "base" / "checkpoints" / "step_00000006")
    words = *ONLINE, f"reward.args.control={online.control}", "resume=true"
    assert runs.train("base", *words) == online.result
    folders = [where.folder / "base" for where in (online, runs)]
    assert tree(folders[0] / "draft") == tree(folders[1] / "draft")
    manifests = [latest_checkpoint(folder / "checkpoints").manifest for folder in folders]
    assert manifests[0] == manifests[1]
    with pytest.raises(CheckpointError, match=r"configuration: ttt.passes 3 there, 2 here"):
        runs.train("base", *words, "ttt.passes=2")
    with pytest.raises(CheckpointError, match="draft.train online there, absent here"):
        runs.train("base", *words[-2:])


@pytest.mark.long
@pytest.mark.parametrize(
    "placement",
    [
        ("placement=process", "placement.transport=gloo", "placement.delta=true"),
        ("placement=process", "placement.transport=file"),
        ("placement=process", "placement.replicas=2"),
        ("placement.transport=file",),
    ],
    ids=["gloo", "file", "replicas", "file beside"],
)
def test_the_draft_goes_wherever_the_engine_is(online, runs, placement):
    """The same weights, target's and draft's, over every way; and guesses there are as many."""
    assert runs.train("there", *ONLINE, *placement) == online.result
    rows = read_rows(runs.folder / "there" / "metrics.jsonl")
    for row, own in zip(rows[1:], online.rows[1:], strict=True):
        for name in ("verifications", "draft_tokens", "accepted_tokens"):
            assert row[f"rollout/spec_{name}"] == own[f"rollout/spec_{name}"]


def test_a_draft_is_trained_every_so_often(runs):
    """On one step's samples in all of its optimizer steps; between them it stays as it is."""
    words = (
        "draft.every=2",
        "trainer.batch_size=4",
        "engine.speculative=hybrid",
        "trainer.num_steps=3",
    )
    _, rows, _ = runs.train("two", *ONLINE, *words)
    assert [row["step"] for row in rows if "draft/loss" in row] == [2]
    of_step = {row["step"]: row["rollout/response_len_mean"] * 12 for row in rows[1:]}
    for row in rows:
        if "draft/loss" in row:
            assert row["draft/num_rows"] == of_step[row["step"]]  # no prompt is of one token


def test_a_run_begins_with_a_draft_that_is_there(online, runs):
    """Another run's; its folder stays as it is, and no run may replace what it reads."""
    folder = online.folder / "base" / "draft"
    before = tree(folder)
    words = [word for word in ONLINE if not word.startswith("draft.layers")]
    words += ["trainer.num_steps=1", "draft.optimizer.lr=0"]
    summary, rows, _ = runs.train("more", *words, f"engine.draft_model={folder}")
    assert summary["draft_digest"] == online.result[0]["draft_digest"]
    assert rows[1]["draft/loss"] != online.result[1][1]["draft/loss"]
    assert tree(folder) == before == tree(runs.folder / "more" / "draft")
    own = f"engine.draft_model={runs.folder / 'more' / 'draft'}"
    with pytest.raises(ConfigError, match="engine.draft_model"):
        runs.train("more", *words, own, "overwrite=true")


def test_a_draft_that_overflows_is_left_as_it_is(runs, base, caplog):
    """Its steps are left out and counted; what is saved is whole, and the target's run is the
    same, to its end."""
    result = runs.train("inf", *ONLINE, "draft.optimizer.lr=1e30")
    assert without_draft(result) == base.result
    skipped = [row["draft/skipped_steps"] for row in result[1][1:]]
    assert skipped[0] == 0
    assert skipped[-1] == 1
    assert all("draft/loss" not in row for row in result[1] if row.get("draft/skipped_steps"))
    assert "the draft: loss nan and gradient norm nan at its step" in caplog.text
    draft = latest_checkpoint(runs.folder / "inf" / "checkpoints").load()["draft"]
    assert draft["step"] == 6 - sum(skipped)
    assert all(x.isfinite().all() for x in draft["params"].values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draft.every=2"], "draft.every is 2; it must be 1, its default: .* draft.train is 'off'"),
        (["draft.optimizer.lr=1"], "draft.optimizer is .*: nothing reads it where draft.train is"),
        (["ttt.passes=3"], "ttt.passes is 3; it must be 7, its default: .* draft.train is 'off'"),
        (["draft.train=on"], "draft.train is 'on'; it must be one of .'off', 'online'."),
        (
            ["draft.train=online", "engine.speculative=suffix"],
            "engine.speculative is 'suffix'; it must be eagle3 or peagle or hybrid with draft.tr",
        ),
        ([*ONLINE, "draft.every=7"], "draft.every is 7; it must be at most trainer.num_steps"),
        (
            [*ONLINE, "algorithm=ppo", "critic.warmup_steps=5", "draft.every=4"],
            "draft.every is 4; it must be at most trainer.num_steps, and reached behind critic.w",
        ),
        ([*ONLINE, "draft.every=0"], "draft.every is 0; it must be positive"),
        ([*ONLINE, "ttt.eval_passes=3"], "ttt.eval_passes is 3; .* whose rollouts say the accept"),
        ([*ONLINE, "draft.optimizer.lr=-1"], "draft.optimizer.lr is -1.0; it must be finite"),
        (
            [*ONLINE, "draft.optimizer.lr_schedule=linear", "draft.optimizer.lr_warmup_steps=6"],
            "draft.optimizer.lr_warmup_steps is 6; it must be below 6, the draft's optimizer",
        ),
        ([*ONLINE, "engine.draft_model=nowhere"], "draft.layers is .1, 2.*engine.draft_model is"),
    ],
)
def test_settings_that_do_not_fit(runs, words, message):
    """Refused by the key, as the command line is read: in a dry run too."""
    with pytest.raises(ConfigError, match=message):
        runs.resolve("never", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*ONLINE, "draft.layers=null"], "draft.layers: a target of 2 layers has no default"),
        ([*ONLINE, "draft.layers=[1,3]"], "draft.layers: .* the target has streams after 0 to 2"),
        (["engine.speculative=eagle3"], "engine.draft_model is None; it must be the path of a"),
    ],
)
def test_drafts_that_cannot_be_are_refused_in_a_dry_run(runs, capsys, words, message):
    """By the key, before anything is made."""
    assert main(["grpo", *runs.arguments("dry", *words), "dry_run=true"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (runs.folder / "dry").exists()


def test_a_dry_run_tells_of_the_draft(runs, capsys):
    assert main(["grpo", *runs.arguments("dry", *ONLINE, "draft.every=4"), "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"draft_optimizer_steps +1\n", out)
    assert re.search(r"draft_captured_layers +1, 2\n", out)
    assert re.search(r"draft_mib +[1-9]", out)
    assert not (runs.folder / "dry").exists()


def test_a_dry_run_tells_what_stages_keep(runs, capsys):
    """Of two layers one stage makes the stream after the first, the other that after both."""
    words = *words_of("pipeline"), "rollout.prompts_per_step=15", "rollout.max_new_tokens=56"
    assert main(["grpo", *runs.arguments("dry", *ONLINE, *words), "dry_run=true"]) == 0
    out = capsys.readouterr().out
    kept = re.search(r"draft_kept_streams_mib +(.*)\n", out)
    assert float(kept[1]) == round(15 * 4 * 64 * 64 * 4 / 2**20, 1) > 0
    assert re.search(r"draft_target_copies_mib +[0-9]", out)


def test_what_a_draft_in_training_binds(runs):
    """Its schedule is of all steps, and what its folder leaves open is part of what it computes."""

    def keys(*words):
        return bound_keys(runs.resolve("bound", *ONLINE, *words))

    assert "trainer.num_steps" not in keys()
    assert keys("draft.optimizer.lr_schedule=cosine")["trainer.num_steps"] == 6
    own = "engine.draft_model=a", "draft.layers=null", "engine.draft_norm_output=sglang"
    assert keys(*own)["engine.draft_norm_output"] == "sglang"
    assert not any(key.startswith("engine.") for key in bound_keys(runs.resolve("plain")))


def words_of(kind):
    """Of two processes."""
    stages = ("placement.transport=stages",) if kind == "pipeline" else ()
    return f"trainer.parallel.{kind}=2", *stages


STILL = ("trainer.optimizer.lr=0", "trainer.num_steps=2")
"""A target that is the same in every layout: its gradients are summed in other orders."""


@pytest.fixture(scope="module")
def still(make_runs, tmp_path_factory):
    """What one process gives; in `result`."""
    runs = make_runs(tmp_path_factory.mktemp("still"))
    runs.result = runs.train("one", *ONLINE, *STILL)
    return runs


@pytest.mark.parametrize("kind", ["pipeline", pytest.param("context", marks=pytest.mark.long)])
def test_the_draft_of_parts_is_that_of_the_whole(still, run_ranks, kind):
    """Of stages, and of ranks with a part of each sample's tokens: to the bit, and so are loss
    and gradient."""
    codes, said = run_ranks(still.arguments(kind, *ONLINE, *STILL, *words_of(kind)))
    assert codes == [0, 0], said
    assert_as_one(still, kind)


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        ("trainer.parallel.pipeline=2",),
        ("trainer.parallel.context=2", "placement.replicas=2", "placement.delta=true"),
    ],
    ids=["stages", "context, replicas"],
)
def test_two_train_the_draft_of_engines_apart(still, run_ranks, words):
    """Each sends its share of it: the guesses are those of one process, too."""
    words = "placement=process", "placement.transport=gloo", *words
    codes, said = run_ranks(still.arguments(words[-1], *ONLINE, *STILL, *words))
    assert codes == [0, 0], said
    assert_as_one(still, words[-1])


def assert_as_one(still, name):
    """The run of this name comes to the same samples, guesses and draft as that of one process."""
    summary = json.loads((still.folder / name / "summary.json").read_text())
    assert summary == still.result[0]
    for row, expected in zip(still.rows(name)[1:], still.result[1][1:], strict=True):
        for key, value in expected.items():
            if key.startswith(("draft/", "rollout/")):
                assert row[key] == value, key
    drafts = [tree(still.folder / folder / "draft") for folder in ("one", name)]
    assert drafts[0] == drafts[1]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["data", "tensor", "pipeline", "context"])
def test_processes_train_one_draft(runs, run_ranks, kind):
    """Two copies of the target, or its shards, stages, or parts of each sample: the target is that
    of the same run without, and a resume finds the draft."""
    words = *words_of(kind), "trainer.num_steps=4"
    found = {}
    for name, more in (("none", ()), ("online", ONLINE)):
        codes, said = run_ranks(runs.arguments(name, *words, *more))
        assert codes == [0, 0], said
        summary = json.loads((runs.folder / name / "summary.json").read_text())
        samples = read_rows(runs.folder / name / "samples.jsonl")
        found[name] = summary, runs.rows(name), samples
    assert without_draft(found["online"]) == found["none"]
    rows = read_rows(runs.folder / "online" / "metrics.jsonl")
    for row in rows[1:]:
        assert row["draft/num_rows"] == row["rollout/response_len_mean"] * 12
        assert row["rollout/spec_verifications"] > 0
    draft, manifest = tree(runs.folder / "online" / "draft"), newest(runs).manifest
    shutil.rmtree(newest(runs).path)
    codes, said = run_ranks(runs.arguments("online", *words, *ONLINE, "resume=true"))
    assert codes == [0, 0], said
    assert tree(runs.folder / "online" / "draft") == draft
    assert newest(runs).manifest == manifest
    assert runs.rows("online") == found["online"][1]
    shutil.rmtree(newest(runs).path)  # and one process goes on from both, with other bits
    more = words[-1], "resume=true", "reshard=true"
    summary, _, _ = runs.train("online", *ONLINE, *more)
    assert summary["draft_digest"] != found["online"][0]["draft_digest"]


def newest(runs):
    return latest_checkpoint(runs.folder / "online" / "checkpoints")
