"""The optimizer's state in the host's memory: master weights and moments, 12 bytes a parameter (in
pinned allocations, each of which torch rounds up to a power of two).

A step takes them through the device, three slices at a time. AdamW is elementwise: no bit moves.
There the new master weights are digested too.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from samebit.trainer.megatron.optimizer_state import Piece, host_zeros_like
from samebit.weight_sync.digest import Digester, Part

SLICE = 1 << 25
"""Elements that are on the device at a time, for each tensor of the state and each of 3 buffers."""
_NUM_BUFFERS = 3


class OffloadedState:
    """Holds the master copies of `pieces`, whose moments are in the host's memory, and steps."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        digester_of: Callable[[Sequence[Part]], Digester],
        slice_size: int = SLICE,
    ) -> None:
        self._pieces = pieces
        self._digester_of = digester_of
        self._digester: Digester | None = None
        self._digest_sum: int | None = None  # of the present master weights, where it is known
        self._slice = min(slice_size, max(piece.main.numel() for piece in pieces))
        self._buffers: list[_StagingBuffer] = []
        for piece in pieces:
            if piece.has_master:
                piece.state["master"] = host_zeros_like(piece.main).copy_(piece.main)
                # Megatron still hangs its gradient on it, and so asks for shape and device.
                piece.main.data = piece.main.new_empty(1).expand(piece.main.shape)

    @property
    def _device(self) -> torch.device:
        return self._pieces[0].main.device

    @torch.no_grad()
    def reload_model_params(self) -> None:
        """Make the master copies those of the present weights."""
        for piece in self._pieces:
            if piece.has_master:
                piece.state["master"].copy_(piece.weights.view_as(piece.main))
        self.forget_digest()

    def forget_digest(self) -> None:
        """To be called when the master weights were changed by anything but a step."""
        self._digest_sum = None

    @torch.no_grad()
    def digest_sum(self) -> int:
        """This rank's summand of the weights' digest, by the master weights: see Digester.sum."""
        if self._device.type != "cuda":
            self._digester = self._digester or self._digester_of([p.digested for p in self._pieces])
            return self._digester.sum()
        if self._digest_sum is None:
            self._pass_through_gpu(steps=False)
        assert self._digest_sum is not None
        return self._digest_sum

    @torch.no_grad()
    def step(self) -> None:
        """One step of AdamW for every piece, and its weights rounded from the master copy."""
        if self._device.type == "cuda":
            self._pass_through_gpu(steps=True)
        else:
            for piece, part in self._slices():
                update(piece, part, {n: t.view(-1)[part] for n, t in piece.tensors.items()})
        for piece in self._pieces:
            piece.state["step"] += 1

    def _slices(self) -> Iterator[tuple[Piece, slice]]:
        for piece in self._pieces:
            for start in range(0, piece.main.numel(), self._slice):
                yield piece, slice(start, min(start + self._slice, piece.main.numel()))

    def _pass_through_gpu(self, steps: bool) -> None:
        """Digest every slice on the device; with `steps`, after its step, and bring it back."""
        device = self._device
        if not self._buffers:
            self._buffers = [_StagingBuffer(self._slice, device) for _ in range(_NUM_BUFFERS)]
            self._digester = self._digester_of(list(self._digested_slices()))
        assert self._digester is not None
        self._digest_sum = None
        self._digester.start()
        now = torch.cuda.current_stream(device)
        for buffer in self._buffers:
            buffer.stream.wait_stream(now)
        for i, (piece, part) in enumerate(self._slices()):
            buffer = self._buffers[i % _NUM_BUFFERS]
            needed = {n: t for n, t in piece.tensors.items() if steps or n == "master"}
            host = {name: tensor.view(-1)[part] for name, tensor in needed.items()}
            with torch.cuda.stream(buffer.stream):  # behind the buffer's last way back
                there = {
                    name: buffer.memory[name][: part.stop - part.start].copy_(h, non_blocking=True)
                    for name, h in host.items()
                }
            now.wait_stream(buffer.stream)
            if steps:
                update(piece, part, there)
            self._digester.add(i)
            buffer.stream.wait_stream(now)
            if steps:
                with torch.cuda.stream(buffer.stream):
                    for name, h in host.items():
                        h.copy_(there[name], non_blocking=True)
        for buffer in self._buffers:
            buffer.stream.synchronize()
        self._digest_sum = self._digester.finish()

    def _digested_slices(self) -> Iterator[Part]:
        """Where on the device the weights' digest finds each slice."""
        for i, (piece, part) in enumerate(self._slices()):
            values = piece.weights.view(-1)[part]
            if piece.has_master:
                memory = self._buffers[i % _NUM_BUFFERS].memory["master"]
                values = memory[: part.stop - part.start]
            yield Part(piece.name, piece.start + part.start, values)


class _StagingBuffer:
    """Memory on the device for a slice of every tensor, and the stream to fill and empty it by."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = {
            name: torch.empty(size, device=device) for name in ("master", "exp_avg", "exp_avg_sq")
        }
        self.stream = torch.cuda.Stream(device)


def update(piece: Piece, part: slice, tensors: dict[str, Tensor]) -> None:
    """AdamW's step of a slice whose state is in `tensors`, [n] each on the weights' device."""
    weights, grad, group = piece.weights.view(-1)[part], piece.main.grad, piece.group
    assert grad is not None
    main = tensors.get("master", weights)
    beta1, beta2 = group["betas"]
    adamw(
        [main], [grad.view(-1)[part]], [tensors["exp_avg"]], [tensors["exp_avg_sq"]], [],
        [piece.state["step"].clone()], fused=group["fused"], amsgrad=False, beta1=beta1,
        beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        maximize=False,
    )  # fmt: skip
    if piece.has_master:
        weights.copy_(main)
