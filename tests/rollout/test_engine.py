"""The engine's public behaviour: orders, ids, seeds, stopping, scores, hidden states, caches."""

import asyncio
import math

import pytest
import torch
from helpers import assert_same_bits, outcomes

from samebit.recipes.tiny_model import make_random_model
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.transports.file import write_hf_folder
from samebit.weight_sync.types import VersionSpan

VOCAB = 331
EOS = 0


def make_prompts(*lens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lens]


PROMPTS = make_prompts(5, 70, 1, 33)
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def make_engine(qwen3_path):
    return lambda **settings: Engine(qwen3_path, **settings)


@pytest.fixture(scope="module")
def engine(make_engine):
    """One engine for the tests that leave it as it was."""
    return make_engine()


def drawn(engine, **changes):
    """One completion of the first prompt."""
    settings = {"max_new_tokens": 12, "ignore_eos": True, **changes}
    [[completion]] = engine.generate(PROMPTS[:1], SamplingParams(**settings))
    return completion


# -- order, ids and seeds ------------------------------------------------------------------------


def test_outputs_are_in_input_order(engine):
    """However the lengths differ, and so the finishing order."""
    lens = (20, 3, 11, 1)
    params = [SamplingParams(n=2, max_new_tokens=n, ignore_eos=True) for n in lens]
    groups = engine.generate(PROMPTS, params)
    assert [[len(c.token_ids) for c in group] for group in groups] == [[n, n] for n in lens]
    for i, group in enumerate(groups):
        [alone] = engine.generate([PROMPTS[i]], [params[i]], [[2 * i, 2 * i + 1]])
        assert outcomes([alone]) == outcomes([group])


def test_samples_are_in_the_order_of_their_ids(engine):
    params = SamplingParams(n=4, max_new_tokens=6, ignore_eos=True)
    ids = [[40, 3, 1 << 40, 7]]
    [group] = engine.generate(PROMPTS[:1], params, ids)
    assert [c.sample_id for c in group] == ids[0]
    [back] = engine.generate(PROMPTS[:1], params, [ids[0][::-1]])
    assert outcomes([back[::-1]]) == outcomes([group])
    assert len({c.token_ids for c in group}) == 4


def test_default_ids_are_the_running_index_and_repeat_themselves(engine):
    params = SamplingParams(n=3, max_new_tokens=6, ignore_eos=True)
    first = engine.generate(PROMPTS, params)
    assert [[c.sample_id for c in g] for g in first] == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)
    ]
    assert outcomes(engine.generate(PROMPTS, params)) == outcomes(first)
    ids = [[c.sample_id for c in g] for g in first]
    assert outcomes(engine.generate(PROMPTS, params, ids)) == outcomes(first)


def test_all_64_bits_of_a_sample_id_matter(engine):
    ids = [[0, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 63) + (1 << 32), (1 << 64) - 1]]
    params = SamplingParams(n=7, max_new_tokens=8, ignore_eos=True)
    [group] = engine.generate(PROMPTS[:1], params, ids)
    assert len({c.token_ids for c in group}) == 7
    assert [c.sample_id for c in group] == ids[0]


def test_a_request_seed_overrides_the_engine_seed(make_engine, engine):
    other = make_engine(seed=5)
    assert drawn(other).token_ids != drawn(engine).token_ids
    assert drawn(other).token_ids == drawn(engine, seed=5).token_ids
    assert drawn(other, seed=0).token_ids == drawn(engine).token_ids
    large = [drawn(engine, seed=s).token_ids for s in (1 << 32, 1 << 63, (1 << 64) - 1)]
    assert len(set(large)) == 3


def test_another_token_in_the_prompt_changes_the_draw(engine):
    """The context is part of the function: a stale cache would show here."""
    prompt = PROMPTS[1]
    altered = [(prompt[0] + 1) % VOCAB, *prompt[1:]]
    a, b = engine.generate([prompt, altered], PARAMS, [[5], [6]])
    [same] = engine.generate([altered], PARAMS, [[5]])
    assert same[0].logprobs != a[0].logprobs
    assert same[0].logprobs != b[0].logprobs


def test_no_prompts_no_completions(engine):
    assert engine.generate([]) == []
    assert engine.score([]) == []


# -- stopping ------------------------------------------------------------------------------------


def test_a_stop_token_ends_and_is_included(engine):
    free = drawn(engine)
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    stopped = drawn(engine, stop_token_ids=[7, stop])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.logprobs == free.logprobs[: first + 1]
    assert (stopped.finish_reason, free.finish_reason) == ("stop", "length")


