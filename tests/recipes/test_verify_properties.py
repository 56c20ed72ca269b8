"""Every property of samebit verify tries what it is named after, and sees one bit."""

import struct
from dataclasses import replace

import pytest
import torch

from samebit.recipes.models.tiny_model import make_random_model
from samebit.recipes.verification.properties import CHUNKS, CPU_BATCH_EDGES, PROPERTIES
from samebit.recipes.verification.subject import KV_TOKENS, Subject
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

LENS, NUM_SAMPLES, NUM_NEW = (3, 16, 17, 65), 3, 3
WITHOUT = {"prefix_cache": False}
SUFFIX = {"speculative": "suffix", "adaptive_drafts": False}
SETTINGS = {
    "batch_size": [WITHOUT],
    "batch_position": [WITHOUT | {"max_num_seqs": n} for _ in range(3) for n in (256, 7)],
    "decode_batch": [{"max_num_seqs": max(CPU_BATCH_EDGES)}],
    "prefill_chunk": [WITHOUT | {"prefill_chunk": n} for n in CHUNKS]
    + [WITHOUT | {"max_batch_tokens": 37}],
    "prefix_cache": [{"page_size": n} for n in (16, 64, 64)],
    "page_size": [{"page_size": n} for n in (1, 16, 48, 128)],
    "preemption": [
        {"page_size": 16, "kv_cache_tokens": 320, "prefix_cache": cached}
        for cached in (False, True)
    ],
    "group": [{}],
    "neighbour_abort": [WITHOUT] * 2,
    "concurrent_callers": [{}],
    "restart": [{}, {}],
    "weight_update": [{}],
    "graphs_and_overlap": [{"cuda_graphs": False, "overlap": x} for x in (False, True)],
    "score": [{"prefill_chunk": n} for n in (1024, 17)],
    "trainer": [],
    "memory_release": [
        {"weights_backup": True},
        {"weights_backup": True, "speculative": "eagle3", "adaptive_drafts": False},
    ],
    "transports": [{"load_format": "none"}] * 2,  # and two in other processes
    "pauses": [WITHOUT] * 3,
    "speculation": [
        SUFFIX | {"prefill_chunk": 17, "max_num_seqs": 7},
        *(SUFFIX | {"num_draft_tokens": n, "page_size": 16} for n in (1, 5, 15)),
        SUFFIX
        | {"num_draft_tokens": 5, "page_size": 16, "max_num_seqs": 3}
        | {"adaptive_drafts": True},
        *[{"speculative": "eagle3", "adaptive_drafts": False}] * 3,
        {"speculative": "hybrid", "adaptive_drafts": False, "prefill_chunk": 17, "max_num_seqs": 7},
        *[{"speculative": x, "adaptive_drafts": False} for x in ("peagle", "hybrid")],  # a block's
    ],
    "shared_prefixes": [
        {"max_num_seqs": 512, "kv_cache_tokens": 2798, **more}
        for more in (WITHOUT | {"group_attention": False}, {})
    ],
}
"""Of the engines that each makes."""
TRIED = {
    "batch_size": (4, 4 + 2 + 2 + 1),
    "batch_position": (6, 6),
    "decode_batch": (0, 1 + len(CPU_BATCH_EDGES)),
    "prefill_chunk": (9, 9),
    "prefix_cache": (4, 6),
    "page_size": (4, 4),
    "preemption": (2, 2),
    "group": (1, 3),
    "neighbour_abort": (2, 0),
    "concurrent_callers": (1, 0),
    "restart": (2, 2),
    "weight_update": (2, 3),
    "graphs_and_overlap": (2, 2),
    "score": (2, 0),
    "trainer": (3, 1),
    "memory_release": (5, 7),
    "transports": (4, 2),
    "pauses": (5, 3),
    "speculation": (11, 11),
    "shared_prefixes": (0, 3),
}
"""How often each compares all samples, and calls Engine.generate."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A small one."""
    folder = tmp_path_factory.mktemp("model")
    make_random_model(folder, "qwen3", seed=3, tied=True, num_layers=1, vocab_size=40)
    prompts = [[(7 * i + n) % 40 for i in range(n)] for n in LENS]
    limits = ({}, {"temperature": 0.7}, {"top_k": 20}, {"temperature": 0.0})
    params = [
        SamplingParams(n=NUM_SAMPLES, max_new_tokens=NUM_NEW, ignore_eos=i < 3, **limit)
        for i, limit in enumerate(limits)
    ]
    ids = [[1000 * i + s for s in range(NUM_SAMPLES)] for i in range(len(prompts))]
    cpu = torch.device("cpu")
    engine = Engine(folder, device=cpu, seed=11, kv_cache_tokens=KV_TOKENS)
    subject = Subject(folder, cpu, prompts, params, ids, engine, [], num_new_tokens=NUM_NEW)
    subject.baseline = subject.generate(engine)
    return subject


