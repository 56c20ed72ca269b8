"""The tokens that end a completion: all that a model's folder names.

They are the union of config.json's and generation_config.json's eos_token_id, as in transformers'
generate, and of the end token of the tokenizer, which `samebit sft` teaches. Where none of them
names any, and config.json does not say null, it is the one that transformers takes for the family.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samebit.rollout.models.json_file import JsonFile, is_list

_KEY = "eos_token_id"


@dataclass
class StopTokens:
    """Token ids in the order in which they are found; for each, the files that name it."""

    vocab_size: int
    origins: dict[int, list[str]] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[int, ...]:
        """Each once: config.json's first, then generation_config.json's, then the tokenizer's."""
        return tuple(self.origins)

    def add(self, token_ids: Iterable[int], origin: str) -> None:
        """Count in what a file names."""
        for token_id in dict.fromkeys(token_ids):
            self.origins.setdefault(token_id, []).append(origin)

    def is_token(self, value: Any) -> bool:
        """Whether it is an integer in the vocabulary."""
        return type(value) is int and 0 <= value < self.vocab_size

    def __str__(self) -> str:
        """Example: 39 (config.json), 34 (generation_config.json, tokenizer)"""
        parts = [f"{i} ({', '.join(names)})" for i, names in self.origins.items()]
        return ", ".join(parts) or "none; every completion runs to its max_new_tokens"


def find_stop_tokens(config: JsonFile, family_default: int | None) -> StopTokens:
    """Those of the folder of a config.json, whose sizes are checked.

    family_default: what transformers takes where config.json has no eos_token_id. Raises ValueError
    that names file, key and value for an id that is no token of the vocabulary, a file that cannot
    be read, or an end token that the tokenizer does not know.
    """
    folder, found = config.path.parent, StopTokens(config.values["vocab_size"])
    found.add(_ids(config, found), "config.json")
    generation = JsonFile.read_if_there(folder / "generation_config.json")
    found.add(_ids(generation, found), "generation_config.json")
    found.add(_end_of_tokenizer(folder, found), "tokenizer")
    if not found.ids and _KEY not in config.values and family_default is not None:
        filled = JsonFile(config.path, {_KEY: family_default})
        found.add(_ids(filled, found), f"transformers' default for {config.get('model_type')}")
    return found


def _ids(file: JsonFile, known: StopTokens) -> list[int]:
    """A key that holds an id, a list of ids, null or is not there."""
    value = file.get(_KEY)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(map(known.is_token, ids)):
        raise file.wrong(_KEY, f"a token id in [0, {known.vocab_size}), a list of them, or null")
    return ids


def _end_of_tokenizer(folder: Path, known: StopTokens) -> list[int]:
    """The id of the tokenizer's eos_token, where there is a tokenizer that has one."""
    settings = _tokenizer_settings(folder)
    token = settings.get("eos_token")
    if token is None:
        return []
    token = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(token, str):
        raise settings.wrong("eos_token", 'a text, an object with a "content", or null')
    vocabulary, token_id = folder / "tokenizer.json", None
    if vocabulary.exists():
        token_id = _id_in_vocabulary(vocabulary, vocabulary.stat().st_mtime_ns, token)
    if token_id is None:
        token_id = _id_in_settings(settings, token)
    if token_id is None and not vocabulary.exists():
        return []  # a vocabulary in a format of its own
    if token_id is None:
        raise settings.wrong("eos_token", f"one of the tokens of {vocabulary.name}")
    if not known.is_token(token_id):
        tokens = f"[0, {known.vocab_size})"
        raise settings.wrong(
            "eos_token", f"one of the model's tokens {tokens}: its id is {token_id}"
        )
    return [token_id]


def _tokenizer_settings(folder: Path) -> JsonFile:
    """The file that says the tokenizer's eos_token, as transformers chooses it."""
    settings = JsonFile.read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in settings.values:
        return settings
    older = JsonFile.read_if_there(folder / "special_tokens_map.json")
    return older if "eos_token" in older.values else settings


def _id_in_settings(settings: JsonFile, token: str) -> Any:
    """By the tokens that tokenizer_config.json lists itself."""
    added = settings.require_if_given(
        "added_tokens_decoder", lambda x: isinstance(x, dict), "a JSON object of tokens by id"
    )
    for token_id, entry in (added or {}).items():
        if isinstance(entry, dict) and entry.get("content") == token and token_id.isdecimal():
            return int(token_id)
    return None


@functools.lru_cache(maxsize=16)
def _id_in_vocabulary(file: Path, _written_ns: int, token: str) -> Any:
    """By tokenizer.json, which is large: an added token, or one of the model's vocabulary."""
    tokenizer = JsonFile.read(file)
    for entry in tokenizer.require_if_given("added_tokens", is_list, "a list of tokens") or ():
        if isinstance(entry, dict) and entry.get("content") == token:
            return entry.get("id")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return vocabulary.get(token)
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of the ids
        for token_id, entry in enumerate(vocabulary):
            if isinstance(entry, list) and entry[:1] == [token]:
                return token_id
    return None
