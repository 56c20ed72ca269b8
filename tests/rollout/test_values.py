"""Arguments of a wrong type: one line with their name, before anything runs; and ids by default."""

import asyncio
import re

import numpy as np
import pytest
import torch
from helpers import make_prompts, outcomes

from samebit.kernels.rope import rope_table
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

INTEGERS = ("n", "top_k", "max_new_tokens", "min_new_tokens")
NUMBERS = ("temperature", "top_p", "min_p")
PROMPTS = make_prompts(3, 5)


def refuses(call, *arguments, message, **keywords):
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [None, "1", 1.0, True, [1], 1j, torch.tensor([1, 2])], ids=str)
def test_sampling_integers(name, value):
    refuses(
        SamplingParams, message=rf"SamplingParams\.{name} is .*; it must be an integer",
        **{name: value},
    )  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [None, "1", b"1", 1j, [1.0], True, np.ones(1), torch.ones(2), 10**400], ids=str
)
def test_sampling_numbers(name, value):
    refuses(
        SamplingParams, message=rf"SamplingParams\.{name} is .*; it must be a number",
        **{name: value},
    )  # fmt: skip


@pytest.mark.parametrize("value", ["12", b"12", None, 3, 1.5, {3: 4}], ids=str)
def test_stop_tokens_that_are_no_list(value):
    message = rf"SamplingParams\.stop_token_ids is {re.escape(repr(value))}; it must be a list"
    refuses(SamplingParams, message=message, stop_token_ids=value)


def test_stop_tokens_of_a_wrong_type():
    message = r"SamplingParams\.stop_token_ids: token is 'a'; it must be an integer"
    refuses(SamplingParams, message=message, stop_token_ids=["a"])
    for value in ("yes", None, 2):
        message = f"ignore_eos is {value!r}; it must be True or False"
        refuses(SamplingParams, message=message, ignore_eos=value)


def test_scalars_of_libraries():
    """numpy's and torch's are plain numbers afterwards."""
    for scalar in (np.float32, np.float64, torch.tensor):
        params = SamplingParams(temperature=scalar(0.5), top_p=scalar(0.25), min_p=scalar(0))
        assert (params.temperature, params.top_p, params.min_p) == (0.5, 0.25, 0.0)
    for scalar in (np.int32, np.uint8, torch.tensor):
        params = SamplingParams(n=scalar(2), seed=scalar(7), top_k=scalar(3))
        assert (params.n, params.seed, params.top_k) == (2, 7, 3)
        assert type(params.n) is int
    for stops in (
        [3, 4],
        (3, 4),
        range(3, 5),
        np.array([3, 4]),
        torch.tensor([3, 4]),
        iter((3, 4)),
    ):
        assert SamplingParams(stop_token_ids=stops).stop_token_ids == (3, 4)
    assert SamplingParams(ignore_eos=np.bool_(True), logprobs=0).ignore_eos is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": None}, "engine.seed is None; it must be an integer"),
        ({"seed": 0.5}, "engine.seed is 0.5"),
        ({"page_size": "16"}, "engine.page_size is '16'; it must be an integer"),
        ({"kv_cache_tokens": 1e4}, "engine.kv_cache_tokens is 10000.0; it must be an integer"),
        ({"max_model_len": 64.0}, "engine.max_model_len is 64.0"),
        ({"max_num_seqs": True}, "engine.max_num_seqs is True"),
        ({"prefix_cache": "no"}, "engine.prefix_cache is 'no'; it must be True or False"),
        ({"overlap": 2}, "engine.overlap is 2; it must be True or False"),
        ({"cuda_graphs": "x"}, "engine.cuda_graphs is 'x'"),
        ({"load_format": ["dummy"]}, "engine.load_format is"),
        ({"attention": ["canonical"]}, "engine.attention is"),
        ({"attention": "flash"}, r"engine.attention is 'flash'; it must be one of \('canonical'"),
        ({"dtype": 32}, "dtype is 32; the numerics contract"),
        ({"dtype": "nonsense"}, "dtype is nonsense; the numerics contract"),
        ({"ranks": 2}, "Engine ranks is 2; it must be RankGroup"),
    ],
    ids=str,
)
def test_engine_settings(make_engine, settings, message):
    refuses(make_engine, message=message, **settings)


@pytest.mark.parametrize("device", ["tpu", "meta", "mps", 1.5, object, ["cpu"]], ids=str)
def test_devices(make_engine, device):
    with pytest.raises(RuntimeError, match=r"device is '.*'; it must be cpu or cuda"):
        make_engine(device=device)


