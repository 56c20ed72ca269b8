"""GRPO runs that speculate: the same runs, with what the guesses came to beside them."""

import pytest
import torch
from helpers import assert_same_bits

from samebit.recipes.run.metrics import is_repeated, read_rows
from samebit.recipes.verification.speculation import write_random_draft
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.draft_folder import open_draft
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.weight_sync.digest import weights_digest


@pytest.fixture(scope="module")
def draft_path(demo_model, tmp_path_factory):
    """A draft of the demo's model that knows nothing. Do not write to it."""
    folder = tmp_path_factory.mktemp("draft") / "draft"
    write_random_draft(folder, load_model_config(demo_model))
    return folder


def test_a_run_that_speculates_is_the_same_run(runs, base, draft_path):
    """Its rows have more in them: how many guesses there were, and how many were right."""
    words = "engine.speculative=hybrid", f"engine.draft_model={draft_path}"
    assert runs.train("hybrid", *words, "engine.adaptive_drafts=false") == base.result
    rows = read_rows(runs.folder / "hybrid" / "metrics.jsonl")
    assert not any(key.startswith("rollout/spec_") for key in rows[0])
    for row in rows[1:]:
        assert {k for k in row if not is_repeated(k)} > {"perf/step_s", "rollout/spec_accept_rate"}
        spec = {k.removeprefix("rollout/spec_"): v for k, v in row.items()}
        assert 0 < spec["verifications"] <= spec["draft_tokens"]
        assert spec["accepted_tokens"] <= spec["draft_tokens"]
        tokens = spec["verifications"] + spec["accepted_tokens"]
        assert spec["accept_length"] == tokens / spec["verifications"]
        assert spec["accept_rate"] == spec["accepted_tokens"] / spec["draft_tokens"]
    assert "Accept length" in (runs.folder / "hybrid" / "report.html").read_text()


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


def test_a_draft_is_trained_and_left(online):
    """Its loss falls, and its folder is what the last checkpoint holds."""
    summary, rows, _ = online.result
    losses = [row["draft/loss"] for row in rows[1:]]
    assert losses[-1] < losses[0] - 0.1
    assert all(row["draft/num_rows"] > 0 and row["draft/grad_norm"] > 0 for row in rows[1:])
    assert {"draft/acceptance_2", "draft/match_0", "draft/learning_rate"} < rows[1].keys()
    assert all(row["rollout/spec_verifications"] > 0 for row in online.rows[1:])
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
