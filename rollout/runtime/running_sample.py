"""RunningSample: one sample while it runs. Private to the engine."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from samebit.rollout.types import Completion, Request
from samebit.weight_sync.types import VersionSpan, WeightVersion


@dataclass(eq=False, kw_only=True)
class RunningSample:
    """Tokens, pages and progress of one sample.

    The first `num_computed` of `token_ids` have their keys and values in `pages`, or will have once
    the steps in flight are done. `siblings` are the samples of the same prompt that wait for this
    one's prefill. A running sequence has a `slot` (see runtime/slots.py).
    """

    request: Request
    index: int
    arrival: int
    token_ids: list[int]
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: str | None = None
    siblings: list["RunningSample"] = field(default_factory=list)
    hidden: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    slot: int | None = None

    @property
    def sample_id(self) -> int:
        """The id that keys this sample's noise."""
        return self.request.sample_ids[self.index]

    @property
    def prompt_len(self) -> int:
        """Tokens that were given."""
        return len(self.request.prompt_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_to_compute(self) -> int:
        """Tokens whose keys and values are still to be computed.

        The last token of a score_only request predicts nothing that is asked for.
        """
        return len(self.token_ids) - self.num_computed - self.request.score_only

    def restart(self) -> None:
        """Forget what was computed; keep what was drawn."""
        self.num_computed = 0
        self.hidden = {}
        if self.request.score_only:
            self.logprobs = []

    def append(
        self, token_ids: Iterable[int], logprobs: Iterable[float], version: WeightVersion
    ) -> None:
        """Add drawn tokens."""
        if not self.spans or self.spans[-1].version != version:
            self.spans.append(VersionSpan(self.num_new_tokens, version))
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)

    def add_hidden(self, collected: dict[int, torch.Tensor], rows: slice) -> None:
        """Keep this step's part of the hidden states asked for."""
        for layer in self.request.hidden_state_layers:
            self.hidden.setdefault(layer, []).append(collected[layer][rows].clone())

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
            hidden_states={layer: torch.cat(parts) for layer, parts in self.hidden.items()},
        )
