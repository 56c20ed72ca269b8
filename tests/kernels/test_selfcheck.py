"""The proof at start-up: it passes here, it finds what is wrong, and it is remembered."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier, Event

import pytest
import torch
import triton
from helpers import assert_same_bits
from triton.runtime.jit import JITFunction

from samebit.kernels import selfcheck as selfcheck_module
from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import Heads
from samebit.kernels.contract import CONTRACT_VERSION, CPU_KV_TILE, LSE_SEGMENTS
from samebit.kernels.cpu import linear as cpu_linear
from samebit.kernels.cpu.linear import linear_blocked, linear_padded, use_blocked
from samebit.kernels.linear import linear
from samebit.kernels.profile import NumericsProfile, numerics_profile
from samebit.kernels.reduce import RankGroup
from samebit.kernels.selfcheck import (
    ROW_COUNTS,
    SelfCheckError,
    check_attention,
    check_rows,
    selfcheck,
    unequal_linear_shapes,
)
from samebit.rollout.models.registry import load_model_config

# The weights of a small model: qkv, projection, gate and up, down, output.
SHAPES = ((128, 48), (48, 64), (208, 48), (48, 104), (331, 48), (1024, 48))
CPU = torch.device("cpu")
rehearsal, equal = selfcheck_module._rehearsal, selfcheck_module._equal
ATTENTION = CanonicalAttention(Heads(4, 2, 16, 0.25), CPU)
WIDTHS = (48, 16, 104)


@pytest.fixture(autouse=True)
def _private_state(monkeypatch, tmp_path):
    """An empty cache, and no shape marked as blocked, for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_linear, "_blocked_shapes", set())


def cache_files(tmp_path) -> list[Path]:
    return sorted((tmp_path / "samebit" / "selfcheck").glob("*"))


@pytest.mark.parametrize("shape", [*SHAPES, (33, 100), (1, 7), (576, 192)], ids=str)
def test_blocked_equals_padded(shape):
    """The two implementations on the CPU are one operation."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(515, shape[1], generator=generator), torch.randn(shape)
    truth = linear_blocked(x, weight)
    for m in (*ROW_COUNTS, 512, 515):
        assert_same_bits(linear_padded(x[:m], weight), truth[:m], f"{m} rows")
        assert_same_bits(linear_blocked(x[:m], weight), truth[:m], f"{m} rows")


def test_shapes_of_a_model_pass():
    assert unequal_linear_shapes(SHAPES, CPU) == set()
    check_attention(ATTENTION)
    check_rows(WIDTHS, CPU)


def test_an_unpadded_product_would_be_found(monkeypatch):
    """A product that depends on the number of rows in one bit is reported, by its shape."""

    def careless(x, weight):
        y = x @ weight.t()
        return y.nextafter(y + 1) if len(x) == 5 and weight.shape[0] == 48 else y

    monkeypatch.setattr(selfcheck_module, "linear_blocked", lambda x, w: x @ w.t())
    monkeypatch.setattr(selfcheck_module, "linear_padded", careless)
    found = unequal_linear_shapes(SHAPES, CPU)
    assert {(48, 64), (48, 104)} <= found


def test_variant_attention_would_be_found(monkeypatch):
    original = ATTENTION.attend

    def careless(q, *arguments):
        y = original(q, *arguments)
        return y.nextafter(y + 1) if len(q) == 1 else y

    monkeypatch.setattr(ATTENTION, "attend", careless)
    with pytest.raises(SelfCheckError, match="length 3, chunk 1, 4/2 heads of 16"):
        selfcheck(SHAPES, ATTENTION, WIDTHS)


def test_variant_row_operations_would_be_found(monkeypatch):
    original = selfcheck_module.swiglu

    def careless(x):
        y = original(x)
        return y.nextafter(y + 1) if len(x) == 31 else y

    monkeypatch.setattr(selfcheck_module, "swiglu", careless)
    with pytest.raises(SelfCheckError, match="width 16"):
        selfcheck(SHAPES, ATTENTION, WIDTHS)


def test_variant_draws_would_be_found(monkeypatch):
    original = selfcheck_module.draw_with_logprobs

    def careless(logits, *keys):
        tokens, logprobs = original(logits, *keys)
        return tokens, logprobs.nextafter(logprobs + 1) if len(logits) == 1 else logprobs

    selfcheck(SHAPES, ATTENTION, WIDTHS, vocab_sizes=[331])
    monkeypatch.setattr(selfcheck_module, "draw_with_logprobs", careless)
    with pytest.raises(SelfCheckError, match="1 rows of 331 tokens"):
        selfcheck(SHAPES, ATTENTION, WIDTHS, vocab_sizes=[331, 333])


def test_a_failed_check_is_not_remembered(monkeypatch, tmp_path):
    with monkeypatch.context() as broken:
        broken.setattr(selfcheck_module, "swiglu", lambda x: x - x.mean(0))
        with pytest.raises(SelfCheckError):
            selfcheck(SHAPES, ATTENTION, WIDTHS)
    assert cache_files(tmp_path) == []
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    assert len(cache_files(tmp_path)) == 1


@pytest.mark.parametrize("head_dim", [6, 8, 10, 12, 16, 20, 33, 64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_check_tells_the_truth_about_head_dims(group, head_dim):
    """Attention that passes the check does not depend on where a row stands in its tile; a head
    size that this machine's BLAS cannot do so is refused, not served."""
    attention = CanonicalAttention(Heads(2 * group, 2, head_dim, 0.2), CPU)
    try:
        check_attention(attention)
    except SelfCheckError:
        assert head_dim % 4, "a usual head size is refused"
        return
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(97, n, head_dim, generator=generator) for n in (2 * group, 2, 2))
    truth = attention.attend_packed(q, k, v, attention.plan_packed((97,)))
    caches = [x[None] for x in (k, v)]  # one page
    for start in range(1, 97):
        plan = attention.plan_step([97 - start], [97], torch.zeros(1, 1, dtype=torch.int64), 97)
        found = attention.attend(q[start:], *caches, plan)
        assert_same_bits(found, truth[start:], f"last {97 - start} tokens")


