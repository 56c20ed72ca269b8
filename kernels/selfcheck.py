"""Proof on the machine at hand that every implementation of an operation gives the same bits.

The contract rests on observations of one BLAS and one CPU; another may differ. So the engine and
the trainer run this check at start-up for the model's own shapes (milliseconds for a small model,
seconds for a large one) and remember the result by device and versions. Where the fast path fails,
the path that is row-invariant by construction is used from then on, and a warning says so.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from samebit.kernels.attention import packed_attention, paged_attention, plan_packed, plan_paged
from samebit.kernels.linear import linear_blocked, linear_padded, use_blocked
from samebit.kernels.profile import numerics_profile
from samebit.kernels.rms_norm import rms_norm
from samebit.kernels.swiglu import swiglu

logger = logging.getLogger(__name__)

ROW_COUNTS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 128, 129, 256, 511)


class SelfCheckError(RuntimeError):
    """An operation without an alternative broke the contract on this machine."""


def _cache_file(key: object) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return root / "samebit" / "selfcheck" / f"{name}.json"


def unequal_linear_shapes(shapes: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """The weight shapes (N, K) at which one product differs from the product by row blocks."""
    unequal = set()
    generator = torch.Generator().manual_seed(0)
    for rows, columns in sorted(set(shapes)):
        weight = torch.randn(rows, columns, generator=generator)
        x = torch.randn(ROW_COUNTS[-1], columns, generator=generator)
        truth = linear_blocked(x, weight)
        if any(not torch.equal(linear_padded(x[:m], weight), truth[:m]) for m in ROW_COUNTS):
            unequal.add((rows, columns))
    return unequal


def check_attention(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Raise SelfCheckError unless decode, chunks and the packed forward agree."""
    generator = torch.Generator().manual_seed(0)
    lens, page_size, group = (3, 64, 65, 150), 16, num_heads // num_kv_heads
    total, scale = sum(lens), head_dim**-0.5
    q = torch.randn(total, num_heads, head_dim, generator=generator)
    k, v = (torch.randn(total, num_kv_heads, head_dim, generator=generator) for _ in range(2))
    truth = packed_attention(q, k, v, plan_packed(lens, group), scale).split(lens)
    num_pages = -(-max(lens) // page_size)
    for length, q_L, k_L, v_L, truth_L in zip(
        lens, q.split(lens), k.split(lens), v.split(lens), truth, strict=True
    ):
        caches = torch.full((2, num_pages, page_size, num_kv_heads, head_dim), float("nan"))
        caches[0].view(-1, num_kv_heads, head_dim)[:length] = k_L
        caches[1].view(-1, num_kv_heads, head_dim)[:length] = v_L
        table = torch.arange(num_pages)[None]
        for chunk in (1, 17):
            start = max(0, length - chunk)
            plan = plan_paged([length - start], [length], table, page_size, group)
            output = paged_attention(q_L[start:], caches[0], caches[1], plan, scale)
            if not torch.equal(output, truth_L[start:]):
                raise SelfCheckError(
                    f"attention is not invariant on this machine: length {length}, chunk {chunk}, "
                    f"{num_heads}/{num_kv_heads} heads of {head_dim}"
                )


def check_rows(widths: Iterable[int]) -> None:
    """Raise SelfCheckError unless rms_norm and swiglu treat each row by itself."""
    generator = torch.Generator().manual_seed(0)
    for width in sorted(set(widths)):
        x = torch.randn(67, 2 * width, generator=generator)
        norm, gate = rms_norm(x[:, :width], torch.ones(width), 1e-6), swiglu(x)
        for rows in (1, 2, 5, 31, 66):
            same_norm = torch.equal(
                rms_norm(x[:rows, :width], torch.ones(width), 1e-6), norm[:rows]
            )
            if not (same_norm and torch.equal(swiglu(x[:rows]), gate[:rows])):
                raise SelfCheckError(f"row operations are not invariant here: width {width}")


def selfcheck(
    linear_shapes: Iterable[tuple[int, int]],
    heads: tuple[int, int, int],
    widths: Iterable[int],
) -> None:
    """Check a model's operations on the CPU and select implementations accordingly.

    linear_shapes: (N, K) of every weight; heads: (N, K, H) of attention; widths: row lengths of
    norms and activations. Raises SelfCheckError where nothing that keeps the contract is left.
    """
    shapes = sorted(set(linear_shapes))
    profile = numerics_profile(torch.device("cpu"))
    key = [profile.digest, shapes, list(heads), sorted(set(widths))]
    cache = _cache_file(key)
    if cache.exists():
        blocked = {(n, k) for n, k in json.loads(cache.read_text())["blocked"]}
    else:
        check_attention(*heads)
        check_rows(widths)
        blocked = unequal_linear_shapes(shapes)
        _write_json(cache, {"blocked": sorted(blocked)})
    if blocked:
        logger.warning("linear: computing %s by row blocks on this machine", sorted(blocked))
        use_blocked(blocked)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)
