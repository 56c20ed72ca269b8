"""What "module:name" says where a setting may be something of the user's own. No torch here."""

import importlib
from typing import Any


def import_named(name: str, key: str) -> Any:
    """What "module:attribute" names; ValueError, naming the key, if it cannot be imported."""
    module, _, attribute = str(name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # it may do anything
        what = error if isinstance(error, ImportError | AttributeError) else repr(error)
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            what = f"{error}; put its folder on PYTHONPATH, which the present folder is not on"
        raise ValueError(f"{key} is {name!r}, which cannot be imported: {what}") from error


def import_class(name: str, key: str, base: type[Any]) -> Any:
    """The subclass of `base` that "module:Class" names; ValueError, naming the key, if none."""
    found = import_named(name, key)
    if not (isinstance(found, type) and issubclass(found, base)):
        what = f"a subclass of {base.__module__}:{base.__name__}"
        raise ValueError(f"{key} is {name!r}; it must be {what}")
    return found