def test_the_result_is_written_and_used_again(monkeypatch, tmp_path):
    """The second start-up computes nothing."""
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    [file] = cache_files(tmp_path)
    assert json.loads(file.read_text()) == {"unequal": []}
    for name in ("check_attention", "check_rows", "unequal_linear_shapes"):
        monkeypatch.delattr(selfcheck_module, name)
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    assert cache_files(tmp_path) == [file]


class OwnAttention(CanonicalAttention):
    """A kind from outside the package."""


def test_attention_of_the_users_own_is_checked_at_every_start(monkeypatch):
    """Its source may have changed under the same name."""
    own, checked = OwnAttention(ATTENTION.heads, CPU), []
    monkeypatch.setattr(selfcheck_module, "check_attention", checked.append)
    for _ in range(2):
        selfcheck(SHAPES, ATTENTION, WIDTHS)
        selfcheck(SHAPES, own, WIDTHS)
    assert checked == [ATTENTION, own, own]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"unequal": 3}'])
def test_a_damaged_cache_file_is_replaced(tmp_path, text):
    """A full disk or a crash must not keep every later engine from starting."""
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    [file] = cache_files(tmp_path)
    good = file.read_text()
    file.write_text(text)
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    assert file.read_text() == good


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, caplog):
    """A read-only home: the check runs every time, and says so."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    assert "will run again next time" in caplog.text


def test_another_model_is_checked_anew(tmp_path):
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    selfcheck(SHAPES[:3], ATTENTION, WIDTHS)
    selfcheck(SHAPES, CanonicalAttention(Heads(6, 2, 16, 0.25), CPU), WIDTHS)
    selfcheck(SHAPES, ATTENTION, (48,))
    assert len(cache_files(tmp_path)) == 4


def test_other_circumstances_are_checked_anew(tmp_path, monkeypatch):
    """What was found for one number of threads, one profile or fewer products proves no other."""
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    selfcheck(SHAPES, ATTENTION, WIDTHS, column_shards=[(48, 64, 2)])
    selfcheck(SHAPES, ATTENTION, WIDTHS, segments=[(48, 8)])
    with monkeypatch.context() as threads:
        threads.setattr(torch, "get_num_threads", lambda: 8)
        selfcheck(SHAPES, ATTENTION, WIDTHS)
    monkeypatch.setattr(selfcheck_module, "numerics_profile", lambda _device, attention: WRITTEN)
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    assert len(cache_files(tmp_path)) == 5


def test_shapes_that_failed_are_computed_by_blocks(tmp_path, caplog):
    """What the cache remembers as unequal is blocked, said aloud, and gives equal bits."""
    selfcheck(SHAPES, ATTENTION, WIDTHS)
    [file] = cache_files(tmp_path)
    x, weight = torch.randn(37, 48), torch.randn(331, 48)
    before = linear(x, weight)
    file.write_text(json.dumps({"unequal": [[331, 48]]}))
    with caplog.at_level(logging.WARNING):
        selfcheck(SHAPES, ATTENTION, WIDTHS)
    assert "(331, 48)" in caplog.text
    assert cpu_linear._blocked_shapes == {(331, 48)}
    assert_same_bits(linear(x, weight), before)


def test_parts_of_weights_are_checked_too(monkeypatch):
    """Products that tp_invariant cuts into segments have shapes of their own."""
    monkeypatch.setattr(selfcheck_module, "linear_padded", lambda x, w: linear_padded(x, w) + 1)
    selfcheck(SHAPES, ATTENTION, WIDTHS, segments=[(48, 8)])
    assert cpu_linear._blocked_shapes == {*SHAPES, (48, 8)}


def test_forced_blocks_give_equal_bits():
    """The fall-back changes speed, not a bit; gradients neither."""
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x, weight = torch.randn(129, shape[1], generator=generator), torch.randn(shape)
        before = linear(x, weight)
        use_blocked({shape})
        assert_same_bits(linear(x, weight), before, shape)


WRITTEN = NumericsProfile(
    device_type="cpu", architecture="x86_64 a 6 85 AVX2", tp_size=1, tp_invariant=False, kv_tile=64,
    kv_split=None, lse_segments=8, attention="canonical", contract_version=2,
    torch_version="2.11.0", triton_version="3.6.0",
)  # fmt: skip


def test_a_profiles_digest_is_the_same_everywhere():
    """It stands in manifests that other processes, machines and versions read."""
    assert WRITTEN.digest == "e7dd9f2ff07bd950"


OTHERS = {
    "device_type": "cuda", "architecture": "sm_90", "tp_size": 2, "tp_invariant": True,
    "kv_tile": 128, "kv_split": 512, "lse_segments": 4, "attention": "other",
    "contract_version": 3, "torch_version": "2.12.0", "triton_version": "3.7.0",
}  # fmt: skip


def test_profiles_are_told_apart():
    """By every field."""
    assert OTHERS.keys() == asdict(WRITTEN).keys()
    for name, value in OTHERS.items():
        assert replace(WRITTEN, **{name: value}).digest != WRITTEN.digest, name


def test_the_profile_of_this_process():
    """Each field against where it comes from."""
    found = asdict(numerics_profile(torch.device("cpu"), tp_size=2))
    assert found.pop("architecture").endswith(torch.backends.cpu.get_cpu_capability())
    assert found == {
        "device_type": "cpu", "tp_size": 2, "tp_invariant": False, "kv_tile": CPU_KV_TILE,
        "kv_split": None, "lse_segments": LSE_SEGMENTS, "attention": "canonical",
        "contract_version": CONTRACT_VERSION, "torch_version": torch.__version__,
        "triton_version": triton.__version__,
    }  # fmt: skip
    assert numerics_profile(torch.device("cpu"), 2, tp_invariant=True).tp_size == 1


def test_a_tensor_parallel_size_matters_unless_the_sums_are_invariant():
    def of_size(size, invariant=False):
        return numerics_profile(torch.device("cpu"), size, invariant).digest

    assert len({of_size(1), of_size(2), of_size(4), of_size(2, True)}) == 4
    assert of_size(2, True) == of_size(4, True)


def test_shards_whose_columns_have_other_bits_are_found(monkeypatch):
    """A BLAS may compute a narrow product in another way than a wide one."""
    cpu = torch.device("cpu")
    selfcheck_module.check_columns([(48, 64, 2)], cpu)
    plain = selfcheck_module.linear

    def narrow_is_other(x, weight):
        return plain(x, weight) + (1e-6 if len(weight) == 48 else 0)

    monkeypatch.setattr(selfcheck_module, "linear", narrow_is_other)
    refused = pytest.raises(SelfCheckError, match=r"48 of 96 columns .* not hold for 2 ranks")
    with refused:
        selfcheck_module.check_columns([(48, 64, 2)], cpu)
    with refused:
        selfcheck(SHAPES, ATTENTION, WIDTHS, column_shards=[(48, 64, 2)])


def test_the_shards_of_an_invariant_model_are_checked(monkeypatch, qwen3_path):
    """Those of its column-parallel weights: q, k and v, gate and up, embedding and output."""
    asked = []
    monkeypatch.setattr(
        selfcheck_module, "check_columns", lambda shards, _device: asked.extend(shards)
    )
    half = RankGroup(0, 2, group="the other half", invariant=True)
    config = load_model_config(qwen3_path)
    attention = CanonicalAttention(config.attention_heads(2), CPU)
    replace(config, ffn_size=128).selfcheck(attention, half)
    assert asked == [(64, 48, 2), (128, 48, 2), (512, 48, 2)]


def test_a_rehearsal_finds_nothing_in_its_own_thread_alone():
    """Another one that checks meanwhile sees what differs, and so does this one afterwards."""
    one, other = torch.zeros(2), torch.ones(2)
    with rehearsal(), ThreadPoolExecutor(1) as pool:
        assert equal(one, other)
        assert not pool.submit(equal, one, other).result()
    assert not equal(one, other)
    assert equal(one, one)


def test_rehearsals_of_two_threads_leave_triton_as_it_was():
    """Whichever of them ends first."""
    run, begun, ended = JITFunction.run, Barrier(2), Event()

    def first():
        with rehearsal():
            begun.wait()
        ended.set()

    def second():
        with rehearsal():
            begun.wait()
            ended.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    assert JITFunction.run is run


def test_what_breaks_a_rehearsal_is_said_and_ends_nothing(caplog):
    with rehearsal():
        raise RuntimeError("no compiler")
    assert "kernels are compiled one by one: no compiler" in caplog.text
    assert not equal(torch.zeros(1), torch.ones(1))
