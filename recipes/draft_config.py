"""How a run of GRPO trains its draft, as a section of the configuration. No torch here."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from samebit.rollout.config import WITH_DRAFT, EngineConfig
from samebit.trainer.config import OptimizerConfig, require, require_default
from samebit.trainer.draft.config import TttConfig

TRAIN = ("off", "online")


@dataclass(kw_only=True)
class DraftOptimizerConfig(OptimizerConfig):
    """AdamW and its schedule, of a draft."""

    key: ClassVar[str] = "draft.optimizer"

    lr: float = 1e-4
    """Learning rate, after the warm-up."""
    clip_grad: float = 0.5
    """Largest gradient norm; 0 does not clip."""


@dataclass(kw_only=True)
class OnlineDraftSection:
    """Says whether a draft is trained on a run's own samples. It can change no token."""

    train: str = "off"
    """off; or online: on each step's samples, from what the policy's training computes of them
    anyway. It begins with engine.draft_model, or anew if that is unset."""
    every: int = 1
    """Training steps for one optimizer step of the draft, on the last one's samples."""
    layers: list[int] | None = None
    """Numbers of the target's layers after which a new draft reads its stream; unset: EAGLE-3's."""
    optimizer: DraftOptimizerConfig = field(default_factory=DraftOptimizerConfig)

    def __post_init__(self) -> None:
        require(self.train in TRAIN, "draft.train", self.train, f"one of {TRAIN}")
        require(self.every >= 1, "draft.every", self.every, "positive")
        if not self.is_online:
            idle = [f.name for f in fields(self) if f.name != "train"]
            require_default(self, "draft", idle, "draft.train is 'off'")

    @property
    def is_online(self) -> bool:
        """Whether a draft is trained."""
        return self.train == "online"

    def num_updates(self, num_steps: int, num_waits: int) -> int:
        """Return how many optimizer steps the draft takes in so many training steps, in the first
        num_waits of which the policy, and with it the draft, waits for a critic."""
        return num_steps // self.every - num_waits // self.every

    def check(self, ttt: TttConfig, engine: EngineConfig, num_updates: int) -> None:
        """Raise ValueError, which names the keys, for what does not go with other sections."""
        if not self.is_online:
            require_default(ttt, "ttt", [f.name for f in fields(ttt)], "draft.train is 'off'")
            return
        meaning = "the command is grpo, whose rollouts say the accept length"
        require_default(ttt, "ttt", ("eval_passes",), meaning)
        kinds = " or ".join(WITH_DRAFT)
        meaning = f"{kinds} with draft.train=online: a draft that nothing guesses by is idle"
        require(engine.speculative in WITH_DRAFT, "engine.speculative", engine.speculative, meaning)
        meaning = "at most trainer.num_steps, and reached behind critic.warmup_steps: the draft "
        meaning += "would never be trained"
        require(num_updates > 0, "draft.every", self.every, meaning)
        if engine.draft_model is not None:
            require_default(self, "draft", ("layers",), "engine.draft_model is given")
        warmup = self.optimizer.lr_warmup_steps
        fits = self.optimizer.lr_schedule == "constant" or warmup < num_updates
        meaning = f"below {num_updates}, the draft's optimizer steps, where its rate decays"
        require(fits, "draft.optimizer.lr_warmup_steps", warmup, meaning)
