"""A check on the machine at hand that all implementations of an operation give the same bits.

The contract rests on observations of some libraries and chips; others may differ. So the engine
runs this check at start-up for the model's own shapes and remembers the result. Where the fast path
fails, the one that keeps the contract by construction is used, and a warning says so.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from samebit.kernels.attention_inputs import attention_inputs, attention_inputs_ref
from samebit.kernels.attention_kind import AttentionKind, Heads
from samebit.kernels.cpu.linear import linear_blocked, linear_padded, use_blocked
from samebit.kernels.linear import linear
from samebit.kernels.profile import numerics_profile
from samebit.kernels.rms_norm import add_rms_norm, rms_norm
from samebit.kernels.rope import rope_table
from samebit.kernels.sample import draw_with_logprobs
from samebit.kernels.swiglu import swiglu, swiglu_linear

logger = logging.getLogger(__name__)

ROW_COUNTS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 128, 129, 256, 511)
GPU_ROW_COUNTS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 384, 512, 1024)


class SelfCheckError(RuntimeError):
    """An operation without an alternative broke the contract on this machine."""


def _cache_file(key: object) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return root / "samebit" / "selfcheck" / f"{name}.json"


def _randn(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.randn(shape, generator=generator).to(device, dtype)


_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two results are; while kernels are only compiled there are none, and nobody asks."""
    return _rehearsing.get() or torch.equal(a, b)


@contextmanager
def _rehearsal() -> Iterator[None]:
    """In the block the checks' kernels are compiled, all at once, and nothing is found."""
    from samebit.kernels.gpu.compile_ahead import compiling_ahead

    token = _rehearsing.set(True)
    try:
        with compiling_ahead():
            yield
    except Exception as error:  # noqa: BLE001 - it only saves time: the check itself comes next
        logger.warning("kernels are compiled one by one: %s", error)
    finally:
        _rehearsing.reset(token)


def unequal_linear_shapes(
    shapes: Iterable[tuple[int, int]], device: torch.device
) -> set[tuple[int, int]]:
    """The weight shapes (N, K) at which the fast product differs from the one by construction."""
    differs = _cpu_differs if device.type == "cpu" else _gpu_differs
    return {shape for shape in shapes if differs(shape, device)}


def _cpu_differs(shape: tuple[int, int], device: torch.device) -> bool:
    weight = _randn(*shape, device=device)
    x = _randn(ROW_COUNTS[-1], shape[1], device=device, seed=1)
    truth = linear_blocked(x, weight)
    return any(not _equal(linear_padded(x[:m], weight), truth[:m]) for m in ROW_COUNTS)


def _gpu_differs(shape: tuple[int, int], device: torch.device) -> bool:
    """Whether an implementation that kernels/gpu/tuning.py chooses gives other bits than Triton."""
    from samebit.kernels.gpu import cublaslt
    from samebit.kernels.gpu.linear import linear_triton, product

    weight = torch.randn(shape, device=device).to(torch.bfloat16)
    x = torch.randn(GPU_ROW_COUNTS[-1], shape[1], device=device).to(torch.bfloat16)
    try:
        for out_dtype in (torch.bfloat16, torch.float32):
            truth, found = (
                torch.empty(len(x), shape[0], dtype=out_dtype, device=device) for _ in range(2)
            )
            linear_triton(x, weight, truth)
            for m in GPU_ROW_COUNTS:
                product(x[:m], weight, found[:m])
                if not _equal(found[:m], truth[:m]):
                    return True
                gated = shape[0] % 2 == 0 and out_dtype == torch.bfloat16
                if gated and not _equal(swiglu_linear(x[:m], weight), swiglu(truth[:m])):
                    return True
    except cublaslt.CublasLtError as error:
        logger.warning("linear: %s", error)
        return True
    return False


def _gpu_segments_differ(shape: tuple[int, int], device: torch.device) -> bool:
    """Whether linear_in_segments of two parts of this shape gives other bits than Triton's sum."""
    from samebit.kernels.gpu import cublaslt
    from samebit.kernels.gpu.linear import linear_in_segments, linear_triton

    (n, k), rows = shape, GPU_ROW_COUNTS[-1]
    weight = torch.randn(n, 2 * k, device=device).to(torch.bfloat16)
    x = torch.randn(rows, 2 * k, device=device).to(torch.bfloat16)
    parts = [torch.empty(rows, n, device=device) for _ in range(2)]
    for a, b, y in zip(x.chunk(2, 1), weight.chunk(2, 1), parts, strict=True):
        linear_triton(a, b, y)
    truth = parts[0] + parts[1]
    try:
        found = ((m, linear_in_segments(x[:m], weight, 2)) for m in GPU_ROW_COUNTS)
        return any(not _equal(y, truth[:m]) for m, y in found)
    except cublaslt.CublasLtError as error:
        logger.warning("linear_in_segments: %s", error)
        return True


