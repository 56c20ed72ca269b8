"""cuBLASLt without split-K, called directly, so that nothing in the environment can change it.

torch chooses cuBLAS algorithms by workspace and by what the process set before the first handle.
Here the heuristic is asked with no reduction scheme and no workspace, one of its answers (usually
the first, perhaps with another cluster shape) is kept per shape, and that it does not split K is
asserted.
"""

import ctypes
import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

_COMPUTE_32F, _R_32F, _R_16BF = 68, 0, 14
_DESC_TRANSA = 3
_PREF_MAX_WORKSPACE, _PREF_REDUCTION_MASK = 1, 3
_PREF_ALIGNMENTS = (5, 6, 7, 8)
_ALGO_SPLITK_NUM, _ALGO_REDUCTION, _ALGO_CUSTOM, _ALGO_CLUSTER = 2, 3, 5, 8
_CLUSTERS = range(2, 11)  # cublasLtClusterShape_t: 1x1, 2x1, 4x1, 1x2, ... 4x4
_CUSTOM_OPTIONS = range(8)
_MAX_ANSWERS = 8  # of the heuristic
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
class Answer:
    """One of the heuristic's answers, best first; cluster, custom: values to put in for its own.

    They differ in speed alone. Where cuBLASLt refuses such a value, its own stays.
    """

    number: int = 0  # of at most 8; the last one if there are fewer
    cluster: int | None = None  # a cublasLtClusterShape_t
    custom: int | None = None  # CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION


FIRST = Answer()


@dataclass(frozen=True)
class _Problem:
    operation: Any
    weight: Any
    x: Any
    y: Any
    answers: tuple[_Algo, ...]

    def own(self, answer: Answer) -> _Algo:
        """The heuristic's algorithm, as it is."""
        return self.answers[min(answer.number, len(self.answers) - 1)]


@dataclass(frozen=True)
class _Choice:
    problem: _Problem
    algo: _Algo


def _check(status: int, call: str) -> None:
    if status != 0:
        raise CublasLtError(f"{call} returned status {status}")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


def version() -> str:
    """The version of the library that is loaded."""
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
def _problem(
    device_index: int, shape: tuple[int, int, int], strides: tuple[int, int], out_dtype: torch.dtype
) -> _Problem:
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
    found, count = (_Heuristic * _MAX_ANSWERS)(), ctypes.c_int()
    status = library.cublasLtMatmulAlgoGetHeuristic(
        _handle(device_index),
        operation,
        weight,
        x,
        y,
        y,
        _preference(),
        _MAX_ANSWERS,
        ctypes.byref(found),
        ctypes.byref(count),
    )
    _check(status, "cublasLtMatmulAlgoGetHeuristic")
    usable = [found[i] for i in range(count.value) if found[i].state == 0]
    if not usable:
        raise CublasLtError(f"no algorithm without split-K for (M, N, K) = {shape}")
    answers = tuple(_Algo.from_buffer_copy(answer.algo) for answer in usable)
    return _Problem(operation, weight, x, y, answers)


def _changed(device_index: int, problem: _Problem, answer: Answer) -> _Algo | None:
    """The answer's algorithm with its cluster and custom option; None where cuBLASLt refuses."""
    algo = _Algo.from_buffer_copy(problem.own(answer))
    values = (
        (_ALGO_CUSTOM, answer.custom, ctypes.c_uint32),
        (_ALGO_CLUSTER, answer.cluster, ctypes.c_uint16),
    )
    for attribute, value, kind in values:
        if value is not None and _library().cublasLtMatmulAlgoConfigSetAttribute(
            ctypes.byref(algo),
            attribute,
            ctypes.byref(kind(value)),
            ctypes.c_size_t(ctypes.sizeof(kind)),
        ):
            return None
    result = _Heuristic()
    status = _library().cublasLtMatmulAlgoCheck(
        _handle(device_index),
        problem.operation,
        problem.weight,
        problem.x,
        problem.y,
        problem.y,
        ctypes.byref(algo),
        ctypes.byref(result),
    )
    return None if status or result.workspace else algo


@lru_cache(maxsize=65536)
def _choice(
    device_index: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    out_dtype: torch.dtype,
    answer: Answer,
) -> _Choice:
    problem = _problem(device_index, shape, strides, out_dtype)
    algo = _changed(device_index, problem, answer) or problem.own(answer)
    _require_no_split(algo, shape)
    return _Choice(problem, algo)


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


def _key(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor
) -> tuple[int, tuple[int, int, int], tuple[int, int], torch.dtype]:
    """What a product's algorithms depend on."""
    shape = (len(x), *weight.shape)
    return x.device.index, shape, (_row_stride(weight), _row_stride(x)), y.dtype


def variants(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> list[Answer]:
    """The heuristic's answers to this product, then each other way to run one of them."""
    key = _key(x, weight, y)
    problem = _problem(*key)
    own = [Answer(i) for i in range(len(problem.answers))]
    found = {tuple(algo.data): answer for algo, answer in zip(problem.answers, own, strict=True)}
    for answer, cluster, custom in itertools.product(own, _CLUSTERS, _CUSTOM_OPTIONS):
        variant = replace(answer, cluster=cluster, custom=custom)
        algo = _changed(key[0], problem, variant)
        if algo is not None:
            found.setdefault(tuple(algo.data), variant)
    return list(found.values())


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    answer: Answer = FIRST,
    *,
    accumulate: bool = False,
) -> None:
    """y [M, N] = x [M, K] @ weight [N, K].T on the current stream; bf16 in, bf16 or fp32 out.

    Rows of x and weight may lie apart. accumulate: y += the product, which is rounded to fp32
    before, as y is.
    Raises CublasLtError if a call fails or no algorithm without split-K exists.
    """
    choice = _choice(*_key(x, weight, y), answer)
    problem = choice.problem
    alpha, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if accumulate else 0.0)
    status = _library().cublasLtMatmul(
        _handle(x.device.index),
        problem.operation,
        ctypes.byref(alpha),
        ctypes.c_void_p(weight.data_ptr()),
        problem.weight,
        ctypes.c_void_p(x.data_ptr()),
        problem.x,
        ctypes.byref(beta),
        ctypes.c_void_p(y.data_ptr()),
        problem.y,
        ctypes.c_void_p(y.data_ptr()),
        problem.y,
        ctypes.byref(choice.algo),
        None,
        ctypes.c_size_t(0),
        ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
    )
    _check(status, "cublasLtMatmul")
