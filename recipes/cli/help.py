"""What --help shows of a configuration: YAML, with the words under each field. No torch here."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from samebit.recipes.run.secrets import dataclass_of


def documented_yaml(schema: type[Any], config: Mapping[str, Any], indent: str = "") -> str:
    """Return the plain values of a configuration as YAML with comments."""
    return "".join(_lines(schema, config, indent))


def _lines(schema: type[Any], config: Mapping[str, Any], indent: str) -> Iterator[str]:
    docs, types = field_docs(schema), get_type_hints(schema)
    for key, value in config.items():
        comment = f"  # {docs[key]}" if key in docs else ""
        section = dataclass_of(types.get(key))
        if section is not None and isinstance(value, Mapping):
            yield f"{indent}{key}:{comment}\n"
            yield documented_yaml(section, value, indent + "  ")
        else:
            first, *rest = OmegaConf.to_yaml(OmegaConf.create({key: value})).splitlines()
            yield "".join(f"{indent}{line}\n" for line in (first + comment, *rest))


def field_docs(schema: type[Any]) -> dict[str, str]:
    """Return the string under each field of a dataclass and its bases, in one line."""
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not is_dataclass(cls):
            continue
        try:
            source = inspect.getsource(cls)
        except OSError:  # made at run time (recipes/config.py, grpo_run_of)
            continue
        [definition] = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            match field, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = " ".join(text.split())
    return docs