def test_eos_ends_unless_ignored(engine):
    """Sampled until an end-of-sequence token was drawn by chance."""
    params = SamplingParams(n=40, temperature=3.0, max_new_tokens=60)
    [group] = engine.generate(PROMPTS[:1], params)
    stopped = [c for c in group if c.finish_reason == "stop"]
    assert stopped
    assert len(stopped) < 40
    for c in stopped:
        assert c.token_ids.index(EOS) == len(c.token_ids) - 1
    for c in group:
        if c.finish_reason == "length":
            assert len(c.token_ids) == 60
            assert EOS not in c.token_ids
    ignoring = SamplingParams(n=40, temperature=3.0, max_new_tokens=60, ignore_eos=True)
    [free] = engine.generate(PROMPTS[:1], ignoring)
    assert all(c.finish_reason == "length" for c in free)
    for with_eos, without in zip(group, free, strict=True):
        assert without.token_ids[: len(with_eos.token_ids)] == with_eos.token_ids


def test_no_stop_token_before_min_new_tokens(engine):
    """The stop token is not drawn early; the log-prob stays that of the full softmax."""
    stop = drawn(engine).token_ids[0]
    held = drawn(engine, stop_token_ids=[stop], min_new_tokens=6)
    assert stop not in held.token_ids[:5]
    assert len(held.token_ids) >= 6
    context = [*PROMPTS[0], *held.token_ids]
    [scores] = engine.score([context])
    assert tuple(scores[len(PROMPTS[0]) - 1 :]) == held.logprobs


def test_length_one(engine):
    one = drawn(engine, max_new_tokens=1)
    assert one.token_ids == drawn(engine).token_ids[:1]
    assert one.finish_reason == "length"


# -- sampling parameters -------------------------------------------------------------------------


def test_logprobs_false_returns_none_and_draws_the_same(engine):
    quiet = drawn(engine, logprobs=False)
    assert quiet.logprobs == ()
    assert quiet.token_ids == drawn(engine).token_ids


def test_greedy_is_the_limit_of_top_k_one(engine):
    greedy = drawn(engine, temperature=0.0)
    assert greedy.token_ids == drawn(engine, top_k=1).token_ids
    assert greedy.logprobs == drawn(engine, top_k=1).logprobs
    assert drawn(engine, temperature=0.0, seed=9).token_ids == greedy.token_ids


def test_logprobs_are_of_the_full_softmax_after_temperature(engine):
    """Not renormalised by top-k, top-p or min-p."""
    for limits in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.6}):
        completion = drawn(engine, **limits)
        context = [*PROMPTS[0], *completion.token_ids]
        [scores] = engine.score([context], limits.get("temperature", 1.0))
        assert tuple(scores[len(PROMPTS[0]) - 1 :]) == completion.logprobs


def softmax_of(engine, prompt, temperature=1.0):
    """The next token's distribution: one score per token of the vocabulary."""
    scores = engine.score([[*prompt, t] for t in range(VOCAB)], temperature)
    return torch.tensor([s[-1] for s in scores], dtype=torch.float64).exp()


def chi_square_p(counts, probs):
    """p-value of Pearson's test, rare tokens taken together."""
    expected = probs * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    ideal = torch.cat([expected[~rare], expected[rare].sum().clamp(min=1e-9)[None]])
    statistic = ((observed - ideal).square() / ideal).sum()
    return torch.special.gammaincc(torch.tensor((len(ideal) - 1) / 2).double(), statistic / 2)


@pytest.mark.parametrize(
    "limits", [{}, {"temperature": 0.6}, {"top_k": 9}, {"top_p": 0.7}, {"min_p": 0.05}], ids=str
)
def test_first_tokens_follow_the_softmax(engine, limits):
    """Chi-square of 6,000 samples' first tokens; nothing outside the allowed set."""
    probs = softmax_of(engine, PROMPTS[0], limits.get("temperature", 1.0))
    assert abs(probs.sum().item() - 1) < 1e-5
    order = probs.argsort(descending=True)
    allowed = torch.ones(VOCAB, dtype=torch.bool)
    if "top_k" in limits:
        allowed[order[9:]] = False
    if "top_p" in limits:
        allowed[order[probs[order].cumsum(0) - probs[order] >= 0.7]] = False
    if "min_p" in limits:
        allowed = probs >= 0.05 * probs.max()
    params = SamplingParams(n=6000, max_new_tokens=1, ignore_eos=True, **limits)
    [group] = engine.generate(PROMPTS[:1], params)
    tokens = torch.tensor([c.token_ids[0] for c in group])
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert not counts[~allowed].any()
    probs = probs.masked_fill(~allowed, 0.0)
    assert chi_square_p(counts, probs / probs.sum()) > 1e-3


