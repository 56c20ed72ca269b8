"""Cached prefixes hold keys of target and draft: none of a draft before is found."""

import torch
from helpers import make_prompts, outcomes

from samebit.recipes.verification.speculation import write_random_draft
from samebit.rollout.runtime.weights import load_dummy
from samebit.rollout.types import SamplingParams


def test_a_draft_that_overflowed_leaves_nothing(make_engine, engine, tmp_path):
    """Prompts that were cached meanwhile are guessed for as before; later ones of them are hits."""
    write_random_draft(tmp_path / "draft", engine.model_config)
    own = make_engine(
        speculative="eagle3", draft_model=str(tmp_path / "draft"), adaptive_drafts=False,
        page_size=4,
    )  # fmt: skip
    prompts = make_prompts(33, 22)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    proposer, seen = own.speculation.proposer, []
    propose = proposer.propose

    def recording(contexts):
        found = propose(contexts)
        seen.extend((c.sample.sample_id, len(c.token_ids), list(p.token_ids))
                    for c, p in zip(contexts, found, strict=True))  # fmt: skip
        return found

    proposer.propose = recording

    def draw():
        seen.clear()
        before = own.prefixes.num_hit_tokens
        drawn = [own.generate([prompt], params, [[i]]) for i, prompt in enumerate(prompts * 2)]
        return [*map(outcomes, drawn)], sorted(seen), own.prefixes.num_hit_tokens - before

    kept = {name: torch.empty_like(p) for name, p in own.draft_control.params.items()}
    load_dummy(own.draft_control.session.specs, kept, seed=7, std=0.2)
    own.copy_weights(kept, 1, selector="draft")
    tokens, guessed, hits = draw()
    huge = {name: torch.full_like(param, 3e38) for name, param in kept.items()}
    own.copy_weights(huge, 2, selector="draft")
    own.flush_cache()
    assert draw()[0] == tokens
    own.copy_weights(kept, 3, selector="draft")
    assert draw() == (tokens, guessed, hits)
    assert hits == 32 + 20
