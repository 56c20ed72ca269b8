"""A request that one engine has left off: what is left of it for another, and its samples put
together. By the promise they are those of one engine alone. No torch here."""

from collections.abc import Iterable
from dataclasses import replace

from samebit.rollout.types import Completion, Request


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
    for span in rest.version_spans:
        if span.version != spans[-1].version:
            spans += (replace(span, start=begins + span.start, recomputed=True),)
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