def test_later_positions_draw_anew(engine):
    """Noise keyed by the position: the same context shape does not repeat the same token."""
    params = SamplingParams(n=200, temperature=50.0, max_new_tokens=2, ignore_eos=True)
    [group] = engine.generate(PROMPTS[:1], params)
    assert sum(c.token_ids[0] == c.token_ids[1] for c in group) < 10


# -- score, hidden states, versions ---------------------------------------------------------------


def test_score_is_generate_backwards(engine):
    groups = engine.generate(PROMPTS, PARAMS)
    contexts = [[*p, *c.token_ids] for p, [c] in zip(PROMPTS, groups, strict=True)]
    for prompt, [c], values in zip(PROMPTS, groups, engine.score(contexts), strict=True):
        assert len(values) == len(prompt) + len(c.token_ids) - 1
        assert tuple(values[len(prompt) - 1 :]) == c.logprobs
        assert all(math.isfinite(v) and v <= 0 for v in values)


def test_score_does_not_depend_on_company_or_chunks(make_engine, engine):
    sequences = make_prompts(2, 64, 65, 130, seed=3)
    together = engine.score(sequences)
    assert [engine.score([s])[0] for s in sequences] == together
    small = make_engine(prefill_chunk=13, max_batch_tokens=29, page_size=16)
    assert small.score(sequences) == together
    assert small.score(sequences) == together  # prefix hits are no use to a score


@pytest.fixture(scope="module")
def with_hidden(engine):
    """Samples with hidden states, alone."""
    return [
        engine.generate([p], PARAMS, [[i]], return_hidden_states=[0, 2, 3])[0][0]
        for i, p in enumerate(PROMPTS)
    ]


def test_hidden_states_have_a_row_for_every_context(with_hidden):
    for prompt, c in zip(PROMPTS, with_hidden, strict=True):
        assert set(c.hidden_states) == {0, 2, 3}
        for states in c.hidden_states.values():
            assert states.shape == (len(prompt) + len(c.token_ids) - 1, 48)


@pytest.mark.parametrize(
    "settings",
    [{}, {"prefill_chunk": 7, "max_batch_tokens": 20}, {"page_size": 16, "kv_cache_tokens": 112}],
    ids=str,
)
def test_hidden_states_do_not_depend_on_company(make_engine, with_hidden, settings):
    """Chunks, neighbours, preemption; and a warm prefix cache."""
    engine = make_engine(**settings)
    for _ in range(2):
        groups = engine.generate(PROMPTS, PARAMS, return_hidden_states=[0, 2, 3])
        for [found], expected in zip(groups, with_hidden, strict=True):
            assert outcomes([[found]]) == outcomes([[expected]])
            for layer, states in expected.hidden_states.items():
                assert_same_bits(found.hidden_states[layer], states, layer)


def test_hidden_states_of_samples_share_the_prompt(engine, with_hidden):
    params = SamplingParams(n=3, max_new_tokens=12, ignore_eos=True)
    [group] = engine.generate(PROMPTS[1:2], params, [[1, 50, 51]], return_hidden_states=[2])
    assert_same_bits(group[0].hidden_states[2], with_hidden[1].hidden_states[2])
    for c in group:
        assert c.hidden_states[2].shape == (70 + 12 - 1, 48)
        assert_same_bits(c.hidden_states[2][:70], group[0].hidden_states[2][:70])


def test_version_spans_name_the_weights(make_engine):
    engine = make_engine()
    before = engine.weight_version
    assert drawn(engine).version_spans == (VersionSpan(0, before),)
    halved = {name: p * 0.5 for name, p in engine.weights.items()}
    after = engine.update_weights_from_tensor(halved, step=9)
    assert (after.step, engine.weight_version) == (9, after)
    assert after.digest != before.digest
    assert drawn(engine).version_spans == (VersionSpan(0, after),)


