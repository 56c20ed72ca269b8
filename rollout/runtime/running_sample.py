"""RunningSample: the engine's record of one sample. Private to the engine.

Who writes what:

| field | written by |
|---|---|
| request, index, arrival | `of`, once |
| status, siblings | `of`; then the Scheduler, as it moves the sample |
| finish_reason, pages | the Scheduler (Slots.pages is a copy for the device) |
| slot | Slots.enter and Slots.leave |
| token_ids, logprobs | Slots.leave; the StepLoop for a sample without a slot, and for a score |
| thresholds | with the log-probs, where those are truncated |
| num_computed | Slots.leave; the Scheduler for a sample without a slot |
| spans | with each token that comes in: Slots.append, or the StepLoop without a slot |
| is_mixed, swapped | the Scheduler; `restart` forgets both |
| hidden, top | the StepLoop; `restart` forgets them |
| page_keys | AwaitedPages |

While a sample holds a slot, its progress stands in the arrays of Slots: the tokens that it draws
and how far its context is computed. token_ids and logprobs are then what it had when it entered,
and Slots.leave adds the rest. So each token has one place, and a step over hundreds of samples
touches none of these objects.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

import torch
from torch import Tensor

from samebit.kernels.top_tokens import TopTokens
from samebit.rollout.types import Completion, Request
from samebit.weight_sync.types import VersionSpan, WeightVersion


class Status(Enum):
    """Where a sample stands."""

    WAITING = "waiting"
    """It is in the queue, without slot or pages; a mixed one has its pages in host memory."""
    FORKING = "forking"
    """It waits for the prefill of another sample of its prompt; a slot may be reserved for it."""
    PREFILLING = "prefilling"
    """It holds a slot, and parts of its context are still to be planned."""
    DECODING = "decoding"
    """It holds a slot, and all of its context is computed or on its way. It draws a token a step
    until the last one is on its way; a score draws none."""
    FINISHED = "finished"
    """It has a finish_reason, and neither slot nor pages."""


@dataclass(eq=False, kw_only=True)
class RunningSample:
    """One sample from its request to its completion; see the table above.

    The first `num_computed` of `token_ids` have their keys and values in `pages`, or, as long as
    it waits, in `swapped`. Those of a mixed sample are by several weight versions, so that they
    cannot be computed anew. `siblings` are the samples of the same prompt that wait for this one's
    prefill.
    """

    request: Request
    index: int
    arrival: int
    token_ids: list[int]
    status: Status = Status.WAITING
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: str | None = None
    siblings: list["RunningSample"] = field(default_factory=list)
    hidden: dict[int, list[Tensor]] = field(default_factory=dict)
    top: list[TopTokens] = field(default_factory=list)
    slot: int | None = None
    is_mixed: bool = False
    begun_anew: bool = False
    """What was computed was forgotten, and it has drawn nothing since."""
    swapped: list[Tensor] = field(default_factory=list)
    page_keys: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, arrivals: Iterator[int]) -> list[Self]:
        """The samples of a request; the first one waits, the others wait for its prefill."""
        first, *others = [
            cls(request=request, index=i, arrival=next(arrivals), token_ids=[*request.prompt_ids])
            for i in range(len(request.sample_ids))
        ]
        for sample in others:
            sample.status = Status.FORKING
        first.siblings.extend(others)
        return [first, *others]

    @property
    def sample_id(self) -> int:
        return self.request.sample_ids[self.index]

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens drawn; of a sample with a slot, those that it had when it entered."""
        return len(self.token_ids) - self.prompt_len

    def restart(self) -> None:
        """Forget what was computed; keep what was drawn."""
        self.num_computed = 0
        self.hidden = {}
        self.begun_anew, self.is_mixed, self.swapped = True, False, []
        if self.request.score_only:
            self.logprobs, self.top = [], []

    def append(
        self, token_id: int, logprob: float, version: WeightVersion, threshold: float | None = None
    ) -> None:
        """Add a drawn token; the sample has no slot."""
        assert self.slot is None
        self.stamp(len(self.token_ids), version)
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        if self.request.params.truncates:
            assert threshold is not None
            self.thresholds.append(threshold)

    def stamp(self, position: int, version: WeightVersion) -> None:
        """Note who draws the token at `position` of the context, and those after it."""
        begun_anew, self.begun_anew = self.begun_anew, False
        if not self.spans:
            self.spans.append(VersionSpan(position - self.prompt_len, version))
            return
        last = self.spans[-1]
        was_mixed = len(self.spans) > 1 and not last.recomputed
        if last.version != version or (begun_anew and was_mixed):
            self.spans.append(VersionSpan(position - self.prompt_len, version, begun_anew))

    def add_hidden(self, collected: dict[int, Tensor], rows: slice) -> None:
        """Keep this step's part of the hidden states asked for."""
        for layer in self.request.hidden_state_layers:
            self.hidden.setdefault(layer, []).append(collected[layer][rows].clone())

    def add_scores(self, logprobs: list[float], rows: slice, top: TopTokens | None) -> None:
        """Keep this step's part of what a score has asked for: log-probs, and of the step's
        likeliest tokens those of these rows."""
        self.logprobs += logprobs
        if self.request.num_top:
            assert top is not None
            self.top.append(top.select(rows).first(self.request.num_top))

    def end(self, reason: str) -> None:
        self.status, self.finish_reason = Status.FINISHED, reason

    def completion(self) -> Completion:
        """The finished sample as users see it."""
        assert self.finish_reason is not None
        return Completion(
            request_id=self.request.request_id,
            sample_id=self.sample_id,
            token_ids=tuple(self.token_ids[self.prompt_len :]),
            logprobs=tuple(self.logprobs) if self.request.params.logprobs else (),
            finish_reason=self.finish_reason,
            version_spans=tuple(self.spans),
            thresholds=tuple(self.thresholds) if self.request.params.logprobs else (),
            hidden_states={layer: torch.cat(parts) for layer, parts in self.hidden.items()},
            top_tokens=TopTokens.joined(self.top) if self.top else None,
        )
