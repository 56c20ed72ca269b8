"""What is guessed by a draft, and how much by what was right."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_prompts

from samebit.recipes.verification.speculation import write_random_draft
from samebit.rollout.config import SPECULATIVE
from samebit.rollout.runtime.drafts import Drafts
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.speculative.registry import PROPOSERS
from samebit.rollout.types import SamplingParams


def test_names_are_those_of_the_settings():
    assert ("none", *PROPOSERS) == SPECULATIVE


def test_rows_hold_up_to_the_first_wrong_guess_or_end():
    drafts = Drafts(np.array([2, 0, 3]), np.array([5, 6, 7, 8, 9]))
    drawn = np.array([5, 1, 1, 4, 7, 8, 9, 3])
    ends = np.zeros(8, dtype=bool)
    assert drafts.holding(drawn, ends).tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert drafts.counts(drafts.holding(drawn, ends)).tolist() == [2, 1, 4]
    ends[5] = ends[3] = True
    assert drafts.holding(drawn, ends).tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
    found = AcceptLengths.none(4)
    for counts in ([2, 1, 4], [1, 1, 1]):
        found = found.plus(drafts, np.array(counts))
    assert (found.verifications, found.tokens) == (4, 8)
    assert (found.guessed, found.right) == ((4, 4, 2, 0), (2, 1, 1, 0))
    assert (found.accept_length, found.acceptance[:3]) == (2.0, (0.5, 0.25, 0.5))


@pytest.mark.parametrize("rest", [0, 3, 16, 40])
@pytest.mark.parametrize(
    ("speculative", "options"), [("eagle3", {}), ("peagle", {"mask_token_id": 5})]
)
def test_guesses_are_the_unrolled_drafts(make_engine, engine, tmp_path, speculative, options, rest):
    """Each guess is what training unrolls on the target's streams: over chunks of prompts, samples
    that wait for slots, and tokens of which some were guessed; also where `rest` steps in a row
    have guessed nothing, planned while others were in flight."""
    from samebit.trainer.draft.ttt import unroll

    write_random_draft(tmp_path / "draft", engine.model_config, **options)
    prompts, passes = make_prompts(5, 70, 33), 3
    params = SamplingParams(max_new_tokens=9 + 2 * rest, temperature=0.0, ignore_eos=True)
    own = make_engine(
        speculative=speculative, draft_model=str(tmp_path / "draft"), adaptive_drafts=False,
        prefix_cache=False, num_draft_tokens=passes, prefill_chunk=17, max_num_seqs=2,
        overlap=rest > 0,
    )  # fmt: skip
    proposer, seen = own.speculation.proposer, []
    passed = proposer._passes
    propose = proposer.propose

    def recording(contexts):
        found = propose(contexts)
        seen.extend((c.sample.sample_id, c.token_ids.tolist(), p.token_ids)
                    for c, p in zip(contexts, found, strict=True))  # fmt: skip
        return found

    proposer.propose = recording
    if rest:
        plan = itertools.cycle([*[0] * rest, passes, passes])
        own.speculation.choose = lambda slots: next(plan)
    own.generate(prompts, params, [[0], [1], [2]])
    layers = own.speculation.proposer.streams
    truth = engine.generate(prompts, params, [[0], [1], [2]], return_hidden_states=layers)
    vocabulary = own._draft.vocabulary.token_ids
    assert sum(len(ids) == passes for _, _, ids in seen) > (4 if rest else 9)
    for sample_id, token_ids, ids in seen:
        if not ids:
            continue
        column, input_ids = len(token_ids) - 2, torch.tensor([*token_ids, *ids])
        streams = {
            layer: torch.zeros(len(input_ids), stream.shape[1])
            for layer, stream in truth[sample_id][0].hidden_states.items()
        }
        for layer, stream in truth[sample_id][0].hidden_states.items():
            streams[layer][: column + 1] = stream[: column + 1]
        batch = SimpleNamespace(
            input_ids=input_ids,
            positions=torch.arange(len(input_ids)),
            seq_lens=[len(input_ids)],
        )
        data = SimpleNamespace(batch=batch, streams=streams)
        with torch.no_grad():
            draft, table = passed._model(), passed._rope_table
            finals = unroll(draft, data, len(ids), table)
            best = [int(draft.logits(f[column : column + 1]).argmax()) for f in finals]
        assert [int(vocabulary[i]) for i in best] == list(ids)


def test_hybrid_takes_what_guesses_longer(make_engine, engine, tmp_path):
    """Suffix where it has matched more than the draft guesses, and knows as much to follow."""
    write_random_draft(tmp_path / "draft", engine.model_config)
    own = make_engine(
        speculative="hybrid", draft_model=str(tmp_path / "draft"), adaptive_drafts=False,
        num_draft_tokens=9,
    )  # fmt: skip
    hybrid, seen = own.speculation.proposer, []
    propose, matches, drafted = hybrid.propose, hybrid.suffix.matches, hybrid.eagle3.propose
    parts = []

    def noting(call):
        def noted(contexts):
            found = call(contexts)
            parts.extend([contexts, found])
            return found

        return noted

    def recording(contexts):
        parts.clear()
        found = propose(contexts)
        seen.extend(zip(*parts, found, strict=True))
        return found

    hybrid.propose = recording
    hybrid.suffix.matches, hybrid.eagle3.propose = noting(matches), noting(drafted)
    params = SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    for _ in range(2):  # the second time as is kept of the first
        own.generate(make_prompts(3, 1), params, [[0], [1]])
    taken = {"suffix": 0, "draft": 0}
    for context, (token_ids, length), asked, draft, proposal in seen:
        drawn = len(context.token_ids) - context.sample.prompt_len
        longer = len(token_ids) == context.room < length and min(length, drawn) >= 4
        assert asked.room == (0 if longer else context.room)
        ids = token_ids if longer or not draft.token_ids else draft.token_ids
        assert [*proposal.token_ids] == [*ids]
        taken["suffix" if longer else "draft"] += bool(ids)
    assert min(taken.values()) > 9, taken
