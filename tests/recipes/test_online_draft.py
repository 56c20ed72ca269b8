"""GRPO runs that speculate: the same runs, with what the guesses came to beside them."""

import pytest

from samebit.recipes.run.metrics import is_repeated, read_rows
from samebit.recipes.verification.speculation import write_random_draft
from samebit.rollout.models.registry import load_model_config


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
