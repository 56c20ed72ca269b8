"""Copies of the engine: whoever draws a group, everybody has it, in its place."""

import asyncio
import threading

import pytest
import torch
from helpers import make_prompts, outcomes

from samebit.recipes.launch import replicas
from samebit.recipes.launch.replicas import ReplicatedEngine
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

SIZE = 4
PARAMS = SamplingParams(n=2, max_new_tokens=4)


class Wire:
    """What several threads give, to each of them, in the order of their ranks."""

    def __init__(self):
        self.rank = threading.local()
        self.values, self.barrier = [None] * SIZE, threading.Barrier(SIZE)

    def gather(self, value):
        self.values[self.rank.number] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


def run_in_threads(process):
    """process(rank) for every rank at once."""
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("tensor_size", "num_prompts"), [(1, 7), (1, 2), (2, 5)])
def test_every_process_has_all_groups_in_order(qwen3_path, monkeypatch, tensor_size, num_prompts):
    """As one engine alone draws them; also where there are fewer prompts than copies."""
    engine = Engine(qwen3_path, device="cpu", seed=3, kv_cache_tokens=1024)
    prompts = make_prompts(*range(1, 1 + num_prompts))
    ids = [[100 * i + 7, 100 * i] for i in range(num_prompts)]
    expected = engine.generate(prompts, PARAMS, ids)
    wire, turn, shares = Wire(), threading.Lock(), {}
    contexts = [[1, *prompt] for prompt in prompts]
    found, scores = [None] * SIZE, [None] * SIZE
    monkeypatch.setattr(replicas, "gather_objects", wire.gather)

    class Own:
        """One process's engine, which notes what it is asked for."""

        def generate(self, prompt_ids, params, sample_ids, **asked):
            shares[wire.rank.number] = sample_ids
            with turn:
                return engine.generate(prompt_ids, params, sample_ids, **asked)

        def score(self, token_ids, temperature):
            with turn:
                return engine.score(token_ids, temperature)

    def process(rank):
        wire.rank.number = rank
        replicated = ReplicatedEngine(Own(), rank, SIZE, tensor_size)
        found[rank] = replicated.generate(prompts, PARAMS, ids)
        scores[rank] = replicated.score(contexts, 0.7)

    run_in_threads(process)

    def plain(groups):
        return [
            [
                (c.sample_id, c.token_ids, c.logprobs, c.finish_reason, c.version_spans)
                for c in group
            ]
            for group in groups
        ]

    assert [plain(groups) for groups in found] == [plain(expected)] * SIZE
    assert scores == [engine.score(contexts, 0.7)] * SIZE
    drawn = [group for rank in sorted(shares)[::tensor_size] for group in shares[rank]]
    assert sorted(drawn) == sorted(ids), "some group was drawn by two copies"


def test_copies_are_called_as_any_engine(qwen3_path, monkeypatch):
    """Parameters and ids of each prompt, hidden states; asyncio's calls in turn, with new ids."""
    engine = Engine(qwen3_path, device="cpu", seed=3, kv_cache_tokens=1024)
    prompts = make_prompts(3, 9, 4)
    params = [SamplingParams(n=n, max_new_tokens=5, ignore_eos=True) for n in (2, 1, 3)]
    wire, turn, found = Wire(), threading.Lock(), [None] * SIZE
    monkeypatch.setattr(replicas, "gather_objects", wire.gather)

    class Own:
        """One process's engine: the one that there is, when it is free."""

        def generate(self, *arguments, **asked):
            with turn:
                return engine.generate(*arguments, **asked)

    def process(rank):
        async def calls(replicated):
            replicated._in_order.submit(setattr, wire.rank, "number", rank).result()
            drawn = await asyncio.gather(
                replicated.agenerate(prompts, params), replicated.agenerate(prompts, params)
            )
            return drawn, [part async for part in replicated.stream(prompts, params)]

        wire.rank.number = rank
        replicated = ReplicatedEngine(Own(), rank, SIZE, 1)
        plain = replicated.generate(prompts, params, return_hidden_states=[1])
        found[rank] = plain, *asyncio.run(calls(replicated))
        replicated._in_order.shutdown()

    run_in_threads(process)
    truth = engine.generate(prompts, params, return_hidden_states=[1])
    for plain, (first, second), parts in found:
        assert outcomes(plain) == outcomes(truth)
        assert [c.sample_id for group in plain for c in group] == [0, 1, 2, 3, 4, 5]
        for a, b in zip(plain, truth, strict=True):
            assert all(
                torch.equal(x.hidden_states[1], y.hidden_states[1])
                for x, y in zip(a, b, strict=True)
            )
        top = (1 << 64) - 1
        for i, samples in enumerate((sum(first, []), sum(second, []), parts)):
            assert [s.sample_id for s in samples] == [top - 6 * i - k for k in range(6)]
        assert [p.finish_reason for p in parts] == ["length"] * 6
        again = engine.generate(
            prompts, params, [[top - 12, top - 13], [top - 14], [top - 15, top - 16, top - 17]]
        )
        assert [(p.token_ids, p.logprobs) for p in parts] == sum(outcomes(again), [])