BAD_CALLS = [
    (("12",), "prompt_ids is '12'; it must be a list of prompts, each a list of token ids"),
    ((None,), "prompt_ids is None; it must be a list of prompts"),
    ((5,), "prompt_ids is 5; it must be a list of prompts"),
    (({1: 2},), "prompt_ids is {1: 2}; it must be a list of prompts"),
    (([1, 2],), "prompt 0 is 1; it must be a list of token ids"),
    ((np.array([1, 2]),), r"prompt 0 is np.int64\(1\); it must be a list of token ids"),
    ((torch.tensor([1, 2]),), r"prompt 0 is tensor\(1\); it must be a list of token ids"),
    ((["12"],), "prompt 0 is '12'; it must be a list of token ids"),
    (([b"12"],), "prompt 0 is b'12'; it must be a list of token ids"),
    (([[1, "2"]],), "prompt 0: token '2' at position 1 is not an integer"),
    (([[1], [1, None]],), "prompt 1: token None at position 1 is not an integer"),
    (([[1, True]],), "prompt 0: token True at position 1 is not an integer"),
    (([np.array([1.0])],), "prompt 0: token .*1.0.* at position 0 is not an integer"),
    ((torch.ones(1, 2),), r"prompt 0: token tensor\(1.\) at position 0 is not an integer"),
    ((PROMPTS, {"n": 2}), "sampling_params is {'n': 2}; it must be SamplingParams, or a list"),
    ((PROMPTS, "x"), "sampling_params is 'x'; it must be SamplingParams"),
    ((PROMPTS, [SamplingParams(), 3]), "sampling_params 1 is 3; it must be SamplingParams"),
    ((PROMPTS, None, [0, 1]), "sample_ids is 0; it must be a list of n ids for each prompt"),
    ((PROMPTS, None, "01"), "sample_ids is '01'; it must be a list of n ids for each prompt"),
    ((PROMPTS, None, ["0", "1"]), "sample_ids is '0'; it must be a list of n ids"),
    ((PROMPTS, None, [[[0]], [[1]]]), r"sample id is \[0\]; it must be an integer"),
    ((PROMPTS, None, [[None], [1]]), "sample id is None; it must be an integer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=lambda x: str(x)[:30])
def test_arguments_of_generate(engine, arguments, message):
    refuses(engine.generate, *arguments, message=message)
    with pytest.raises(ValueError, match=message):
        asyncio.run(engine.agenerate(*arguments))
    assert not engine.has_unfinished_requests


def test_arguments_of_score_and_layers(engine):
    for value in ("1", None, True):
        message = f"score temperature is {value!r}; it must be a number"
        refuses(engine.score, PROMPTS, value, message=message)
    refuses(engine.score, [1, 2], message="score sequence 0 is 1; it must be a list of token ids")
    refuses(engine.score, "12", message="token_ids is '12'; it must be a list of prompts")
    message = "return_hidden_states is 1; it must be a list of layers"
    refuses(engine.generate, PROMPTS, message=message, return_hidden_states=1)


def test_arrays_are_prompts(engine):
    """As rows of one array or tensor, or one by one; ids too."""
    params = SamplingParams(max_new_tokens=3)
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = outcomes(engine.generate(rows, params))
    for prompts in (np.array(rows), torch.tensor(rows), [np.array(r) for r in rows], tuple(rows)):
        assert outcomes(engine.generate(prompts, params, np.array([[0], [1]]))) == expected
    assert engine.score(np.array(rows)) == engine.score(rows)


def test_concurrent_calls_for_one_prompt_draw_different_samples(make_engine):
    """Without ids: by agenerate and add_request, each time anew; generate repeats itself."""
    engine = make_engine()
    params = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True)

    async def four():
        return await asyncio.gather(*(engine.agenerate(PROMPTS[:1], params) for _ in range(4)))

    groups = [group for [group] in asyncio.run(four())]
    for _ in range(2):
        engine.add_request(PROMPTS[0], params)
    while engine.has_unfinished_requests:
        groups += engine.step()
    drawn = [completion for group in groups for completion in group]
    assert len({completion.token_ids for completion in drawn}) == len(drawn) == 12
    assert {c.sample_id for c in drawn} == {(1 << 64) - 1 - i for i in range(12)}
    again = SamplingParams(n=12, max_new_tokens=8, ignore_eos=True)  # by their ids
    [repeated] = engine.generate(PROMPTS[:1], again, [[c.sample_id for c in drawn]])
    assert [c.token_ids for c in repeated] == [c.token_ids for c in drawn]
    once, twice = (outcomes(engine.generate(PROMPTS, params)) for _ in range(2))
    assert once == twice


@pytest.mark.parametrize(
    ("head_dim", "theta", "scaling"),
    [
        (128, 1e6, None),
        (34, 1e4, {"rope_type": "linear", "factor": 4.0}),
    ],
)
def test_a_shorter_table_holds_the_same_angles(head_dim, theta, scaling):
    whole = rope_table(head_dim, theta, 4099, scaling)
    for rows in (1, 2, 7, 33, 1000, 2049, 4098):
        assert torch.equal(rope_table(head_dim, theta, rows, scaling), whole[:rows])


def test_tables_are_no_longer_than_what_can_come(make_engine):
    """Of a model for a million positions they would take a gigabyte."""
    engine = make_engine(max_model_len=100)
    assert engine.runner.model.rope_table.shape == (100, 16)
    assert make_engine(kv_cache_tokens=128).runner.model.rope_table.shape == (128, 16)
    [[completion]] = engine.generate([[1] * 40], SamplingParams(max_new_tokens=60, ignore_eos=True))
    [[longer]] = make_engine().generate(
        [[1] * 40], SamplingParams(max_new_tokens=60, ignore_eos=True)
    )
    assert completion.token_ids == longer.token_ids
    assert completion.logprobs == longer.logprobs
    engine.bind_weights(engine.weights)
    assert engine.runner.model.rope_table.shape == (100, 16)


def test_a_path_may_be_text(qwen3_path):
    assert Engine(str(qwen3_path), max_model_len=8, kv_cache_tokens=64).max_model_len == 8
