"""Which errors a run's processes end with: those that we expect, and those that may pass.

Imports no torch.
"""

from collections.abc import Iterable


class CrashError(RuntimeError):
    """Another process has died, or has met an error that nobody expects."""


def is_expected(error: BaseException) -> bool:
    """Say whether it is one of our own errors, or an OSError, ValueError or ImportError."""
    ours = type(error).__module__.startswith("samebit.")
    return ours or isinstance(error, OSError | ValueError | ImportError)


def may_pass(error: BaseException) -> bool:
    """Say whether starting again may help: no error that we expect, but a process that has died.

    Where several processes fail together, all are to end with errors of which it says the same.
    """
    if isinstance(error, CrashError):
        return True
    return isinstance(error, Exception) and not is_expected(error)


def cause(told: Iterable[tuple[str, bool]]) -> tuple[str, bool] | None:
    """Return which of several processes' failures counts for all, None if none has failed.

    told: of each what its failure says, empty without one, and whether it may pass. The first that
    would come again is the cause: others may have seen no more of it than that a process was lost.
    """
    failures = [(words, passes) for words, passes in told if words]
    return min(failures, key=lambda failure: failure[1], default=None)
