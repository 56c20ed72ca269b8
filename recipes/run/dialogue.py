"""How a prompt, and what may be called, is written for people to read. No torch here."""

import json
from collections.abc import Iterable
from typing import Any


def dialogue(prompt: Any) -> Any:
    """Return a chat as text, with the calls of its messages, and any other prompt as it is."""
    if not isinstance(prompt, list):
        return prompt
    return "\n\n".join(_said(message) for message in prompt)


def names_of(tools: Iterable[Any]) -> list[str]:
    """Return what tools are called."""
    return [str(_function(tool).get("name", "?")) for tool in tools]


def _said(message: Any) -> str:
    if not isinstance(message, dict):
        return str(message)
    parts = [message["content"]] if message.get("content") else []
    parts += [_called(call) for call in message.get("tool_calls") or []]
    said = "\n".join(str(part) for part in parts)
    who = [message.get("role", "?"), *([message["name"]] if "name" in message else [])]
    return f"{' '.join(map(str, who))}: {said}"


def _called(call: Any) -> str:
    function = _function(call)
    given = function.get("arguments", "")
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return f"calls {function.get('name', '?')}({text})"


def _function(tool: Any) -> dict[str, Any]:
    """What a call or a tool is of: in OpenAI's form it is one level further in."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    return inner if isinstance(inner, dict) else {}