def nudged(completion):
    """The last log-prob, one ulp off."""
    *others, last = completion.logprobs
    (bits,) = struct.unpack("<i", struct.pack("<f", last))
    (other,) = struct.unpack("<f", struct.pack("<i", bits ^ 1))
    return replace(completion, logprobs=(*others, other))


def by_items(settings):
    return sorted(settings.items())


def drawn_of_last(subject):
    """Tokens of the prompt of which a hit leaves one token."""
    return sum(len(c.token_ids) for c in subject.baseline[-1])


def drawn_with_limits(subject):
    """Tokens of prompts with limits, which are drawn once more for truncated log-probs."""
    groups = zip(subject.params, subject.baseline, strict=True)
    return sum(len(c.token_ids) for params, group in groups if params.limits for c in group)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_a_property_is_tried_and_sees_one_bit(subject, monkeypatch, check):
    """Engines of its own, as it says; each comparison notices a baseline that is one bit off."""
    made, steps, orders = [], [], []
    init, generate = Engine.__init__, Engine.generate

    def make(self, *args, **settings):
        [config] = args[1:] or [None]
        asked = settings if config is None else {"load_format": config.load_format}
        same = {"seed": 11, "kv_cache_tokens": KV_TOKENS, "attention": "canonical"}
        same |= {"load_format": "safetensors", "device": subject.device}
        same |= {"draft_model": asked.get("draft_model")}  # in a folder of its own
        made.append({k: v for k, v in asked.items() if same.get(k) != v})
        if config is None:
            assert same.keys() - {"draft_model"} <= settings.keys()
        else:
            assert config == replace(subject.engine.config, load_format="none")
        init(self, *args, **settings)

    def draw(self, prompts, *args, **kwargs):
        steps.append(self.weight_version.step)
        orders.append(tuple(map(len, prompts)))
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", make)
    monkeypatch.setattr(Engine, "generate", draw)
    baseline = [[*group] for group in subject.baseline]
    baseline[1][2] = nudged(baseline[1][2])
    result = check(replace(subject, baseline=baseline))
    name = check.__name__
    (times, num_calls), num_drawn = TRIED[name], subject.num_drawn
    assert sorted(made, key=by_items) == sorted(SETTINGS[name], key=by_items)
    assert len(orders) == num_calls
    assert result.mismatches == times, result.notes
    others = {
        "decode_batch": NUM_NEW * sum(CPU_BATCH_EDGES),
        "prefix_cache": drawn_of_last(subject),
        "trainer": 3 * drawn_with_limits(subject),
        "shared_prefixes": 2 * NUM_NEW * (1 + 2 + 3 + 1 + 2 + 3 + 1 + 2),
    }
    tried_in_part = ("preemption", "neighbour_abort", "pauses", "speculation")
    if name not in tried_in_part:  # here some cases cannot be tried
        assert result.tokens == times * num_drawn + others.get(name, 0)
    if name == "weight_update":
        assert steps[1:] == [1, 2]
    if name == "batch_position":
        assert len(set(orders)) == 3
