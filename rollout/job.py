"""Job: a request on its way through replicas. No torch here.

One may leave it off, and another goes on with what is left of it: by the promise its samples are
those of one engine alone.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from samebit.rollout.types import Completion, Request


@dataclass(eq=False, slots=True)
class Job:
    """A request that waits, or that a replica draws."""

    request: Request
    number: int
    """Its own, by which a replica is asked to draw it."""
    answer: Callable[[list[Completion] | BaseException], object]
    """Is told of its samples, or why there are none."""
    is_wanted: bool = True
    """Whether anybody waits for it."""
    has_begun: bool = False
    """Whether the replica that it was given to was asked to draw it."""
    may_move: bool = True
    """Whether who draws it may be asked to leave it off: it was not yet, and nobody aborts it."""
    next_home: Hashable = None
    """The replica that is to go on with it, where the one that draws it leaves off, or has."""
    outcome: list[Completion] | BaseException | None = None
    """What `answer` was told."""
    requests: tuple[Request, ...] = field(init=False)
    """What a replica is asked for: its request, or what others have left of that."""
    num_samples: int = field(init=False)
    """What it takes of a replica's room: those that have not ended."""
    _drawn: dict[int, Completion] = field(default_factory=dict)
    """What others have drawn, by sample ids."""

    def __post_init__(self) -> None:
        self.requests = (self.request,)
        self.num_samples = len(self.request.sample_ids)

    def settle(self, outcome: list[Completion] | BaseException) -> None:
        """Tell who waits for it."""
        self.outcome = outcome
        self.answer(outcome)

    def take(self, found: Sequence[Completion]) -> list[Completion] | None:
        """Its samples, with what a replica has made of `requests`; None: that one was to leave off,
        and another is to go on with what is left."""
        drawn, group = self._drawn, list(found)
        if drawn:
            ends = drawn | {c.sample_id: put_together(drawn[c.sample_id], c) for c in found}
            group = [ends[sample_id] for sample_id in self.request.sample_ids]
        if self.next_home is None or not (left := what_is_left(self.request, group)):
            return group
        self._drawn, self.requests = {c.sample_id: c for c in group}, tuple(left)
        self.num_samples = len(self.unfinished)
        return None

    def left_as_it_is(self) -> list[Completion]:
        """Its samples, whose rest nobody draws."""
        rest = [_nothing(self.request.request_id, sample_id) for sample_id in self.unfinished]
        group = self.take(rest)
        assert group is not None, "somebody is to go on with it"
        return group

    @property
    def unfinished(self) -> list[int]:
        """The ids of the samples that a replica is asked for."""
        return [sample_id for request in self.requests for sample_id in request.sample_ids]

    @property
    def can_move(self) -> bool:
        """Whether one can leave it off and another go on: what is drawn is in its completions."""
        request = self.request
        is_drawn = not request.score_only and not request.hidden_state_layers
        return self.has_begun and self.may_move and self.is_wanted and is_drawn

    @property
    def num_tokens(self) -> int:
        """The most that is computed for it, as it was asked for."""
        request = self.request
        drawn = 0 if request.score_only else request.params.max_new_tokens
        return len(request.prompt_ids) + drawn * self.num_samples


def _nothing(request_id: str, sample_id: int) -> Completion:
    return Completion(
        request_id=request_id,
        sample_id=sample_id,
        token_ids=(),
        logprobs=(),
        finish_reason="abort",
        version_spans=(),
    )


def what_is_left(request: Request, group: Iterable[Completion]) -> list[Request]:
    """Requests for the rest of the samples that were aborted: each goes on behind its own tokens.

    group: the request's samples as far as they are. Those that have the same tokens, such as none,
    stay together.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for completion in group:
        if completion.finish_reason == "abort":
            alike.setdefault(completion.token_ids, []).append(completion.sample_id)
    return [_after(request, token_ids, tuple(ids)) for token_ids, ids in alike.items()]


def put_together(first: Completion, rest: Completion) -> Completion:
    """A sample that was drawn in two parts, of which either may be empty."""
    if not first.token_ids:
        return replace(rest, request_id=first.request_id)
    spans, begins = first.version_spans, len(first.token_ids)
    was_mixed = len(spans) > 1 and not spans[-1].recomputed
    for i, span in enumerate(rest.version_spans):
        if i or was_mixed or span.version != spans[-1].version:
            anew = span.recomputed or not i
            spans += (replace(span, start=begins + span.start, recomputed=anew),)
    return replace(
        rest,
        request_id=first.request_id,
        token_ids=first.token_ids + rest.token_ids,
        logprobs=first.logprobs + rest.logprobs,
        thresholds=first.thresholds + rest.thresholds,
        version_spans=spans,
    )


def _after(request: Request, token_ids: tuple[int, ...], sample_ids: tuple[int, ...]) -> Request:
    params, count = request.params, len(token_ids)
    return replace(
        request,
        request_id=f"{request.request_id} from {count} of {sample_ids[0]}",
        prompt_ids=request.prompt_ids + token_ids,
        params=replace(
            params,
            n=len(sample_ids),
            max_new_tokens=params.max_new_tokens - count,
            min_new_tokens=max(0, params.min_new_tokens - count),
        ),
        sample_ids=sample_ids,
    )
