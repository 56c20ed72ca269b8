"""The words of a command line, read by the types of the fields that they name.

A field that is text takes its text exactly as typed; numbers, flags, lists, sections and free
arguments are in Hydra's grammar.
"""

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from samebit.recipes.config import ConfigError
from samebit.recipes.run.secrets import HIDDEN, element_of, escaped, is_secret_name

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_ELEMENT = re.compile(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]*?)\s*(?:,|$)""")
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[int]: "a list such as [1,2]",
}
# Words of earlier versions, and what they are now.
_MOVED = {
    "engine.placement": "placement.engine",
    "engine.transport": "placement.transport",
    "engine=colocated": "placement=colocated",
    "engine=process": "placement=process",
}


@dataclass(frozen=True)
class Field:
    """Holds the type of a key, without the None that it may also be."""

    kind: Any
    optional: bool = False

    @property
    def is_section(self) -> bool:
        """Say whether it has keys of its own."""
        return is_dataclass(self.kind)

    @property
    def element(self) -> Any:
        """This section each element of its list is, if it is such a list."""
        return element_of(self.kind)

    @property
    def words(self) -> str:
        """Say what it takes, for a message."""
        if self.element is not None:
            return "a list of sections, such as [{path: a}, {path: b}]"
        words = _WORDS.get(self.kind, "a section, such as {name: value}")
        return f"{words}, or null" if self.optional else words

    @property
    def is_free(self) -> bool:
        """Say whether it is what a task or a reward takes, or a part of it."""
        return self.kind is Any or get_origin(self.kind) is dict


@dataclass
class Overrides:
    """Holds what a command line gives, in order."""

    choices: list[str] = field(default_factory=list)
    """Of groups, for Hydra to read."""
    values: list[tuple[str, Any]] = field(default_factory=list)
    """Of keys, for OmegaConf; interpolations in them, if any, are meant."""

    def given(self, key: str) -> Any:
        """Return the last value of a key, or None."""
        return next((value for name, value in reversed(self.values) if name == key), None)


def find_field(schema: Any, key: str) -> Field | None:
    """Return what a dotted key names; None if it names nothing."""
    found = Field(schema)
    for part in key.split("."):
        if found.is_section:
            if part not in {f.name for f in fields(found.kind)}:
                return None
            found = _without_none(get_type_hints(found.kind)[part])
        elif found.is_free:
            found = Field(Any)
        else:
            return None
    return found


def _without_none(annotation: Any) -> Field:
    kinds = [t for t in get_args(annotation) if t is not NoneType]
    optional = NoneType in get_args(annotation)
    return Field(kinds[0], True) if optional else Field(annotation)


def read_words(
    words: Iterable[str], schema: Any, groups: Mapping[str, Collection[str]]
) -> Overrides:
    """Read words `key=value`, or `--flag` for flag=true; of a key given twice the last one holds.

    `groups` has the choices that each group of configuration files offers. Raises ConfigError,
    naming the key, for what cannot be read.
    """
    found = Overrides()
    for word in words:
        key, value, plus = _split(word, schema)
        if moved := _MOVED.get(f"{key}={value}"):
            raise ConfigError(f"there is no {key}={value}; it is {moved} now")
        if key in groups and not value.startswith("{"):
            _check_choice(key, value, groups[key])
            found.choices.append(f"{key}={value}")
            continue
        named = find_field(schema, key)
        if plus and (named is None or not named.is_free):
            raise ConfigError(f"'{word}' is no key=value of an existing key")
        if named is None:
            raise ConfigError(f"unknown key: {key}{_nearest(schema, key, groups)}")
        found.values.append((key, _value(key, value, named)))
    return found


def _value(key: str, value: str, named: Field) -> Any:
    if named.optional and value.lower() == "null":
        return None
    if named.kind is str:
        return _text(key, value)
    if named.kind == list[str] and not value.startswith("${"):
        return _texts(key, value)
    return _in_grammar(key, value, named)


def _split(word: str, schema: Any) -> tuple[str, str, bool]:
    """Key, value, and whether a plus sign asks for a new key."""
    flag = word.startswith("--") and "=" not in word
    own = word.removeprefix("--") if word.startswith("--") else word.lstrip("+")
    key, equals, value = own.partition("=")
    if not _KEY.fullmatch(key) or not (equals or flag):
        raise ConfigError(f"'{word}' is no key=value of an existing key")
    if flag:
        named = find_field(schema, key)
        if named is not None and named.kind is not bool and not named.is_free:
            raise ConfigError(f"{word} is short for {key}=true; give {key}=...")
        value = "true"
    return key, value, word.startswith("+")


def _check_choice(group: str, value: str, choices: Collection[str]) -> None:
    """A plain name must be one of them; Hydra reads the rest, such as lists of names."""
    plain = re.fullmatch(r"""[^'"{}\[\]$]*""", value)
    if plain and value not in choices:
        known = ", ".join(f"{group}={name}" for name in choices)
        own = f"; your own function is reward.name={value}" if ":" in value else ""
        raise ConfigError(f"there is no {group}/{value}; give one of {known}{own}")


def _text(key: str, value: str) -> str:
    quoted = _unquoted(value)
    return _checked(key, value if quoted is None else quoted)


def _checked(key: str, text: str) -> str:
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"{key} is {text!r}; it must be UTF-8 text without NUL")
    return as_written(text)


