"""cuBLASLt without split-K, called directly, so that nothing in the environment can change it.

The heuristic is asked with no reduction scheme and no workspace, one of its answers (perhaps with
another cluster shape) is kept per shape, and that it does not split K is asserted.
"""

import ctypes
import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

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
    layouts: tuple[Any, Any, Any, Any]  # of weight, x, and y as what is added and as the result
    answers: tuple[_Algo, ...]

    def own(self, answer: Answer) -> _Algo:
        """The heuristic's algorithm, as it is."""
        return self.answers[min(answer.number, len(self.answers) - 1)]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


def version() -> str:
    """The version of the library that is loaded."""
    get = _library().cublasLtGetVersion
    get.restype = ctypes.c_size_t
    return str(get())


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status != 0:
        raise CublasLtError(f"{name} returned status {status}")


def _created(kind: str, *arguments: Any) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _call(f"cublasLt{kind}Create", ctypes.byref(made), *arguments)
    return made


def _set(kind: str, target: Any, attribute: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _call(f"cublasLt{kind}SetAttribute", target, attribute, ctypes.byref(value), size)


@lru_cache(maxsize=8)
def _handle(_device_index: int) -> ctypes.c_void_p:
    return _created("")


def _layout(dtype: torch.dtype, rows: int, columns: int, stride: int) -> ctypes.c_void_p:
    sizes = (ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride))
    return _created("MatrixLayout", _TYPES[dtype], *sizes)


def _preference() -> ctypes.c_void_p:
    preference = _created("MatmulPreference")
    _set("MatmulPreference", preference, _PREF_MAX_WORKSPACE, ctypes.c_uint64(0))
    _set("MatmulPreference", preference, _PREF_REDUCTION_MASK, ctypes.c_uint32(0))
    for attribute in _PREF_ALIGNMENTS:
        _set("MatmulPreference", preference, attribute, ctypes.c_uint32(_ALIGNMENT))
    return preference


def _require_no_split(algo: _Algo, shape: tuple[int, int, int]) -> None:
    get = "cublasLtMatmulAlgoConfigGetAttribute"
    for attribute, name in ((_ALGO_SPLITK_NUM, "split-K"), (_ALGO_REDUCTION, "reduction scheme")):
        value, written = ctypes.c_int32(), ctypes.c_size_t()
        place = (ctypes.byref(value), ctypes.c_size_t(4), ctypes.byref(written))
        _call(get, ctypes.byref(algo), attribute, *place)
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
    operation = _created("MatmulDesc", _COMPUTE_32F, _R_32F)
    _set("MatmulDesc", operation, _DESC_TRANSA, ctypes.c_int32(1))
    weight = _layout(torch.bfloat16, k, n, strides[0])
    x = _layout(torch.bfloat16, k, m, strides[1])
    y = _layout(out_dtype, n, m, n)
    layouts = (weight, x, y, y)
    found, count = (_Heuristic * _MAX_ANSWERS)(), ctypes.c_int()
    request = (_handle(device_index), operation, *layouts, _preference(), _MAX_ANSWERS)
    _call("cublasLtMatmulAlgoGetHeuristic", *request, ctypes.byref(found), ctypes.byref(count))
    usable = [found[i] for i in range(count.value) if found[i].state == 0]
    if not usable:
        raise CublasLtError(f"no algorithm without split-K for (M, N, K) = {shape}")
    answers = tuple(_Algo.from_buffer_copy(answer.algo) for answer in usable)
    return _Problem(operation, layouts, answers)


def _changed(device_index: int, problem: _Problem, answer: Answer) -> _Algo | None:
    """The answer's algorithm with its cluster and custom option; None where cuBLASLt refuses."""
    algo, result = _Algo.from_buffer_copy(problem.own(answer)), _Heuristic()
    target, product = ctypes.byref(algo), (problem.operation, *problem.layouts)
    try:
        if answer.custom is not None:
            _set("MatmulAlgoConfig", target, _ALGO_CUSTOM, ctypes.c_uint32(answer.custom))
        if answer.cluster is not None:
            _set("MatmulAlgoConfig", target, _ALGO_CLUSTER, ctypes.c_uint16(answer.cluster))
        handle = _handle(device_index)
        _call("cublasLtMatmulAlgoCheck", handle, *product, target, ctypes.byref(result))
    except CublasLtError:
        return None
    return None if result.workspace else algo


@lru_cache(maxsize=65536)
def _choice(
    device_index: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int],
    out_dtype: torch.dtype,
    answer: Answer,
) -> tuple[_Problem, _Algo]:
    problem = _problem(device_index, shape, strides, out_dtype)
    algo = _changed(device_index, problem, answer) or problem.own(answer)
    _require_no_split(algo, shape)
    return problem, algo


def _row_stride(matrix: Tensor) -> int:
    """From row to row; a single row's own stride means nothing."""
    return matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]


def supports(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether pointers and rows are aligned as the stored algorithms need."""
    n, k = weight.shape
    aligned = not (x.data_ptr() | weight.data_ptr()) % _ALIGNMENT
    elements = k | _row_stride(x) | _row_stride(weight)
    rows = not (elements * 2) % _ALIGNMENT and not (n * out_dtype.itemsize) % _ALIGNMENT
    return aligned and rows and x.stride(1) == weight.stride(1) == 1


def _key(
    x: Tensor, weight: Tensor, y: Tensor
) -> tuple[int, tuple[int, int, int], tuple[int, int], torch.dtype]:
    """What a product's algorithms depend on."""
    shape = (len(x), *weight.shape)
    return x.device.index, shape, (_row_stride(weight), _row_stride(x)), y.dtype


def variants(x: Tensor, weight: Tensor, y: Tensor) -> list[Answer]:
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
    x: Tensor, weight: Tensor, y: Tensor, answer: Answer = FIRST, *, accumulate: bool = False
) -> None:
    """y [M, N] = x [M, K] @ weight [N, K].T on the current stream; bf16 in, bf16 or fp32 out.

    Rows of x and weight may lie apart. accumulate: y += the product, rounded to fp32 before.
    Raises CublasLtError if a call fails or no algorithm without split-K exists.
    """
    problem, algo = _choice(*_key(x, weight, y), answer)
    weight_layout, x_layout, y_layout, _ = problem.layouts
    alpha, beta = ctypes.c_float(1.0), ctypes.c_float(1.0 if accumulate else 0.0)
    result = ctypes.c_void_p(y.data_ptr())
    stream = torch.cuda.current_stream(x.device).cuda_stream
    _call(
        "cublasLtMatmul", _handle(x.device.index), problem.operation,
        ctypes.byref(alpha), ctypes.c_void_p(weight.data_ptr()), weight_layout,
        ctypes.c_void_p(x.data_ptr()), x_layout, ctypes.byref(beta), result, y_layout,
        result, y_layout, ctypes.byref(algo), None, ctypes.c_size_t(0), ctypes.c_void_p(stream),
    )  # fmt: skip
