"""cuBLASLt without split-K, called directly, so that nothing in the environment can change it.

torch chooses cuBLAS algorithms by workspace and by what the process set before the first handle.
Here the heuristic is asked with no reduction scheme and no workspace, one of its answers (usually
the first) is kept per shape, and that the answer does not split K is asserted.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

_COMPUTE_32F, _R_32F, _R_16BF = 68, 0, 14
_DESC_TRANSA = 3
_PREF_MAX_WORKSPACE, _PREF_REDUCTION_MASK = 1, 3
_PREF_ALIGNMENTS = (5, 6, 7, 8)
_ALGO_SPLITK_NUM, _ALGO_REDUCTION = 2, 3
MAX_CHOICES = 8  # of the heuristic's answers, best first
_ALIGNMENT = 16  # bytes, of every pointer and row
_TYPES = {torch.bfloat16: _R_16BF, torch.float32: _R_32F}


class CublasLtError(RuntimeError):
    """A cuBLASLt call failed, or no algorithm keeps the contract."""


class _Algo(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algo", _Algo),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True)
class _Plan:
    operation: Any
    weight: Any
    x: Any
    y: Any
    algo: _Algo


def _check(status: int, call: str) -> None:
    if status != 0:
        raise CublasLtError(f"{call} returned status {status}")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


def version() -> str:
    """Of the library that is loaded."""
    get = _library().cublasLtGetVersion
    get.restype = ctypes.c_size_t
    return str(get())


@lru_cache(maxsize=8)
def _handle(_device_index: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _check(_library().cublasLtCreate(ctypes.byref(handle)), "cublasLtCreate")
    return handle


def _layout(dtype: torch.dtype, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
    layout = ctypes.c_void_p()
    arguments = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
    status = _library().cublasLtMatrixLayoutCreate(ctypes.byref(layout), _TYPES[dtype], *arguments)
    _check(status, "cublasLtMatrixLayoutCreate")
    return layout


def _set_preference(preference: ctypes.c_void_p, attribute: int, value: Any) -> None:
    status = _library().cublasLtMatmulPreferenceSetAttribute(
        preference, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
    )
    _check(status, "cublasLtMatmulPreferenceSetAttribute")


def _preference() -> ctypes.c_void_p:
    preference = ctypes.c_void_p()
    _check(
        _library().cublasLtMatmulPreferenceCreate(ctypes.byref(preference)),
        "cublasLtMatmulPreferenceCreate",
    )
    _set_preference(preference, _PREF_MAX_WORKSPACE, ctypes.c_uint64(0))
    _set_preference(preference, _PREF_REDUCTION_MASK, ctypes.c_uint32(0))
    for attribute in _PREF_ALIGNMENTS:
        _set_preference(preference, attribute, ctypes.c_uint32(_ALIGNMENT))
    return preference


def _require_no_split(algo: _Algo, shape: tuple[int, int, int]) -> None:
    for attribute, name in ((_ALGO_SPLITK_NUM, "split-K"), (_ALGO_REDUCTION, "reduction scheme")):
        value, written = ctypes.c_int32(), ctypes.c_size_t()
        status = _library().cublasLtMatmulAlgoConfigGetAttribute(
            ctypes.byref(algo),
            attribute,
            ctypes.byref(value),
            ctypes.c_size_t(4),
            ctypes.byref(written),
        )
        _check(status, "cublasLtMatmulAlgoConfigGetAttribute")
        if value.value not in (0, 1) or (attribute == _ALGO_REDUCTION and value.value):
            raise CublasLtError(f"algorithm for (M, N, K) = {shape} has {name} {value.value}")


@lru_cache(maxsize=65536)
def _plan(
    device_index: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    out_dtype: torch.dtype,
    choice: int,
) -> _Plan:
    """Row-major y [M, N] = x [M, K] weight [N, K]^T is column-major y' [N, M] = weight'^T x'.

    shape: (M, N, K); strides: from row to row of weight and x.
    """
    m, n, k = shape
    library = _library()
    operation = ctypes.c_void_p()
    _check(
        library.cublasLtMatmulDescCreate(ctypes.byref(operation), _COMPUTE_32F, _R_32F),
        "cublasLtMatmulDescCreate",
    )
    transpose = ctypes.c_int32(1)
    status = library.cublasLtMatmulDescSetAttribute(
        operation, _DESC_TRANSA, ctypes.byref(transpose), ctypes.c_size_t(4)
    )
    _check(status, "cublasLtMatmulDescSetAttribute")
    weight, x = (
        _layout(torch.bfloat16, k, columns, stride)
        for columns, stride in zip((n, m), strides, strict=True)
    )
    y = _layout(out_dtype, n, m, n)
    found, count = (_Heuristic * MAX_CHOICES)(), ctypes.c_int()
    status = library.cublasLtMatmulAlgoGetHeuristic(
        _handle(device_index),
        operation,
        weight,
        x,
        y,
        y,
        _preference(),
        MAX_CHOICES,
        ctypes.byref(found),
        ctypes.byref(count),
    )
    _check(status, "cublasLtMatmulAlgoGetHeuristic")
    usable = [found[i] for i in range(count.value) if found[i].state == 0]
    if not usable:
        raise CublasLtError(f"no algorithm without split-K for (M, N, K) = {shape}")
    algo = _Algo.from_buffer_copy(usable[min(choice, len(usable) - 1)].algo)
    _require_no_split(algo, shape)
    return _Plan(operation, weight, x, y, algo)


def _row_stride(matrix: torch.Tensor) -> int:
    """From row to row; a single row's own stride means nothing."""
    return matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]


def supports(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> bool:
    """Whether pointers and rows are aligned as the stored algorithms need."""
    n, k = weight.shape
    aligned = not (x.data_ptr() | weight.data_ptr()) % _ALIGNMENT
    elements = k | _row_stride(x) | _row_stride(weight)
    rows = not (elements * 2) % _ALIGNMENT and not (n * out_dtype.itemsize) % _ALIGNMENT
    return aligned and rows and x.stride(1) == weight.stride(1) == 1


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    choice: int = 0,
    *,
    accumulate: bool = False,
) -> None:
    """y [M, N] = x [M, K] @ weight [N, K].T on the current stream; bf16 in, bf16 or fp32 out.

    Rows of x and weight may lie apart. choice: which of the heuristic's answers, below MAX_CHOICES;
    they differ in speed alone. accumulate: y += the product, rounded before to fp32 as y is.
    Raises CublasLtError if a call fails or no algorithm without split-K exists.
    """
    shape = (len(x), *weight.shape)
    plan = _plan(x.device.index, shape, (_row_stride(weight), _row_stride(x)), y.dtype, choice)
    alpha, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if accumulate else 0.0)
    status = _library().cublasLtMatmul(
        _handle(x.device.index),
        plan.operation,
        ctypes.byref(alpha),
        ctypes.c_void_p(weight.data_ptr()),
        plan.weight,
        ctypes.c_void_p(x.data_ptr()),
        plan.x,
        ctypes.byref(beta),
        ctypes.c_void_p(y.data_ptr()),
        plan.y,
        ctypes.c_void_p(y.data_ptr()),
        plan.y,
        ctypes.byref(plan.algo),
        None,
        ctypes.c_size_t(0),
        ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
    )
    _check(status, "cublasLtMatmul")
