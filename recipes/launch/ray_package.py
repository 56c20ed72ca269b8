"""Whether Ray is installed, and its errors in our words. Imports nothing of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class RayError(RuntimeError):
    """Ray cannot be reached, or cannot do what is asked of it."""


def require_ray(why: str) -> None:
    """Raise ImportError, with what would do, unless the package is installed."""
    if find_spec("ray") is None:
        raise ImportError(
            f"{why} needs the package ray: pip install 'samebit[ray]', with constraints.txt"
        )


@contextmanager
def in_our_words(what: str) -> Iterator[None]:
    """Say what Ray could not do; its own errors are long, and of many types."""
    try:
        yield
    except RayError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise RayError(f"{what}: {said[0]}") from error
