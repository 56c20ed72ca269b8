"""Every token, log-prob and end of an engine, drawn again by a slow program that shares no code.

It knows the contract alone: Philox on Python's integers, the Gumbel formula and the limits in fp64,
and the logits that follow in fp64 from the hidden states that the engine returns.
"""

import math

import numpy as np
import pytest
from golden.program import IDS, SAMPLING, prompts_of
from helpers import edit_config, outcomes, philox_on_integers
from safetensors.numpy import load_file

from samebit.rollout.engine import Engine
from samebit.rollout.runtime import sampler
from samebit.rollout.types import SamplingParams

MASK = (1 << 32) - 1
SEED = (9 << 32) + 4
EOS = tuple(range(0, 331, 7))
PROMPTS = prompts_of(4, 18)
CASES = {
    **SAMPLING,
    "plain": {},
    "greedy": {"temperature": 0},
    "seed zero": {"seed": 0, "top_k": 30},
    "end tokens at the first place": {"min_new_tokens": 1, "top_p": 0.9},
    "own stop tokens and no end tokens": {
        "ignore_eos": True, "min_new_tokens": 3, "stop_token_ids": range(1, 331, 2),
    },
}  # fmt: skip


def noise(seed, position, sample_id, vocab_size):
    """g of every token."""
    key, rest = (seed & MASK, seed >> 32), (position, sample_id & MASK, sample_id >> 32)
    words = [w for i in range(-(-vocab_size // 4)) for w in philox_on_integers((i, *rest), key)]
    shares = [float(np.float32(w + 1) * np.float32(2.0**-32)) for w in words[:vocab_size]]
    return [-math.inf if v == 1 else -math.log(-math.log1p(-v)) for v in shares]


def allowed(scaled, params, forbidden):
    """The tokens that may be drawn, without those of `forbidden`."""
    probs = {i: math.exp(x - scaled.max()) for i, x in enumerate(scaled) if i not in forbidden}
    order = sorted(probs, key=probs.get, reverse=True)
    kept = [i for i in order if probs[i] >= params.min_p * probs[order[0]]]
    if params.top_k:
        kept = [i for i in kept if probs[i] >= probs[order[min(params.top_k, len(order)) - 1]]]
    total, chosen = sum(probs[i] for i in kept), []
    for token in kept:
        if params.top_p == 1 or sum(probs[i] for i in chosen) < params.top_p * total:
            chosen.append(token)
    return chosen


def drawn(logits, params, seed, position, sample_id, forbidden):
    """(token, log-prob) at a position."""
    scaled = logits / (params.temperature or 1.0)
    candidates = allowed(scaled, params, forbidden)
    g = [0.0] * len(scaled) if params.temperature == 0 else noise(
        seed, position, sample_id, len(scaled)
    )  # fmt: skip
    token = max(candidates, key=lambda i: scaled[i] + g[i])
    top = scaled.max()
    return token, scaled[token] - top - math.log(sum(math.exp(x - top) for x in scaled))


def logits_of(folder, hidden):
    """[L, V] in fp64 from the residual stream after the last layer."""
    weights = load_file(folder / "model.safetensors")
    norm, table = (weights[n].astype(np.float64) for n in ("model.norm.weight", "lm_head.weight"))
    hidden = hidden.double().numpy()
    rms = np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
    return (hidden / rms * norm) @ table.T


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """(folder, engine) of a random model with many end tokens."""
    from samebit.recipes.models.tiny_model import make_random_model

    folder = tmp_path_factory.mktemp("ending")
    make_random_model(folder, "qwen3", seed=1, tied=False)
    edit_config(folder, eos_token_id=list(EOS))
    return folder, Engine(folder, seed=SEED, page_size=16, kv_cache_tokens=2048)


def test_rows_keep_their_own_parameters(ending, monkeypatch):
    """In one batch with all others; where there is so little room that sequences are preempted and
    computed again; and where logits are taken in chunks of two rows."""
    folder, engine = ending
    params = [SamplingParams(n=2, max_new_tokens=7, **case) for case in CASES.values()]
    prompts = [PROMPTS[i % 2] for i in range(len(params))]
    ids = [[own ^ (i << 20) for own in IDS[i % 2]] for i in range(len(params))]
    calls = zip(prompts, params, ids, strict=True)
    alone = [outcomes(engine.generate([p], params, [ids]))[0] for p, params, ids in calls]
    assert outcomes(engine.generate(prompts, params, ids)) == alone
    small = Engine(folder, seed=SEED, page_size=4, kv_cache_tokens=64, prefix_cache=False)
    assert outcomes(small.generate(prompts, params, ids)) == alone
    assert small.scheduler.num_preemptions > 2
    monkeypatch.setitem(sampler._MAX_LOGITS, "cpu", 2 * 331)
    assert outcomes(engine.generate(prompts, params, ids)) == alone


@pytest.mark.parametrize("name", CASES)
def test_the_engine_draws_what_the_contract_says(ending, name):
    """Whatever the parameters: token by token, the end included."""
    folder, engine = ending
    params = SamplingParams(n=2, max_new_tokens=7, **CASES[name])
    groups = engine.generate(PROMPTS, params, IDS, return_hidden_states=[3])
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    seed = SEED if params.seed is None else params.seed
    for prompt, ids, group in zip(PROMPTS, IDS, groups, strict=True):
        for sample_id, found in zip(ids, group, strict=True):
            logits = logits_of(folder, found.hidden_states[3])[len(prompt) - 1 :]
            tokens, logprobs = [], []
            while len(tokens) < 7 and not (tokens and tokens[-1] in stops):
                n = len(tokens)
                forbidden = stops if n < params.min_new_tokens else ()
                place = len(prompt) + n
                token, logprob = drawn(logits[n], params, seed, place, sample_id, forbidden)
                tokens.append(token)
                logprobs.append(logprob)
            assert list(found.token_ids) == tokens
            assert list(found.logprobs) == pytest.approx(logprobs, abs=2e-5)
            assert found.finish_reason == ("stop" if tokens[-1] in stops else "length")


def test_ids_are_the_running_index_by_default(ending):
    """And the engine's noise is that of its own seed."""
    _, engine = ending
    params = SamplingParams(n=3, max_new_tokens=4)
    given = engine.generate(PROMPTS, params, [[0, 1, 2], [3, 4, 5]])
    found = engine.generate(PROMPTS, params)
    assert [c.token_ids for g in found for c in g] == [c.token_ids for g in given for c in g]


def test_scores_are_the_log_softmax_after_temperature(ending):
    """Of the given tokens, under the logits of the token before each."""
    folder, engine = ending
    [[found]] = engine.generate(
        PROMPTS[1:], SamplingParams(temperature=0, max_new_tokens=1), return_hidden_states=[3]
    )
    logits = logits_of(folder, found.hidden_states[3])
    for temperature in (1.0, 0.5, 3.0):
        scaled = logits[:-1] / temperature
        exact = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        expected = [row[token] for row, token in zip(exact, PROMPTS[1][1:], strict=True)]
        [scores] = engine.score(PROMPTS[1:], temperature)
        assert scores == pytest.approx(expected, abs=2e-5)
