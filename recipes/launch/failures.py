"""Which errors a run's processes end with: those that we expect, and those that may pass."""


def is_expected(error: BaseException) -> bool:
    """Say whether it is one of our own errors, or an OSError, ValueError or ImportError."""
    ours = type(error).__module__.startswith("samebit.")
    return ours or isinstance(error, OSError | ValueError | ImportError)


def may_pass(error: BaseException) -> bool:
    """Say whether starting again may help: no error that we expect, but a process that has died."""
    from samebit.rollout.remote import RemoteEngineError  # not at the top: --help needs no torch
    from samebit.weight_sync.types import LostMemberError

    return isinstance(error, RemoteEngineError | LostMemberError) or not is_expected(error)