def test_new_weights_are_served_and_old_prefixes_forgotten(make_engine):
    """As a fresh engine on the new weights would; back again gives the first bits."""
    engine = make_engine(page_size=16)
    first = outcomes(engine.generate(PROMPTS, PARAMS))
    original = {name: p.clone() for name, p in engine.weights.items()}
    doubled = {name: p * 1.5 for name, p in original.items()}
    engine.update_weights_from_tensor(doubled, step=1)
    fresh = make_engine(page_size=16)
    fresh.update_weights_from_tensor(doubled, step=1)
    second = outcomes(engine.generate(PROMPTS, PARAMS))
    assert second == outcomes(fresh.generate(PROMPTS, PARAMS)) != first
    engine.update_weights_from_tensor(original, step=2)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == first


# -- progress, steps, aborts, asyncio ---------------------------------------------------------------


def test_progress_counts_up_to_the_end(engine):
    seen = []
    params = SamplingParams(n=2, max_new_tokens=5, ignore_eos=True)
    engine.generate(PROMPTS, params, progress=lambda done, tokens: seen.append((done, tokens)))
    assert seen == sorted(seen)
    assert seen[-1] == (8, 40)
    assert len(seen) == 5


def test_an_error_in_progress_leaves_the_engine_clean(make_engine):
    engine = make_engine(prefix_cache=False)

    def interrupt(done, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS, progress=interrupt)
    assert not engine.has_unfinished_requests
    assert engine.pool.num_free == engine.pool.num_pages
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == outcomes(
        make_engine().generate(PROMPTS, PARAMS)
    )


def run_to_end(engine):
    """Completions by request id."""
    found = {}
    while engine.has_unfinished_requests:
        for group in engine.step():
            found[group[0].request_id] = group
    return found


def test_requests_join_and_leave_while_others_run(make_engine, engine):
    """add_request, step and abort_request; the bits are generate's."""
    truth = outcomes(engine.generate(PROMPTS, PARAMS))
    stepped = make_engine(prefix_cache=False)
    assert stepped.step() == []
    ids = [stepped.add_request(PROMPTS[0], PARAMS, [0])]
    stepped.step()
    ids.append(stepped.add_request(PROMPTS[1], PARAMS, [1]))
    doomed = stepped.add_request(PROMPTS[1], SamplingParams(n=3, max_new_tokens=50))
    stepped.step()
    ids += [stepped.add_request(PROMPTS[i], PARAMS, [i]) for i in (2, 3)]
    aborted = stepped.abort_request(doomed)
    assert [c.finish_reason for c in aborted] == ["abort"] * 3
    assert [len(c.token_ids) for c in aborted] == [1, 1, 1]
    found = run_to_end(stepped)
    assert outcomes([found[i] for i in ids]) == truth
    assert doomed not in found
    assert stepped.pool.num_free == stepped.pool.num_pages


def test_an_aborted_sample_is_a_prefix_of_the_whole(make_engine, engine):
    [whole] = engine.generate(PROMPTS[:1], PARAMS)
    stepped = make_engine()
    request = stepped.add_request(PROMPTS[0], PARAMS)
    for _ in range(4):
        stepped.step()
    [part] = stepped.abort_request(request)
    assert part.token_ids == whole[0].token_ids[:4]
    assert part.logprobs == whole[0].logprobs[:4]
    with pytest.raises(KeyError, match=f"no unfinished request '{request}'"):
        stepped.abort_request(request)


def test_generate_does_not_swallow_other_requests(make_engine, engine):
    """A request of add_request that finishes during generate is still step's to report."""
    truth = outcomes(engine.generate(PROMPTS[:1], PARAMS))
    mixed = make_engine()
    request = mixed.add_request(PROMPTS[0], PARAMS, [0])
    mixed.generate(PROMPTS[1:], SamplingParams(max_new_tokens=30, ignore_eos=True))
    assert outcomes([run_to_end(mixed)[request]]) == truth


def test_concurrent_callers_get_their_own(make_engine, engine):
    truth = outcomes(engine.generate(PROMPTS, PARAMS))
    shared = make_engine()

    async def together():
        calls = [shared.agenerate([p], PARAMS, [[i]]) for i, p in enumerate(PROMPTS)]
        return await asyncio.gather(*calls)

    assert outcomes([group for [group] in asyncio.run(together())]) == truth
    assert not shared.has_unfinished_requests


# -- work saved ------------------------------------------------------------------------------------


@pytest.fixture
def counted(make_engine, monkeypatch):
    """(engine, list that gets the number of tokens of every forward)."""

    def make(**settings):
        engine, sizes = make_engine(**settings), []
        original = engine.runner.forward

        def forward(batch, collect):
            sizes.append(len(batch.input_ids))
            return original(batch, collect)

        monkeypatch.setattr(engine.runner, "forward", forward)
        return engine, sizes

    return make


