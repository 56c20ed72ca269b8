"""Questions and answers in English, from five words to a few hundred: text to measure errors on."""

from pathlib import Path

_BLOCKS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n====\n")

CONVERSATIONS: tuple[tuple[str, str], ...] = tuple(
    (question.strip(), answer.strip())
    for question, answer in (block.split("\n--\n") for block in _BLOCKS)
)
