"""PhaseLedger: whose memory is resident while samples are drawn and while they are trained on.

Each phase has a plan. With release the engine's KV cache and graphs and the trainer's gradients
take turns, so that a step never needs the sum of both peaks.
"""

import time
from contextlib import suppress
from typing import Literal

import torch

from samebit.kernels.memory import TagBytes
from samebit.rollout.client import EngineClient
from samebit.trainer.megatron.trainer import MegatronTrainer

type Phase = Literal["rollout", "train"]

ENGINE_TURN = ("kv_cache", "cuda_graphs")
TRAINER_TURN = ("gradients",)
_GIB = 2**30
_PIECE = 2 * _GIB


class MemoryPlanError(RuntimeError):
    """Memory is resident in a phase whose plan is that it is not, or the other way round."""


class PhaseLedger:
    """Switches between the phases and keeps what each takes; it starts in the rollout's.

    releases: whether memory changes hands. Without, everything stays resident, and is only counted.
    """

    def __init__(self, trainer: MegatronTrainer, engine: EngineClient, releases: bool) -> None:
        self._trainer = trainer
        self._engine = engine
        self._releases = releases
        self._phase: Phase = "rollout"
        self._figures: dict[str, float] = {}
        self._peak = 0.0
        self._working_bytes = 0
        """The most that the latest training had of torch's memory at once, beside the tags."""
        self._begin()

    def enter(self, phase: Phase) -> None:
        """Give this phase the memory that the other one had.

        Raises ResumeError, which names the tag, where memory is short, and MemoryPlanError if what
        is resident then is not what the plan says.
        """
        self._end()
        start = time.perf_counter()
        if self._releases and phase == "train":
            self._engine.release_memory_occupation(ENGINE_TURN)
            self._trainer.resume_memory(TRAINER_TURN)
            self._reserve()
        elif self._releases:
            self._trainer.release_memory(TRAINER_TURN)
            self._engine.resume_memory_occupation(ENGINE_TURN)
        self._figures[f"perf/switch_to_{phase}_s"] = time.perf_counter() - start
        self._phase = phase
        self._begin()

    def _reserve(self) -> None:
        """Have torch take in a few pieces what training took in hundreds the last time.

        Not in one: torch gives back whole pieces alone, where something larger is wanted.
        """
        device, pieces = self._trainer.device, list[torch.Tensor]()
        with suppress(torch.OutOfMemoryError):  # then as it goes
            for _ in range(self._working_bytes // _PIECE):
                pieces.append(torch.empty(_PIECE, dtype=torch.uint8, device=device))

    def metrics(self) -> dict[str, float]:
        """What the latest of each phase took, in GiB, and the seconds of the switches to them."""
        return dict(self._figures)

    def _begin(self) -> None:
        taken = self._occupation()
        away = ENGINE_TURN if self._phase == "train" else TRAINER_TURN
        for tag, found in taken.items():
            planned = 0 if self._releases and tag in away else found.reserved
            if found.resident != planned:
                raise MemoryPlanError(
                    f"phase {self._phase}: {found.resident} bytes of {tag} are resident; the plan "
                    f"is {planned}"
                )
        if self._trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._trainer.device)

    def _end(self) -> None:
        """Write down what the phase took.

        torch still counts released memory, but for what graphs compute, as allocated.
        """
        taken, phase = self._occupation(), self._phase
        for tag, found in taken.items():
            self._figures[f"perf/{phase}_{tag}_gib"] = found.resident / _GIB
        if "weights" not in taken:  # the engine's are the trainer's own parameters, and stay
            own = sum(param.nbytes for param in self._trainer.params.values())
            self._figures[f"perf/{phase}_weights_gib"] = own / _GIB
        device = self._trainer.device
        if device.type != "cuda":
            return
        away = {tag: found.reserved - found.resident for tag, found in taken.items()}
        reserved = torch.cuda.memory_reserved(device) - sum(away.values())
        if phase == "train":  # torch counts all tags as allocated
            tagged = sum(found.reserved for found in taken.values())
            self._working_bytes = max(0, torch.cuda.max_memory_allocated(device) - tagged)
        away.pop("cuda_graphs", None)
        peak = (torch.cuda.max_memory_allocated(device) - sum(away.values())) / _GIB
        free, total = torch.cuda.mem_get_info(device)
        self._peak = max(self._peak, peak)
        self._figures |= {
            f"perf/{phase}_peak_gib": peak,
            f"perf/{phase}_reserved_gib": reserved / _GIB,
            f"perf/{phase}_device_gib": (total - free) / _GIB,
            "perf/peak_memory_gib": self._peak,
        }

    def _occupation(self) -> dict[str, TagBytes]:
        return self._engine.memory_occupation() | self._trainer.memory_occupation()
