"""What a user's own algorithm raises, said with its name. No torch here."""

from collections.abc import Iterator
from contextlib import contextmanager

_OURS = "samebit."


@contextmanager
def naming_algorithm(algorithm: object, method: str) -> Iterator[None]:
    """Raise ValueError, with the algorithm's class and the method, for such errors in the block as
    mistakes in Python make, and for an exit; not those of our own algorithms."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, SystemExit) as error:
        kind = type(algorithm)
        if kind.__module__.startswith(_OURS):
            raise
        raise ValueError(
            f"the algorithm {kind.__module__}:{kind.__qualname__} raised {error!r} in {method} "
            "(SAMEBIT_TRACEBACK=1 shows where)"
        ) from error
