"""A chat with its answers as tokens: those of the assistant's messages are told from the rest.

An answer is what stands between the place where the model begins to answer and the end token that
the chat template writes behind it. What stands before it must be, token by token, what the model
reads when it answers there; else the chat is refused.
"""

from collections.abc import Sequence
from typing import Any

from samebit.recipes.data.tasks.base import ChatPrompt
from samebit.recipes.data.text import TextCodec

_ALONE = "give it as the label of a record of its own"


def encode_answered(
    text: TextCodec, messages: ChatPrompt, tools: Sequence[dict[str, Any]] = ()
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a chat up to the end token of its last message, which is an answer,
    and of each whether it is an answer's, its end token included.

    Raises ValueError, naming the message, where the tokens of an answer cannot be told for sure.
    """
    if text.end_token_id is None:
        raise ValueError("its answers cannot end: the tokenizer has no eos_token")
    end_token = text.token(text.end_token_id)
    whole = text.render(messages, tools, answered=True)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    before = list[str]()
    for i in places:
        try:
            before.append(_text_before(text, messages[: i + 1], tools, whole, end_token))
        except ValueError as error:
            raise _refusal(i, str(error)) from error
    texts = [whole, *before]
    ids, *heads = text.encode_prompts([messages] * len(texts), texts)
    if ids.count(text.end_token_id) != whole.count(end_token):
        raise ValueError(f"some of its characters become the token {end_token}, the end token")
    loss_mask, end = [False] * len(ids), 0
    for i, head in zip(places, heads, strict=True):
        start = len(head)
        if ids[:start] != head:
            what = "its first characters and those before it become one token"
            raise _refusal(i, f"{what}; give it without white space at its beginning")
        if start < end:
            raise _refusal(i, f"the chat template writes no {end_token} between it and the last")
        end = ids.index(text.end_token_id, start) + 1
        loss_mask[start:end] = [True] * (end - start)
    return ids[:end], loss_mask[:end]


def _text_before(
    text: TextCodec,
    messages: ChatPrompt,
    tools: Sequence[dict[str, Any]],
    whole: str,
    end_token: str,
) -> str:
    """What the model reads before it writes the last of the messages, which is in the whole text,
    all of it and with its end; else ValueError."""
    *earlier, answer = messages
    before = text.render(earlier, tools) if earlier else _first_opening(text, whole)
    if not whole.startswith(before):
        raise ValueError(
            "the chat template writes what stands before it otherwise where the model is to "
            f"answer; {_ALONE}"
        )
    if not text.render(messages, tools, answered=True).rstrip().endswith(end_token):
        raise ValueError(f"the chat template writes no {end_token} (the end token) behind it")
    written = whole[len(before) :].partition(end_token)[0]
    if not _solid(written):
        raise ValueError("it is empty")
    for key in ("content", "reasoning_content"):
        if _solid(answer.get(key, "")) not in _solid(written):
            what = f"its {key} is not whole in the chat as the template writes it"
            raise ValueError(f"{what}, or holds {end_token}; {_ALONE}")
    return before


def _first_opening(text: TextCodec, whole: str) -> str:
    """What stands before the answer that a chat begins with, up to where the template opens it."""
    before, opening, _ = whole.partition(text.answer_opening())
    if not opening:
        raise ValueError("the chat template does not open it as it opens an answer to a user")
    return before + opening


def _solid(text: str) -> str:
    """Without white space, which templates trim and add."""
    return "".join(text.split())


def _refusal(place: int, fault: str) -> ValueError:
    return ValueError(f"its message {place + 1}, an answer: {fault}")
