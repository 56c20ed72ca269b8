"""Guesses on a GPU: graphs make those of a chain of launches; steps with guesses have graphs."""

import itertools

import pytest
from helpers import make_prompts, outcomes

from samebit.recipes.verification.speculation import recall, write_random_draft
from samebit.rollout.engine import Engine
from samebit.rollout.speculative.draft_graphs import DraftGraphs
from samebit.rollout.types import SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = make_prompts(5, 16, 70, 1, 33)
LIMITS = ({"temperature": 0.0}, {}, {"temperature": 1.3, "top_p": 0.9}, {"min_p": 0.05}, {})
PARAMS = [SamplingParams(n=2, max_new_tokens=40, ignore_eos=True, **limits) for limits in LIMITS]
IDS = [[2 * i, 2 * i + 1] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def truth(qwen3_path):
    engine = Engine(qwen3_path, device="cuda", cuda_graphs=False)
    return engine.generate(PROMPTS, PARAMS, IDS)


@pytest.mark.parametrize(("num_draft_tokens", "rest"), [(1, 0), (4, 0), (4, 7), (4, 18)])
def test_graphs_of_a_draft_guess_as_launches_do(
    qwen3_path, truth, tmp_path, monkeypatch, num_draft_tokens, rest
):
    """Each chain is made both ways; some have little room, some have several new tokens, and some
    come after `rest` steps that guessed nothing and overlapped. What was drawn meanwhile is read
    then, or before it is too much, with no guess behind it."""
    engine = Engine(qwen3_path, device="cuda", cuda_graphs=False)
    write_random_draft(tmp_path / "draft", engine.model_config)
    settings = {"draft_model": str(tmp_path / "draft"), "num_draft_tokens": num_draft_tokens}
    engine = Engine(
        qwen3_path, device="cuda", speculative="eagle3", adaptive_drafts=False, **settings
    )
    proposer, by_graph, seen, read = engine.speculation.proposer, DraftGraphs.guess, [], []

    def both(graphs, chains):
        read.append(int(chains.layout.lens.max()))
        found, expected = by_graph(graphs, chains), proposer._guess(chains)
        for own, plain, room in zip(found, expected, chains.room, strict=True):
            assert own[:room].tolist() == plain[:room].tolist()
        if chains.room.any():
            seen.append(len(chains.slots))
        return found

    monkeypatch.setattr(DraftGraphs, "guess", both)
    if rest:
        plan = itertools.cycle([*[0] * rest, 4, 2, 1])
        engine.speculation.choose = lambda slots: next(plan)
    assert outcomes(engine.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    assert len(seen) >= (3 if rest else 21)
    assert not rest or max(read) > 5
    assert rest or len(set(seen)) > 2


@pytest.mark.parametrize("num_draft_tokens", [1, 5, 15])
def test_steps_with_guesses_have_graphs(qwen3_path, truth, num_draft_tokens):
    engine = Engine(
        qwen3_path,
        device="cuda",
        speculative="suffix",
        adaptive_drafts=False,
        num_draft_tokens=num_draft_tokens,
    )
    recall(engine, [completion for group in truth for completion in group])
    for _ in range(2):
        assert outcomes(engine.generate(PROMPTS, PARAMS, IDS)) == outcomes(truth)
    assert any(key.queries > 1 for key in engine.runner.graphs._graphs)
    assert engine.accept_lengths.accept_length > 1.3