def check_fused(heads: Heads, widths: Iterable[int], device: torch.device) -> None:
    """Raise SelfCheckError unless the fused row operations give the bits of the single ones."""
    num_heads, num_kv_heads, head_dim, _ = heads
    same = True
    for width in widths:
        x, residual = (_randn(67, width, device=device, seed=s) for s in (0, 1))
        weight = _randn(width, device=device, seed=2)
        normed, total = add_rms_norm(x, residual, weight, 1e-6)
        same &= _equal(total, residual + x)
        same &= _equal(normed, rms_norm(residual + x, weight, 1e-6))
    shape = (5, 16, num_kv_heads, head_dim)
    qkv = _randn(67, (num_heads + 2 * num_kv_heads) * head_dim, device=device)
    norms = (_randn(head_dim, device=device), _randn(head_dim, device=device, seed=1))
    table = rope_table(head_dim, 10000.0, 128, device=device)
    positions, kv_slots = (torch.arange(n, 67 + n, device=device) for n in (9, 3))
    for used in (norms, None):
        outputs = []
        for operation in (attention_inputs, attention_inputs_ref):
            caches = [torch.zeros(shape, dtype=qkv.dtype, device=device) for _ in range(2)]
            q = operation(qkv, used, 1e-6, table, positions, kv_slots, *caches)
            outputs.append((q, *caches))
        same &= all(_equal(a, b) for a, b in zip(*outputs, strict=True))
    if not same:
        raise SelfCheckError(
            f"fused row operations differ from the single ones on this machine: {widths=}, "
            f"{num_heads}/{num_kv_heads} heads of {head_dim}"
        )


