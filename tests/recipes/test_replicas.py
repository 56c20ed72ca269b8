"""Copies of the engine: whoever draws a group, everybody has it, in its place."""

import asyncio
import contextlib
import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import make_prompts, outcomes

from samebit.recipes.data.conversation import GenerateError, Response
from samebit.recipes.launch import replicas
from samebit.recipes.launch.replicas import ReplicatedEngine
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.rollout.values import MAX_UINT64
from samebit.trainer import ranks
from samebit.weight_sync.types import VersionSpan, WeightVersion

SIZE = 4
PARAMS = SamplingParams(n=2, max_new_tokens=4)


class Wire:
    """What several threads give, to each of them, in the order of their ranks."""

    def __init__(self):
        self.rank = threading.local()
        self.values, self.barrier = [None] * SIZE, threading.Barrier(SIZE, timeout=120)

    def gather(self, value):
        self.values[self.rank.number] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class Own:
    """One process's engine: it checks what it is asked for, and `run` draws it."""

    def __init__(self, engine, run):
        fresh = {"_ids": itertools.count(), "_fresh": itertools.count(MAX_UINT64, -1)}
        self.requests = replace(engine.requests, **fresh)
        self.loop = SimpleNamespace(run=run)


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
    found, scores, tops = [None] * SIZE, [None] * SIZE, [None] * SIZE
    monkeypatch.setattr(replicas, "gather_objects", wire.gather)

    def process_of(rank):
        def noted(requests, progress):
            if not requests[0].score_only:
                shares[rank] = [list(request.sample_ids) for request in requests]
            with turn:
                return engine.loop.run(requests, progress)

        return Own(engine, noted)

    def process(rank):
        wire.rank.number = rank
        replicated = ReplicatedEngine(process_of(rank), rank, SIZE, tensor_size)
        found[rank] = replicated.generate(prompts, PARAMS, ids)
        scores[rank] = replicated.score(contexts, 0.7)
        tops[rank] = replicated.score_top(contexts, 3, 0.7)

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
    for all_groups in tops:
        for (_, top), (_, own) in zip(all_groups, engine.score_top(contexts, 3, 0.7), strict=True):
            assert torch.equal(top.token_ids, own.token_ids)
            assert torch.equal(top.rest, own.rest)
    drawn = [group for rank in sorted(shares)[::tensor_size] for group in shares[rank]]
    assert sorted(drawn) == sorted(ids), "some group was drawn by two copies"


def test_copies_are_called_as_any_engine(qwen3_path, monkeypatch):
    """Parameters and ids of each prompt, hidden states; asyncio's calls in turn, with new ids."""
    engine = Engine(qwen3_path, device="cpu", seed=3, kv_cache_tokens=1024)
    prompts = make_prompts(3, 9, 4)
    params = [SamplingParams(n=n, max_new_tokens=5, ignore_eos=True) for n in (2, 1, 3)]
    wire, turn, found = Wire(), threading.Lock(), [None] * SIZE
    monkeypatch.setattr(replicas, "gather_objects", wire.gather)

    def drawn(requests, progress):
        with turn:  # there is one engine
            return engine.loop.run(requests, progress)

    def process(rank):
        async def calls(replicated):
            replicated._in_order.submit(setattr, wire.rank, "number", rank).result()
            drawn = await asyncio.gather(
                replicated.agenerate(prompts, params), replicated.agenerate(prompts, params)
            )
            return drawn, [part async for part in replicated.stream(prompts, params)]

        wire.rank.number = rank
        replicated = ReplicatedEngine(Own(engine, drawn), rank, SIZE, 1)
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


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt_ids": [[1], [331], [2]]}, "prompt 1: token 331"),
        ({"sampling_params": [PARAMS] * 5}, "5 sampling_params for 3 prompts"),
        ({"sample_ids": [[0, 1], [1, 2], [4, 5]]}, "sample id 1 is used twice"),
        ({"sample_ids": [[0, 1], [2, 3], [4, 5], [6, 7]]}, "come in groups"),
    ],
)
def test_what_one_copy_refuses_all_do(qwen3_path, monkeypatch, asked, message):
    """None waits for one that is not coming; its own share might be right."""
    engine = Engine(qwen3_path, device="cpu", seed=3, kv_cache_tokens=1024)
    arguments = {"prompt_ids": [[1], [2], [3]], "sampling_params": PARAMS}

    def nobody(value):
        raise AssertionError("it waits for the others")

    monkeypatch.setattr(replicas, "gather_objects", nobody)
    for rank in range(SIZE):
        replicated = ReplicatedEngine(Own(engine, engine.loop.run), rank, SIZE, 1)
        with pytest.raises(ValueError, match=message):
            replicated.generate(**arguments | asked)
        with pytest.raises(ValueError, match=message):
            asyncio.run(replicated.agenerate(**arguments | asked))


@pytest.mark.parametrize(("tensor_size", "count"), [(1, 7), (1, 2), (2, 5)])
def test_what_copies_make_of_their_shares_is_everybodys(monkeypatch, tensor_size, count):
    """In order, whoever made it; a failure on one is a failure on all."""
    wire, found, led = Wire(), [None] * SIZE, []
    for module in (replicas, ranks):
        monkeypatch.setattr(module, "gather_objects", wire.gather)
    monkeypatch.setattr(ranks, "place", lambda: (wire.rank.number, SIZE))
    span = VersionSpan(2, WeightVersion(3, "f"))

    def response(item):
        given = {"logprobs": (-0.5,), "loss_mask": (True,), "version_spans": (span,)}
        given |= {"request_id": "", "finish_reason": "stop"}
        return Response(sample_id=item, token_ids=(item,), num_turns=item, **given)

    def work(engine, items):
        led.append(engine.rank)
        return [response(item) for item in items]

    def fails(engine, items):
        if engine.rank == tensor_size:
            raise GenerateError("mine")
        return work(engine, items)

    def process(rank):
        wire.rank.number = rank
        following = SimpleNamespace(rank=rank, leading=contextlib.nullcontext, follow=lambda: None)
        replicated = ReplicatedEngine(following, rank, SIZE, tensor_size)
        found[rank] = replicated.shared(range(count), work, GenerateError)
        with pytest.raises(GenerateError, match=f"^mine$|^rank {tensor_size}: mine$"):
            replicated.shared(range(count), fails, GenerateError)
        replicated._in_order.shutdown()

    run_in_threads(process)
    assert found == [[response(item) for item in range(count)]] * SIZE
    assert set(led) == set(range(0, SIZE, tensor_size))
