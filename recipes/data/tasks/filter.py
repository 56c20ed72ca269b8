"""Which records of files are used: what a function of the user's says of each, data.filter."""

from collections.abc import Callable

from samebit.kernels.named import import_named
from samebit.recipes.data.tasks.base import DataConfig, Problem
from samebit.rollout.values import shown


def load_filter(config: DataConfig) -> Callable[[Problem], bool]:
    """Return what says whether a record is used; without data.filter all are.

    Raises ValueError, naming data.filter, if it is no function. What is returned raises it, naming
    the record, where the user's function raises or returns something else than a bool.
    """
    name = config.filter
    if name is None:
        return lambda problem: True
    function = import_named(name, "data.filter")
    if not callable(function):
        raise ValueError(f"data.filter is {name!r}, a {type(function).__name__}; give a function")

    def keeps(problem: Problem) -> bool:
        try:
            found = function(problem)
        except (Exception, SystemExit) as error:  # the user's own may raise anything
            raise ValueError(f"{problem.where}: data.filter raised {shown(error)}") from error
        if not isinstance(found, bool):
            what = "give True, which keeps the record, or False"
            raise ValueError(f"{problem.where}: data.filter returned {shown(found)}; {what}")
        return found

    return keeps
