"""What the processes that train together agree on: who is first, whose error is everybody's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from samebit.weight_sync.failures import CrashError, cause, may_pass
from samebit.weight_sync.objects import gather_by, gather_objects


def place() -> tuple[int, int]:
    """(rank, size) of this process among those that train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def begin_of_thread(timeout: timedelta) -> Callable[[], None]:
    """Return what a thread has to call first, whose like every process starts, to tell the others
    what this module tells them while the main threads do, too.

    All processes call this alike. timeout: how long one waits for the others there.
    """
    if place()[1] == 1:
        return lambda: None
    return partial(gather_by, dist.new_group(timeout=timeout, backend="gloo"))


def is_first() -> bool:
    """Whether this process writes what there is one of."""
    return place()[0] == 0


@contextmanager
def together(error_type: type[Exception]) -> Iterator[None]:
    """Every process runs the block; where one fails, the others raise its error as error_type, or
    as a CrashError if it may pass: whoever is seen to end first, starting again means the same.

    Where several fail, `cause` says whose failure counts; one of the same kind raises its own.
    """
    own: BaseException | None = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - the others are told first
        own = error
    said = "" if own is None else f"rank {place()[0]}: {own}"
    failure = cause(gather_objects((said, own is not None and may_pass(own))))
    if failure is None:
        return
    words, passes = failure
    if own is not None and may_pass(own) == passes:
        raise own
    raise (CrashError if passes else error_type)(words) from own


def on_first[T](function: Callable[[], T], error_type: type[Exception]) -> T:
    """The result of `function`, which the first process alone runs, on every one.

    It is a plain value (weight_sync.objects).
    """
    result: T | None = None
    with together(error_type):
        if is_first():
            result = function()
    first: T = gather_objects(result)[0]  # type: ignore[assignment]
    return first
