"""The trainer's releasable memory: gradients, whose content a step makes anew, and the optimizer's.

What Megatron allocates is led into the arena while its objects are made.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from samebit.kernels.memory import Arena, TagBytes, require_tags
from samebit.trainer.megatron.optimizer_state import Piece

TRAINER_TAGS = ("gradients", "optimizer")


class _Gradients(TorchFunctionMode):
    """Megatron's DDP makes its buffers by torch.zeros: parameters' in bf16, gradients' in fp32."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.float32:
            with self._arena.allocating("gradients"):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def gradients_in(arena: Arena) -> AbstractContextManager[Any]:
    """The gradients of the DDPs that are made in the block lie in the arena.

    On a CPU, where parameters are fp32 too, `hold` alone tells them apart.
    """
    return nullcontext() if arena.device.type == "cpu" else _Gradients(arena)


def optimizer_in(arena: Arena, offloaded: bool) -> AbstractContextManager[Any]:
    """An optimizer that is made in the block lies in the arena.

    An offloaded one does not: what it leaves on the device at once goes back to torch.
    """
    return nullcontext() if offloaded else arena.allocating("optimizer")


def hold(arena: Arena, chunks: Sequence[Any], pieces: Sequence[Piece], offloaded: bool) -> None:
    """Have the arena release the gradients of these DDPs and, not offloaded, the pieces' state."""
    buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    arena.hold("gradients", [buffer.grad_data for buffer in buffers])
    if not offloaded:
        arena.hold("optimizer", [x for piece in pieces for x in piece.tensors.values()])


class TrainerMemory:
    """The part of MegatronTrainer that gives memory back and takes it again."""

    arena: Arena

    def release_memory(self, tags: Sequence[str] = ("gradients",)) -> dict[str, int]:
        """Give the memory of these tags, and what torch caches, back; the bytes of each.

        Between two steps gradients have no content; the optimizer's is kept in (pinned) host
        memory. 0 bytes: released already or, of an offloaded optimizer, not on the device. Raises
        ValueError for other tags, and ReleasedError for a trainer with releasable=False.
        """
        return self.arena.release(_trainer_tags(tags), keep=("optimizer",))

    def resume_memory(self, tags: Sequence[str] = ("gradients",)) -> dict[str, int]:
        """Have the memory of these tags again, at the same addresses; the bytes of each.

        Raises ResumeError, which names the tag, where memory is short; it may be repeated.
        """
        return self.arena.resume(_trainer_tags(tags))

    def memory_occupation(self) -> dict[str, TagBytes]:
        """Bytes of each tag that are resident, and those of its addresses."""
        return self.arena.occupation()


def _trainer_tags(tags: Sequence[str]) -> Sequence[str]:
    require_tags(tags, TRAINER_TAGS)
    return tags
