"""The few functions of NCCL that point-to-point transfers need, from the library that torch loads.

Communicators are non-blocking and bounded in time: a call that waits for a rank which is gone can
be given up, and the process goes on. torch's own process group ends the process in that case.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p

import torch
from torch import Tensor

from samebit.weight_sync.types import LostMemberError, WeightSyncError

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_UNSET = -(1 << 31)
_POLL_S, _WATCH_S = 2e-5, 1e-3


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", c_char * 128),)


class _Config(ctypes.Structure):
    """ncclConfig_t of NCCL 2.18; newer ones know by `version` what it lacks."""

    _fields_ = (
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cga_cluster_size", c_int),
        ("min_ctas", c_int),
        ("max_ctas", c_int),
        ("net_name", c_char_p),
        ("split_share", c_int),
    )


def _library() -> ctypes.CDLL:
    torch.cuda.init()
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise WeightSyncError(f"transport nccl: torch came without NCCL: {error}") from None
    library.ncclGetErrorString.restype = c_char_p
    init = library.ncclCommInitRankConfig
    init.argtypes = [POINTER(c_void_p), c_int, _UniqueId, c_int, POINTER(_Config)]
    for transfer in (library.ncclSend, library.ncclRecv):
        transfer.argtypes = [c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p]
    library.ncclCommGetAsyncError.argtypes = [c_void_p, POINTER(c_int)]
    library.ncclCommAbort.argtypes = [c_void_p]
    return library


def new_unique_id() -> bytes:
    """What all ranks of a communicator have to know; one of them makes it."""
    library, unique = _library(), _UniqueId()
    _check(library, library.ncclGetUniqueId(byref(unique)))
    return bytes(unique)


class NcclCommunicator:
    """Ranks that send each other bytes on a stream. Raises WeightSyncError for NCCL's errors, and
    LostMemberError for what takes longer than `timeout_s`; it is of no use after that."""

    def __init__(self, unique_id: bytes, rank: int, world_size: int, timeout_s: float) -> None:
        self._library, self._timeout_s = _library(), timeout_s
        self._comm = c_void_p()
        config = _Config(
            ctypes.sizeof(_Config), 0xCAFEBEEF, 21800, 0, _UNSET, _UNSET, _UNSET, None, _UNSET
        )
        unique = _UniqueId.from_buffer_copy(unique_id)
        found = self._library.ncclCommInitRankConfig(
            *(byref(self._comm), world_size, unique, rank, byref(config))
        )
        self._settle(found, lambda: None)

    def exchange(
        self,
        outgoing: Sequence[tuple[int, Tensor]],
        incoming: Sequence[tuple[int, Tensor]],
        stream: torch.cuda.Stream,
        watch: Callable[[], None],
    ) -> None:
        """Put sends and receives (peer, contiguous uint8 tensor) onto a stream as one group."""
        library, found = self._library, _SUCCESS
        if not self._comm:
            raise LostMemberError("the weight group lost a member: its communicator was given up")
        _check(library, library.ncclGroupStart())
        for call, parts in ((library.ncclSend, outgoing), (library.ncclRecv, incoming)):
            for peer, memory in parts:
                if found in (_SUCCESS, _IN_PROGRESS):
                    size, place = memory.numel(), memory.data_ptr()
                    found = call(place, size, _UINT8, peer, self._comm, stream.cuda_stream)
        ended = library.ncclGroupEnd()  # in any case: this thread's later groups would nest in it
        self._settle(ended if found in (_SUCCESS, _IN_PROGRESS) else found, watch)

    def wait(self, stream: torch.cuda.Stream, watch: Callable[[], None]) -> None:
        """Wait for all that is on the stream."""
        done = torch.cuda.Event()
        done.record(stream)
        self._until(done.query, watch)

    def abort(self) -> None:
        """Let go of everything, whatever runs or waits.

        ncclCommDestroy would wait until the other ranks destroy theirs too.
        """
        if self._comm:
            self._library.ncclCommAbort(self._comm)
            self._comm = c_void_p()

    def _settle(self, found: int, watch: Callable[[], None]) -> None:
        """Wait until a call has come to its end."""
        if found not in (_SUCCESS, _IN_PROGRESS):
            self.abort()
            _check(self._library, found)

        def ended() -> bool:
            state = c_int()
            _check(self._library, self._library.ncclCommGetAsyncError(self._comm, byref(state)))
            if state.value not in (_SUCCESS, _IN_PROGRESS):
                _check(self._library, state.value)
            return state.value == _SUCCESS

        self._until(ended, watch)

    def _until(self, ended: Callable[[], bool], watch: Callable[[], None]) -> None:
        start = watched = time.monotonic()
        try:
            while not ended():
                if (now := time.monotonic()) - watched > _WATCH_S:
                    watched = now
                    watch()
                if now - start > self._timeout_s:
                    raise LostMemberError(
                        f"the weight group lost a member: nothing came for {self._timeout_s:g} s"
                    )
                time.sleep(_POLL_S)
        except BaseException:
            self.abort()
            raise


def _check(library: ctypes.CDLL, found: int) -> None:
    if found != _SUCCESS:
        words = library.ncclGetErrorString(found).decode()
        raise WeightSyncError(f"NCCL: {words} (NCCL_DEBUG=INFO says more)")