def as_written(text: str) -> str:
    """Return text for OmegaConf: `${...}` interpolates if it can be read so, and else is text."""
    if "${" not in text:
        return text
    try:
        parse(text)
    except GrammarParseError:
        return escaped(text)
    return text


def _parsed(value: str) -> Any:
    """A value in Hydra's grammar, with its marks of quoting; ValueError for what is not in it."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")._value
    except HydraException as error:
        raise ValueError(value) from error
    if isinstance(parsed, Sweep):  # a,b
        raise ValueError(value)
    return parsed


def _unquoted(value: str) -> str | None:
    """What is between quotes that enclose a whole value, as Hydra reads it; None without them."""
    if len(value) < 2 or value[0] not in "'\"" or value[-1] != value[0]:
        return None
    try:
        parsed = _parsed(value)
    except ValueError:
        return None
    return parsed.text if isinstance(parsed, QuotedString) else None


def _texts(key: str, value: str) -> list[str]:
    """A list of texts: in Hydra's grammar where that gives texts, else what the commas part."""
    if not (value.startswith("[") and value.endswith("]")):
        raise ConfigError(f"{key} is {value!r}; it must be a list such as [a,b]")
    try:
        texts = _without_quotes(_parsed(value))
    except ValueError:
        texts = None
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        elements = [found[1] for found in _ELEMENT.finditer(value[1:-1])][:-1]
        texts = [x if (inner := _unquoted(x)) is None else inner for x in elements]
    return [_checked(key, text) for text in texts]


def _without_quotes(parsed: Any) -> Any:
    if isinstance(parsed, QuotedString):
        return as_written(parsed.text)
    if isinstance(parsed, dict):
        return {str(key): _without_quotes(x) for key, x in parsed.items()}
    return [_without_quotes(x) for x in parsed] if isinstance(parsed, list) else parsed


def _in_grammar(key: str, value: str, named: Field) -> Any:
    """A number, a flag, a list of numbers, a section or a free argument."""
    try:
        parsed = _without_quotes(_parsed(value)) if value else ""
    except ValueError as error:
        if not named.is_free:
            raise ConfigError(f"{key} is {value!r}; it must be {named.words}") from error
        shown = HIDDEN if any(map(is_secret_name, key.split("."))) else value
        quoted = shlex.quote(f"{key}={QuotedString(shown, Quote.double).with_quotes()}")
        raise ConfigError(f"{key}={shown} cannot be read; quote a text: {quoted}") from error
    if named.is_section:
        if not isinstance(parsed, dict):
            raise ConfigError(f"{key} is {value!r}; it must be {named.words}")
        _check_section(named.kind, f"{key}.", parsed)
    _check_flag(named, key, parsed)
    if named.element is not None:
        _check_elements(named, key, parsed)
    return parsed


