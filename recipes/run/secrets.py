"""Values that a run uses and nothing shows: what an interpolation gives, and secrets by name.

A guarded value is the text or number itself; its repr, and the configuration as it is written or
printed, have the interpolation in its place, or ***.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

HIDDEN = "***"
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SECRET_WORDS = {
    "apikey", "auth", "authorization", "bearer", "credential", "credentials", "passphrase",
    "passwd", "password", "pwd", "secret", "secrets", "token",
}  # fmt: skip
_SECRET_KEYS = re.compile(r"(?i)(api|access|auth|private|secret|encryption)[_-]?key")
_VARIABLE = re.compile(r"oc\.env:\s*(\w+)")
_REFERENCE = re.compile(r"\$\{[\w.:]+\}")  # names a secret, does not hold it
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?(e[-+]?[0-9]+)?", re.IGNORECASE)
_NAME = re.compile(r"([\w-]+)['\"]?\s*[:=]\s*")
_VALUE = re.compile(r"""'[^']*'|"[^"]*"|\[[^]]*\]|\$?\{[^}]*\}|[^\s,}]+""")


class Guarded:
    """Is a value together with what stands for it where it is shown."""

    shown: str
    secret: bool
    """Whether its name says that it is one: then nothing is derived from it either."""

    def __repr__(self) -> str:
        return repr(self.shown)


class GuardedText(Guarded, str):
    """Is a guarded text; as a str it is the text."""

    __str__ = str.__str__


class GuardedInt(Guarded, int):
    """Is a guarded whole number."""

    __str__ = int.__repr__


class GuardedFloat(Guarded, float):
    """Is a guarded number."""

    __str__ = float.__repr__


_GUARDS: dict[type, type[Any]] = {str: GuardedText, int: GuardedInt, float: GuardedFloat}


def is_secret_name(name: str, value: Any = "") -> bool:
    """Say whether a free argument's name says that its value is a secret.

    A number is one only under a name that ends so: token_budget=100 is none.
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    if _SECRET_KEYS.search(name):
        return True
    considered = words if isinstance(value, str) else words[-1:]
    return not _SECRET_WORDS.isdisjoint(considered)


def without_secrets(word: str) -> str:
    """Return a word of a command line, with *** for each value whose key says it is a secret.

    A value that names a secret, as ${oc.env:NAME} does, is none.
    """
    key, equals, value = word.partition("=")
    *sections, name = key.split(".")
    if equals and (_names_secret(name, value) or any(is_secret_name(x, {}) for x in sections)):
        return word if _REFERENCE.fullmatch(value) else f"{key}={HIDDEN}"
    return _USER_IN_URL.sub(f"{HIDDEN}@", _without_secrets_inside(word))


def _without_secrets_inside(word: str) -> str:
    parts, place = [], 0
    for found in _NAME.finditer(word):
        value = _VALUE.match(word, found.end())
        hidden = value is not None and _names_secret(found[1], value[0])
        if value is None or not hidden or found.start() < place or _REFERENCE.fullmatch(value[0]):
            continue
        parts += [word[place : found.end()], HIDDEN]
        place = value.end()
    return "".join([*parts, word[place:]])


def _names_secret(name: str, typed: str) -> bool:
    """is_secret_name for a value as it is typed."""
    return is_secret_name(name, 0 if _NUMBER.fullmatch(typed) else typed)


def build(schema: Any, values: Mapping[str, Any], raw: Any) -> Any:
    """Return the dataclass of resolved `values`, guarded by what `raw`, unresolved, says."""
    types = get_type_hints(schema)
    return schema(**{name: _built(types[name], x, _at(raw, name)) for name, x in values.items()})


def _built(annotation: Any, value: Any, raw: Any) -> Any:
    section = dataclass_of(annotation)
    if section is not None and isinstance(value, Mapping):
        return build(section, value, raw)
    element = element_of(annotation)
    if element is not None and isinstance(value, list):
        return [build(element, x, _at(raw, i)) for i, x in enumerate(value)]
    free = get_origin(annotation) is dict
    return _guarded(value, raw, free=free, secret=False)


def dataclass_of(annotation: Any) -> Any:
    """Return the dataclass that a field holds, or may hold; None if there is none."""
    return next((t for t in (annotation, *get_args(annotation)) if is_dataclass(t)), None)


def element_of(annotation: Any) -> Any:
    """Return the dataclass that a list holds; None of anything else."""
    inner = get_args(annotation) if get_origin(annotation) is list else ()
    return next(filter(is_dataclass, inner), None)


def _at(raw: Any, key: Any) -> Any:
    """A part of the unresolved values; where the whole is one interpolation, that."""
    return raw if isinstance(raw, str) else raw[key]


def _guarded(value: Any, raw: Any, *, free: bool, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            k: _guarded(x, _at(raw, k), free=free, secret=secret or is_secret_name(str(k), x))
            for k, x in value.items()
        }
    if isinstance(value, list):
        return [_guarded(x, _at(raw, i), free=free, secret=secret) for i, x in enumerate(value)]
    source = raw if isinstance(raw, str) and raw != value and raw != escaped(str(value)) else None
    kind = _GUARDS.get(type(value))
    if kind is None or not (source or secret) or not (free or kind is GuardedText):
        return value
    guarded = kind(value)
    guarded.shown = source or HIDDEN
    variables = _VARIABLE.findall(source or "")
    guarded.secret = secret or any(map(is_secret_name, variables))
    return guarded


def scrubbed(message: str, value: Any) -> str:
    """Return a message with what stands for the guarded values of a configuration in it."""
    if is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            message = scrubbed(message, inner)
    elif isinstance(value, Guarded) and len(str(value)) > 3:  # shorter ones are in any word
        message = message.replace(str(value), value.shown)
    return message


def escaped(text: str) -> str:
    """Return text that OmegaConf reads as `text`, whatever stands in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def plain(value: Any, text: Callable[[str], str] = str, *, shown: bool = True) -> Any:
    """Return dataclasses as plain values, as they may be shown; each text goes through `text`.

    With shown=False guarded values are themselves, but for secrets.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), text, shown=shown) for f in fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(x, text, shown=shown) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x, text, shown=shown) for x in value]
    if isinstance(value, Guarded):
        if shown or value.secret:
            return value.shown
        value = next(kind for kind in _GUARDS if isinstance(value, kind))(value)
    return text(value) if isinstance(value, str) else value


def to_yaml(run: Any) -> str:
    """Return the resolved configuration as YAML, as it may be shown."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(plain(run, escaped)))


def to_dict(run: Any, *, shown: bool = True) -> dict[str, Any]:
    """Return the resolved configuration as plain values, as it may be shown.

    With shown=False it has what interpolations gave, for comparisons and digests; secrets by name
    are never in it.
    """
    return plain(run, shown=shown)
