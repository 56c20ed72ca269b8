"""The section `distillation` of runs whose algorithm has a teacher. No torch here."""

from dataclasses import dataclass, field
from typing import ClassVar

from samebit.recipes.rollout_config import RolloutSection
from samebit.rollout.config import EngineConfig
from samebit.trainer.config import require, require_default

_IDLE = ("speculative", "num_draft_tokens", "adaptive_drafts", "draft_model", "draft_norm_output",
         "cuda_graphs", "group_attention")  # fmt: skip


@dataclass(kw_only=True)
class TeacherEngineConfig(EngineConfig):
    """The teacher's own engine; its KV cache holds two steps' tokens, unless said otherwise."""

    key: ClassVar[str] = "distillation.engine"


@dataclass(kw_only=True)
class DistillationSection:
    """Says which model the policy is to become like."""

    teacher: str = "???"
    """A Hugging Face folder of the policy's vocabulary; it stays as it is."""
    engine: TeacherEngineConfig = field(default_factory=TeacherEngineConfig)
    """It scores in the trainer's processes, and keeps its memory."""

    def __post_init__(self) -> None:
        require(self.teacher != "", "distillation.teacher", self.teacher, "the path of a folder")
        require_default(self.engine, self.engine.key, _IDLE, "a teacher draws nothing")
        memory = ("releasable", "weights_backup")
        require_default(self.engine, self.engine.key, memory, "a teacher keeps its memory")

    def check(self, rollout: RolloutSection) -> None:
        """Raise ValueError for log-probs that cannot be compared with the teacher's."""
        fits, meaning = not rollout.truncates, "full with a teacher, which rates all tokens"
        require(fits, "rollout.logprobs", rollout.logprobs, meaning)