def _check_elements(named: Field, key: str, parsed: Any) -> None:
    """ConfigError unless a value is a list of sections with keys of their own."""
    if not isinstance(parsed, list) or not all(isinstance(x, dict) for x in parsed):
        raise ConfigError(f"{key} is {parsed!r}; it must be {named.words}")
    for i, element in enumerate(parsed):
        _check_section(named.element, f"{key}.{i}.", element)


def _check_section(schema: Any, prefix: str, values: Mapping[str, Any]) -> None:
    """ConfigError for a key that a section has not, or a number where text or a flag belongs."""
    for name, value in values.items():
        key, named = f"{prefix}{name}", find_field(schema, name)
        if named is None:
            raise ConfigError(f"unknown key: {key}{_nearest(schema, name, (), prefix)}")
        if named.is_section and isinstance(value, Mapping):
            _check_section(named.kind, f"{key}.", value)
        if named.element is not None:
            _check_elements(named, key, value)
        texts = value if isinstance(value, list) else [value]
        if named.kind in (str, list[str]) and not all(isinstance(x, str | None) for x in texts):
            raise ConfigError(f"{key} is {value!r}, no text: quote it")
        _check_flag(named, key, value)


def _check_flag(named: Field, key: str, value: Any) -> None:
    """ConfigError for a flag that is neither true nor false: OmegaConf would take 7 for true.

    Whether it may be null, and what an interpolation gives, is seen later.
    """
    is_open = value is None or (isinstance(value, str) and "${" in value)
    if named.kind is bool and not (is_open or _is_flag(value)):
        raise ConfigError(f"{key} is {value!r}; it must be {named.words}")


def _is_flag(value: Any) -> bool:
    """Whether it is true or false, or their text, as an environment variable has it."""
    return isinstance(value, bool) or str(value).lower() in ("true", "false")


def wrong_flags(schema: Any, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of flags that are neither true nor false, in a whole configuration whose
    interpolations are resolved, and which is not yet of the schema's types."""
    for name, value in values.items():
        key, named = f"{prefix}{name}", find_field(schema, name)
        assert named is not None
        if named.is_section and isinstance(value, Mapping):
            yield from wrong_flags(named.kind, value, f"{key}.")
        elif named.element is not None and isinstance(value, list):
            for i, element in enumerate(value):
                yield from wrong_flags(named.element, element, f"{key}.{i}.")
        elif named.kind is bool and not (value is None or _is_flag(value)):
            yield key


def check_file(file: Path, schema: Any) -> None:
    """Raise ConfigError, naming the file, for a number where text belongs (YAML: 2025_01_05), or
    where a flag does.

    `file` is a choice of a group: the group is the section that it is about, or all are.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    values = {key: value for key, value in content.items() if key != "defaults"}
    if not file.read_text(encoding="utf-8").startswith("# @package _global_"):
        values = {file.parent.name: values}
    try:
        _check_section(schema, "", values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _nearest(schema: Any, key: str, groups: Iterable[str], prefix: str = "") -> str:
    for old, new in _MOVED.items():
        if f".{prefix}{key}".endswith(f".{old}"):
            return f"; it is {f'{prefix}{key}'.removesuffix(old)}{new} now"
    known = dict.fromkeys([*_all_keys(schema), *groups])
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f". Did you mean: {', '.join(prefix + name for name in near)}?" if near else ""


def _all_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for f in fields(schema):
        yield prefix + f.name
        kind = _without_none(get_type_hints(schema)[f.name])
        if kind.is_section:
            yield from _all_keys(kind.kind, f"{prefix}{f.name}.")
