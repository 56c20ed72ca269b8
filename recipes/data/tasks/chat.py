"""What a record says of a prompt: a text or chat messages, and the tools that may be called; and
what a problem has to be, whoever made it."""

import json
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

from samebit.recipes.data.tasks.base import ChatPrompt, Problem
from samebit.recipes.data.tasks.readers import plain
from samebit.rollout.values import shown

_KINDS = {
    "label": (str, "a text"),
    "rejected": (str, "a text"),
    "metadata": (dict, "a dict"),
    "tools": (list, "a list"),
}


def check_problem(problem: Problem) -> None:
    """Raise ValueError, which names the field, for a problem that a user's own task made of other
    values than a Problem's."""
    read_prompt(problem.prompt, "its prompt", columnar=False)
    for name, (kind, meaning) in _KINDS.items():
        if not isinstance(value := getattr(problem, name), kind):
            raise ValueError(f"its {name} is {shown(value)}; give {meaning}")
    try:  # a checkpoint's digest has it, and a reward's process is sent it
        json.dumps(problem.metadata, sort_keys=True, default=repr)
        pickle.dumps(problem.metadata)
    except Exception as error:  # objects of a user's own may raise anything
        what = f"{shown(problem.metadata)}, which cannot be written down ({shown(error)})"
        raise ValueError(f"its metadata is {what}; give what JSON can hold") from error
    texts = problem.prompt, problem.label, problem.rejected, problem.tools
    if fault := lone_surrogate(*texts):
        raise ValueError(f"it holds {fault}")


def read_prompt(value: Any, what: str, *, columnar: bool) -> str | ChatPrompt:
    """Return a prompt: a text that is not empty, or messages.

    Messages have texts `role` and `content`; one with a list `tool_calls` needs no content. In
    columnar files a row has every field of its column, None where it lacks one: those are left out.
    Raises ValueError, which begins with `what`.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        return [_message(message, what, columnar) for message in value]
    raise ValueError(f"{what} is {value!r:.80}; give a text or a list of chat messages")


def _message(message: Any, what: str, columnar: bool) -> dict[str, Any]:
    if isinstance(message, dict):
        kept = {key: value for key, value in message.items() if value is not None}
        calls = kept.get("tool_calls")
        if calls == []:
            calls = kept.pop("tool_calls", None)
        texts = (value for key, value in kept.items() if key != "tool_calls")
        needed = {"role"} if calls else {"role", "content"}
        if all(isinstance(text, str) for text in texts) and needed <= kept.keys():
            if calls:
                kept["tool_calls"] = _objects(calls, f"{what}: 'tool_calls'", columnar)
            return kept
    raise ValueError(
        f"{what} has the message {message!r:.80}; give texts `role` and `content` (or a list "
        "`tool_calls`)"
    )


def read_answer(value: Any, prompt: str | ChatPrompt, what: str, *, columnar: bool) -> str:
    """Return an answer's text: of a text itself; of messages the content of the assistant's, which
    is the only one or stands behind the prompt's own.

    Raises ValueError, which begins with `what`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        *before, last = (_message(message, what, columnar) for message in value)
        if last.keys() == {"role", "content"} and last["role"] == "assistant":
            if not before or before == prompt:
                return last["content"]
            hint = "; a text prompt is one with data.chat=true" if isinstance(prompt, str) else ""
            fault = f"{len(before)} messages before its last, not the prompt's"
            raise ValueError(f"{what} has {fault}{hint}")
    raise ValueError(
        f"{what} is {value!r:.80}; give a text or a list that ends with an assistant's message"
    )


def read_tools(value: Any, what: str, *, columnar: bool) -> list[dict[str, Any]]:
    """Return what may be called: a list of JSON objects, or the JSON text of one; None is none.

    Raises ValueError, which begins with `what`.
    """
    if value is None:
        return []
    if isinstance(value, str):
        columnar = False
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} is no JSON text: {error}; give a list of tools") from error
    return _objects(value, what, columnar)


def _objects(value: Any, what: str, columnar: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(x, dict) and x for x in value):
        raise ValueError(
            f"{what} is {value!r:.80}; give a list of objects such as "
            '{"type": "function", "function": {"name": ...}}'
        )
    objects = [plain(_without_none(x) if columnar else x) for x in value]
    _require_json(objects, what)
    return objects


def read_json_text(value: Any, what: str, *, columnar: bool) -> str:
    """Return the JSON text of a list or an object. Raises ValueError, which begins with `what`, for
    what no JSON text holds."""
    value = plain(_without_none(value) if columnar else value)
    _require_json(value, what)
    return json.dumps(value, ensure_ascii=False)


def _require_json(value: Any, what: str) -> None:
    """ValueError for what no JSON text holds, as columns may: times, bytes, decimals, pairs."""
    match value:
        case list():
            for part in value:
                _require_json(part, what)
        case dict():
            for key, part in value.items():
                _require_json([key, part], what)
        case float() if not math.isfinite(value):
            raise ValueError(f"{what} holds {value}; give finite numbers")
        case str() | int() | float() | None:
            pass
        case _:
            kind = type(value).__name__
            raise ValueError(f"{what} holds {value!r:.80}, a {kind}; give what JSON can hold")


def _without_none(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_none(x) for key, x in value.items() if x is not None}
        case list():
            return [_without_none(x) for x in value]
    return value


def lone_surrogate(*values: Any) -> str:
    """Name half of a UTF-16 pair, which no encoding of a text has; empty if there is none."""
    for text in _texts(values):
        if not text.isascii() and (found := re.search("[\ud800-\udfff]", text)):
            return f"the lone surrogate \\u{ord(found[0]):04x}, which is no character"
    return ""


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for key, part in value.items():
                yield from (*_texts(key), *_texts(part))
        case list() | tuple():
            for part in value:
                yield from _texts(part)
