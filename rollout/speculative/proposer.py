"""Proposer: what guesses the tokens that are to follow, for the target to verify.

A guess can change no token: the target draws its own in every row, and a guess only saves the step
that would have computed the row behind it. So a proposer may guess as it likes. Tensor parallel
ranks each have one, and theirs must guess alike: a function of what was drawn, and of nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind
from samebit.kernels.memory import Arena
from samebit.kernels.reduce import RankGroup
from samebit.rollout.runtime.kv_cache import KVCache
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.scheduler import EngineStep
from samebit.rollout.runtime.served_draft import ServedDraft
from samebit.rollout.runtime.slots import Slots

MOST_UNREAD = 16
"""Steps in which a proposer that is shown streams is called at least once."""


class ProposerError(RuntimeError):
    """A proposer failed, or proposed what cannot be verified."""


class Context(NamedTuple):
    """A decoding sample whose next tokens are to be guessed."""

    sample: RunningSample
    """The same object for as long as the sample is unfinished: a key for a WeakKeyDictionary. How
    far it is stands in token_ids alone."""
    slot: int
    token_ids: np.ndarray
    """[L] int32, the prompt's and all that were drawn; not to be changed or kept. Where there is no
    room the newest may be on their way."""
    room: int
    """How many tokens may be guessed, from 0 on."""


class Proposal(NamedTuple):
    """What is guessed to follow a context, one behind another."""

    token_ids: Sequence[int] = ()
    confidences: Sequence[float] | None = None
    """How likely each is right, if the earlier ones are, in [0, 1]; an adaptive engine verifies
    none that is hardly reached, and else goes by how often earlier guesses were right."""


@dataclass(frozen=True)
class ProposerParts:
    """What of its engine a proposer may use."""

    vocab_size: int
    num_draft_tokens: int
    slots: Slots
    runner: Runner
    cache: KVCache
    """Of a draft model the last layer's: pages are forked, kept and found again with the rest."""
    attention: AttentionKind
    arena: Arena
    ranks: RankGroup
    num_positions: int
    draft: ServedDraft | None


class Proposer(ABC):
    """Guesses tokens for an engine's decoding samples; made once for an engine, and by it."""

    takes_draft: ClassVar[bool] = False
    """Of a class of your own: whether it guesses by the engine's draft model, `parts.draft`, so
    that engine.draft_model must be given; else it must not."""
    streams: tuple[int, ...] = ()
    """Layers whose residual streams `observe` is to be shown, as in Request.hidden_state_layers. An
    engine that shows any calls `propose` at least every MOST_UNREAD steps: without room where
    nothing is to be guessed, and then before the newest tokens have arrived."""
    cost: float = 0.0
    """Of guessing one more token for a batch, as a part of what a step of the target costs."""
    is_preparing: bool = False
    """Whether it has still to read what samples begin with: that it guesses nothing for one says
    nothing of the others, or of later."""
    round_cost: float = 0.0
    """Of guessing for a batch at all, however many tokens, as such a part."""

    def __init__(self, parts: ProposerParts) -> None:
        self.parts = parts

    @abstractmethod
    def propose(self, contexts: Sequence[Context]) -> Sequence[Proposal]:
        """A proposal for each context, of no more tokens than it has room for; possibly none."""

    def rest(self) -> None:  # noqa: B027 - most keep nothing
        """Let go of what belongs to samples: none is unfinished."""

    def observe(  # noqa: B027 - nothing is to be seen without streams
        self, step: EngineStep, collected: dict[int, Tensor]
    ) -> None:
        """See what a forward has computed: streams [T, D] by layer, in the step's rows."""
