"""Readers of streams, and threads that are to end."""

import itertools
import threading
from contextlib import aclosing


async def parts_of(stream, take=None):
    """Increments by sample id; of an endless stream the first ones."""
    parts = {}
    async with aclosing(stream) as increments:
        count = 0
        async for part in increments:
            parts.setdefault(part.sample_id, []).append(part)
            count += 1
            if count == take:
                break
    return parts


def put_together(parts, found):
    """A sample's increments are the completion, to the bit."""
    assert tuple(itertools.chain(*(p.token_ids for p in parts))) == found.token_ids
    assert tuple(itertools.chain(*(p.logprobs for p in parts))) == found.logprobs
    assert [p.finish_reason for p in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].finish_reason == found.finish_reason
    assert parts[-1].version_spans == found.version_spans
    assert len({p.request_id for p in parts}) == 1


def wait_until(condition):
    """The loop's thread gets there, or the test fails."""
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came about")


def loop_threads():
    return [t for t in threading.enumerate() if t.name == "samebit engine loop"]
