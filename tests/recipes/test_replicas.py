"""Copies of the engine: whoever draws a group, everybody has it, in its place."""

import threading

import pytest
from helpers import make_prompts

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
        return list(self.values)


@pytest.mark.parametrize(("tensor_size", "num_prompts"), [(1, 7), (1, 2), (2, 5)])
def test_every_process_has_all_groups_in_order(qwen3_path, monkeypatch, tensor_size, num_prompts):
    """As one engine alone draws them; also where there are fewer prompts than copies."""
    engine = Engine(qwen3_path, device="cpu", seed=3, kv_cache_tokens=1024)
    prompts = make_prompts(*range(1, 1 + num_prompts))
    ids = [[100 * i + 7, 100 * i] for i in range(num_prompts)]
    expected = engine.generate(prompts, PARAMS, ids)
    wire, turn, shares = Wire(), threading.Lock(), {}
    found = [None] * SIZE
    monkeypatch.setattr(replicas, "gather_objects", wire.gather)

    class Own:
        """One process's engine, which notes what it is asked for."""

        def generate(self, prompt_ids, params, sample_ids, progress):
            shares[wire.rank.number] = sample_ids
            with turn:
                return engine.generate(prompt_ids, params, sample_ids, progress=progress)

    def process(rank):
        wire.rank.number = rank
        found[rank] = ReplicatedEngine(Own(), rank, SIZE, tensor_size).generate(
            prompts, PARAMS, ids
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def plain(groups):
        return [
            [
                (c.sample_id, c.token_ids, c.logprobs, c.finish_reason, c.version_spans)
                for c in group
            ]
            for group in groups
        ]

    assert [plain(groups) for groups in found] == [plain(expected)] * SIZE
    drawn = [group for rank in sorted(shares)[::tensor_size] for group in shares[rank]]
    assert sorted(drawn) == sorted(ids), "some group was drawn by two copies"