@pytest.mark.parametrize("cached", [True, False])
def test_one_prefill_for_all_samples_of_a_prompt(counted, cached):
    engine, sizes = counted(prefix_cache=cached)
    engine.generate([PROMPTS[1]], SamplingParams(n=8, max_new_tokens=5, ignore_eos=True))
    assert sizes == [70, 8, 8, 8, 8]


def test_a_cached_prefix_is_not_computed_again(counted):
    """Full pages are found again; at least one token is left to compute."""
    engine, sizes = counted(page_size=16)
    once = SamplingParams(max_new_tokens=1)
    engine.generate([PROMPTS[1]], once)
    engine.generate([PROMPTS[1]], once)
    assert sizes == [70, 6]
    assert engine.prefixes.num_hit_tokens == 64
    engine.generate([PROMPTS[1][:64]], once)
    assert sizes == [70, 6, 16]
    engine.generate([[*PROMPTS[1][:20], 1, 2, 3]], once)
    assert sizes == [70, 6, 16, 7]
    assert engine.prefixes.num_hit_tokens == 64 + 48 + 16
    engine.flush_cache()
    engine.generate([PROMPTS[1]], once)
    assert sizes[-1] == 70


def test_completions_are_cached_for_the_next_turn(counted):
    engine, sizes = counted(page_size=16)
    [[first]] = engine.generate([PROMPTS[1]], SamplingParams(max_new_tokens=30, ignore_eos=True))
    sizes.clear()
    engine.generate([[*PROMPTS[1], *first.token_ids, 5]], SamplingParams(max_new_tokens=1))
    assert sizes == [101 - 96]


def test_a_batch_keeps_its_token_budget(counted):
    engine, sizes = counted(max_batch_tokens=37, prefill_chunk=16)
    engine.generate(PROMPTS, PARAMS)
    assert max(sizes) <= 37
    assert sum(sizes) == sum(map(len, PROMPTS)) + 4 * 11


# -- loading ---------------------------------------------------------------------------------------


def test_sharded_folders_load_the_same(qwen3_path, engine, tmp_path):
    """Many small safetensors files with an index, and the folder an export writes."""
    folder = tmp_path / "sharded"
    version = engine.weight_version
    side = [qwen3_path / "config.json"]
    write_hf_folder(folder, engine.specs, engine.weights, version, side, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    sharded = Engine(folder)
    assert sharded.weight_version == version
    for name, weight in engine.weights.items():
        assert_same_bits(sharded.weights[name], weight, name)
    assert outcomes(sharded.generate(PROMPTS, PARAMS)) == outcomes(engine.generate(PROMPTS, PARAMS))


def test_a_folder_keeps_its_version(engine, qwen3_path, tmp_path):
    version = type(engine.weight_version)(17, engine.weight_version.digest)
    side = [qwen3_path / "config.json"]
    write_hf_folder(tmp_path / "model", engine.specs, engine.weights, version, side)
    assert Engine(tmp_path / "model").weight_version == version


def test_dummy_weights_depend_on_the_seed_alone(qwen3_path, tmp_path):
    """load_format=dummy needs a config.json only."""
    (tmp_path / "config.json").write_text((qwen3_path / "config.json").read_text())
    engines = [Engine(tmp_path, load_format="dummy", seed=s) for s in (3, 3, 4)]
    digests = [e.weight_version.digest for e in engines]
    assert digests[0] == digests[1] != digests[2]
    embedding = engines[0].get_weights_by_name("embedding.word_embeddings.weight")[:VOCAB]
    assert abs(embedding.std().item() - 0.02) < 0.001
    assert drawn(engines[0]).token_ids == drawn(engines[1]).token_ids


def test_tied_and_untied_models_of_both_kinds_run(tmp_path):
    for architecture in ("qwen3", "llama"):
        for tied in (False, True):
            path = tmp_path / f"{architecture}-{tied}"
            make_random_model(path, architecture, seed=1, tied=tied)
            engine = Engine(path)
            assert len(drawn(engine).token_ids) == 12
            assert ("output_layer.weight" in engine.weights) is not tied


def test_weights_by_name_are_copies(make_engine):
    engine = make_engine()
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    engine.get_weights_by_name(name).zero_()
    assert engine.weights[name].any()