def check_attention(attention: AttentionKind) -> None:
    """Raise SelfCheckError unless decode, chunks, shared prefixes and the packed forward agree."""
    (num_heads, num_kv_heads, head_dim, _), device = attention.heads, attention.device
    lens, page_size = (3, 64, 65, 150, 1100), 64
    q = _randn(sum(lens), num_heads, head_dim, device=device)
    k, v = (_randn(sum(lens), num_kv_heads, head_dim, device=device, seed=s) for s in (1, 2))
    truth = attention.attend_packed(q, k, v, attention.plan_packed(lens)).split(lens)
    num_pages = -(-max(lens) // page_size)
    for length, q_L, k_L, v_L, truth_L in zip(
        lens, q.split(lens), k.split(lens), v.split(lens), truth, strict=True
    ):
        shape = (2, num_pages, page_size, num_kv_heads, head_dim)
        caches = torch.full(shape, float("nan"), dtype=q.dtype, device=device)
        caches[0].view(-1, num_kv_heads, head_dim)[:length] = k_L
        caches[1].view(-1, num_kv_heads, head_dim)[:length] = v_L
        table = torch.arange(num_pages)[None]
        for chunk in (1, 2, 16, 17, 150):
            start = max(0, length - chunk)
            plan = attention.plan_step([length - start], [length], table, page_size)
            output = attention.attend(q_L[start:], caches[0], caches[1], plan)
            if not _equal(output, truth_L[start:]):
                raise SelfCheckError(
                    f"attention is not invariant on this machine: length {length}, chunk {chunk}, "
                    f"{num_heads}/{num_kv_heads} heads of {head_dim}"
                )
    _check_shared_prefixes(attention, q_L, caches, length, truth_L)


def _check_shared_prefixes(
    attention: AttentionKind, q: Tensor, caches: Tensor, length: int, truth: Tensor
) -> None:
    """Contexts of all lengths from 641 on that begin alike, decoded as groups that share 640 and
    each by itself."""
    page_size, first = caches.shape[2], 641
    lens = range(first, length + 1)
    table = torch.arange(caches.shape[1]).repeat(len(lens), 1)
    q, truth, heads = q[first - 1 :], truth[first - 1 :], attention.heads
    for least, what in ((1, "that share a prefix"), (None, "in large batches")):
        before, attention.least_shared_bytes = attention.least_shared_bytes, least
        try:
            plan = attention.plan_step([1] * len(lens), lens, table, page_size)
        finally:
            attention.least_shared_bytes = before
        if not _equal(attention.attend(q, caches[0], caches[1], plan), truth):
            raise SelfCheckError(
                f"attention of samples {what} is not invariant on this machine: "
                f"{heads.num_heads}/{heads.num_kv_heads} heads of {heads.head_dim}"
            )


def check_rows(widths: Iterable[int], device: torch.device) -> None:
    """Raise SelfCheckError unless rms_norm and swiglu treat each row by itself."""
    for width in widths:
        x = _randn(67, 2 * width, device=device)
        weight = torch.ones(width, dtype=x.dtype, device=device)
        norm, gate = rms_norm(x[:, :width], weight, 1e-6), swiglu(x)
        for rows in (1, 2, 5, 31, 66):
            same_norm = _equal(rms_norm(x[:rows, :width], weight, 1e-6), norm[:rows])
            if not (same_norm and _equal(swiglu(x[:rows]), gate[:rows])):
                raise SelfCheckError(f"row operations are not invariant here: width {width}")


def check_draws(vocab_sizes: Iterable[int], device: torch.device) -> None:
    """Raise SelfCheckError unless a row's token and log-prob do not depend on other rows."""
    count = 72 if device.type == "cuda" else 9  # there a large batch has a kernel of its own
    for vocab_size in vocab_sizes:
        logits = _randn(count, vocab_size, device=device).float()
        temperature = torch.linspace(0.5, 2.0, count, device=device)
        keys = (torch.arange(n, n + count, device=device) for n in (0, 7, 5))
        inputs = (logits, temperature, *keys, temperature > 1.8)
        tokens, logprobs = draw_with_logprobs(*inputs)
        for rows in (1, 9):
            one, two = draw_with_logprobs(*(x[:rows] for x in inputs))
            if not (_equal(one, tokens[:rows]) and _equal(two, logprobs[:rows])):
                raise SelfCheckError(
                    f"draws are not invariant on this machine: {rows} rows of {vocab_size} tokens"
                )


def check_columns(shards: Iterable[tuple[int, int, int]], device: torch.device) -> None:
    """Raise SelfCheckError unless a shard's product gives the columns of the whole weight's.

    shards: (N, K, size) of column-parallel weights, N that of one of `size` ranks.
    """
    for n, k, size in shards:
        x, weight = _randn(67, k, device=device), _randn(n * size, k, device=device, seed=1)
        parts = [linear(x, part.contiguous()) for part in weight.chunk(size)]
        if not _equal(torch.cat(parts, 1), linear(x, weight)):
            raise SelfCheckError(
                f"products with {n} of {n * size} columns differ from the whole product's on this "
                f"machine: tp_invariant does not hold for {size} ranks"
            )


@torch.no_grad()
def selfcheck(
    linear_shapes: Iterable[tuple[int, int]],
    attention: AttentionKind,
    widths: Iterable[int],
    column_shards: Iterable[tuple[int, int, int]] = (),
    segments: Iterable[tuple[int, int]] = (),
    vocab_sizes: Iterable[int] = (),
) -> None:
    """Check a model's operations on attention's device and select implementations accordingly.

    linear_shapes: (N, K) of every weight; widths: row lengths of norms and activations;
    column_shards: see check_columns; segments: (N, K) of the parts that linear_in_segments cuts
    weights into; vocab_sizes: of the models that draw. Raises SelfCheckError where nothing that
    keeps the contract is left.
    """
    device = attention.device
    segments, widths = sorted(set(segments)), sorted(set(widths))
    shapes = sorted({*linear_shapes, *segments})
    shards, vocabularies = sorted(set(column_shards)), sorted(set(vocab_sizes))
    profile = numerics_profile(device, attention=type(attention))
    key: list[object] = [profile.digest, torch.get_num_threads(), _source_digest()]
    key += [shapes, list(attention.heads), widths, shards, segments, vocabularies]
    if device.type == "cuda":
        from samebit.kernels.gpu.tuning import fingerprint, hint

        key += fingerprint(device)
    cache = _cache_file(key)
    unequal = _remembered(cache)
    own = not type(attention).__module__.startswith("samebit.")  # its source may be another now
    if unequal is None:
        check = partial(_check, shapes, attention, widths, shards, segments, vocabularies)
        if device.type == "cuda":
            if (words := hint(device, shapes)) is not None:
                logger.warning("linear: %s", words)
            with _rehearsal():
                check()
        unequal = check()
        _remember(cache, unequal)
    elif own and attention.is_invariant:
        check_attention(attention)
    if not unequal:
        return
    logger.warning("linear: the fast product is not used here for %s", sorted(unequal))
    if device.type == "cpu":
        use_blocked(unequal)
    else:
        from samebit.kernels.gpu.linear import use_triton

        use_triton(unequal)


def _check(
    shapes: Iterable[tuple[int, int]],
    attention: AttentionKind,
    widths: Iterable[int],
    shards: Iterable[tuple[int, int, int]],
    segments: Iterable[tuple[int, int]],
    vocab_sizes: Iterable[int],
) -> set[tuple[int, int]]:
    """Check everything; the weight shapes whose fast product is not to be used."""
    device = attention.device
    if attention.is_invariant:
        check_attention(attention)
    check_rows(widths, device)
    check_draws(vocab_sizes, device)
    unequal = unequal_linear_shapes(shapes, device)
    if device.type == "cuda":
        check_fused(attention.heads, widths, device)
        unequal |= {shape for shape in segments if _gpu_segments_differ(shape, device)}
    else:  # on a GPU every element is one chain, whatever the tile
        check_columns(shards, device)
    return unequal


@functools.cache
def _source_digest() -> str:
    """Of all that kernels/ holds: another implementation is another thing to check."""
    folder = Path(__file__).parent
    sources = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".c"))
    parts = (f"{p.relative_to(folder)}\n".encode() + p.read_bytes() for p in sources)
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def _remembered(cache: Path) -> set[tuple[int, int]] | None:
    try:
        return {(n, k) for n, k in json.loads(cache.read_text())["unequal"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: check anew


def _remember(cache: Path, unequal: set[tuple[int, int]]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            json.dump({"unequal": sorted(unequal)}, file)
        os.replace(file.name, cache)
    except OSError as error:
        logger.warning("the self-check will run again next time: %s", error)
