"""Between text and token ids, by the model folder's own tokenizer, exactly: nothing is added to a
text, or left out of it, that the template, the tokenizer's BOS token or a stop did not mean."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from samebit.recipes.data.tasks.base import ChatPrompt
from samebit.rollout.types import Completion

Prompt = str | ChatPrompt
_MOST_PARTS = 8  # tokens; a character has at most four bytes, and others may follow it
_ANSWER = "samebit-answer"  # stands for an answer in a template


class TextCodec:
    """Encodes prompts and labels, decodes completions. Raises ValueError without a tokenizer."""

    def __init__(self, model_path: str | Path, chat: bool = False) -> None:
        """With `chat`, a text prompt is one user message of the chat template."""
        folder = Path(model_path)
        if not folder.is_dir():
            raise FileNotFoundError(f"model folder {folder} does not exist (from {Path.cwd()})")
        self._folder = folder
        self._tokenizer: Any = _read_tokenizer(folder, "model.path")
        self._backend = _plain_backend(self._tokenizer)
        self._chat = chat
        if chat and not self._tokenizer.chat_template:
            raise ValueError(
                f"data.chat is true, but the tokenizer of {folder} has no chat template"
            )
        self._bos = self._added_before()
        self._openings = self._find_openings()
        special = [t for t in self._tokenizer.added_tokens_decoder.items() if t[1].special]
        self._special = {token.content: i for i, token in special}
        self._dropped = set(self._special.values())

    @property
    def end_token_id(self) -> int | None:
        """This token ends a label; None where the tokenizer has none."""
        return self._tokenizer.eos_token_id

    @property
    def vocabulary(self) -> dict[str, int]:
        """These are the ids of all tokens, added ones too."""
        return self._tokenizer.get_vocab()

    def messages(self, prompt: Prompt) -> Prompt:
        """Return the prompt as it is encoded: with `chat`, a text is one user message."""
        if self._chat and isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        return prompt

    def render(
        self, prompt: Prompt, tools: Sequence[dict[str, Any]] = (), *, answered: bool = False
    ) -> str:
        """Return the text of a prompt; messages and tools go through the chat template.

        It ends where an answer begins; with `answered` the answers are there, and it ends behind
        the last message. Raises ValueError where the template does, gives nothing, or says nothing
        of the tools.
        """
        prompt = self.messages(prompt)
        if isinstance(prompt, str):
            if tools:
                raise ValueError(
                    "it has tools, but its prompt is a text; give chat messages or data.chat=true"
                )
            text = prompt
        else:
            text = self._apply_template(prompt, tools, answered=answered)
            if tools and text == self._apply_template(prompt, answered=answered):
                raise ValueError("it has tools, which the chat template leaves out")
        if not text:
            raise ValueError("the chat template makes an empty text of its prompt")
        return text

    def encode_prompts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of prompts, which `render` made `texts` of.

        A plain text begins with the tokenizer's BOS token, if it adds one and the text does not
        begin with it, or like the chat template, already. No token is added at the end.
        """
        found = self._encode(texts)
        for i, prompt in enumerate(prompts):
            if isinstance(self.messages(prompt), str) and not self._is_opened(found[i]):
                found[i] = [*self._bos, *found[i]]
        return found

    def cut_left(self, ids: list[int], max_len: int) -> list[int]:
        """Return the last of a plain text's token ids, after its BOS token if it has one."""
        bos = self._bos if ids[: len(self._bos)] == self._bos else []
        rest = max_len - len(bos)
        return [*bos, *ids[len(ids) - rest :]] if rest > 0 else ids

    def encode_labels(self, labels: Sequence[str]) -> list[list[int]]:
        """Return the token ids of labels, each with its end token; none for empty ones."""
        ends = [] if self.end_token_id is None else [self.end_token_id]
        return [[*ids, *ends] if ids else [] for ids in self._encode(labels)]

    def keep_tokens_of(self, labels: Iterable[str]) -> None:
        """Keep special tokens that labels hold in what `decode` gives; others are left out."""
        if self._special:
            pattern = re.compile("|".join(re.escape(t) for t in self._special))
            for token in {found for label in labels for found in pattern.findall(label)}:
                self._dropped.discard(self._special[token])

    def decode(self, completion: Completion) -> str:
        """Return the completion's text without the special token that stopped it, or any other
        one but those that labels hold."""
        ids = completion.token_ids
        if completion.finish_reason == "stop" and ids[-1] in self._special.values():
            ids = ids[:-1]
        return self.decode_ids(ids)

    def rewritten(self, labels: Sequence[str]) -> list[str]:
        """Return what `decode` gives for exactly these labels."""
        ids = [[i for i in ids if i not in self._dropped] for ids in self._encode(labels)]
        if self._backend is not None:
            return self._backend.decode_batch(ids, skip_special_tokens=False)
        return self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with nothing added."""
        return self._encode([text])[0]

    def decode_ids(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens but those that labels hold."""
        kept = [i for i in token_ids if i not in self._dropped]
        return self._tokenizer.decode(kept, clean_up_tokenization_spaces=False)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, special ones too, for people to read. Of tokens that end
        within a character the last has its text, the others have none."""
        found, begun = list[str](), list[int]()
        for token_id in token_ids:
            begun.append(token_id)
            text = self._tokenizer.decode(begun, clean_up_tokenization_spaces=False)
            if text.endswith("\ufffd") and len(begun) < _MOST_PARTS:
                found.append("")
            else:
                found.append(text)
                begun.clear()
        if begun:
            found[-1] = self._tokenizer.decode(begun, clean_up_tokenization_spaces=False)
        return found

    def after_answer(self, messages: ChatPrompt) -> str:
        """Return what the chat template writes behind an answer's text, where messages follow it.

        It begins with what ends the answer's turn, and ends where the next answer begins. Raises
        ValueError where the template does, or rewrites the answer.
        """
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
        before, found, after = self._apply_template([*talk, *messages]).rpartition(_ANSWER)
        if not found or not before:
            raise ValueError("the chat template leaves an earlier answer out, or rewrites it")
        return after

    def answer_opening(self) -> str:
        """Return what the chat template writes between a user's message and an answer to it.

        Raises ValueError where the template does, or writes nothing of its own there.
        """
        asked = [{"role": "user", "content": "a"}]
        before, opened = self._apply_template(asked, answered=True), self._apply_template(asked)
        if not opened.startswith(before) or opened == before:
            raise ValueError("the chat template writes nothing where an answer begins")
        return opened[len(before) :]

    def token(self, token_id: int) -> str:
        """Return a token as the tokenizer writes it, for errors."""
        return str(self._tokenizer.convert_ids_to_tokens(token_id))

    def _apply_template(
        self,
        messages: ChatPrompt,
        tools: Sequence[dict[str, Any]] = (),
        *,
        answered: bool = False,
    ) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError(
                "its prompt is a list of chat messages, but the tokenizer of "
                f"{self._folder} has no chat template"
            )
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=[*tools] or None,
                add_generation_prompt=not answered,
                tokenize=False,
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the chat template refuses its prompt: {_line(error)}") from error

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Without any token of the tokenizer's own, and all of each text."""
        if not texts:
            return []
        if self._backend is not None:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in found]
        return self._tokenizer(
            list(texts),
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _added_before(self) -> list[int]:
        """The tokens that the tokenizer puts before a text: BOS, or none."""
        for text in ("a", "0", *islice(self._tokenizer.get_vocab(), 100)):
            found = self._tokenizer(text, return_special_tokens_mask=True, verbose=False)
            ids, own = found["input_ids"], found["special_tokens_mask"]
            if 0 in own:  # a token of the text itself
                return list(ids[: own.index(0)])
        return []

    def _find_openings(self) -> list[list[int]]:
        """How a text begins that needs no BOS token: with it, or as the chat template begins."""
        if not self._bos:
            return []
        openings = [self._bos]
        if self._tokenizer.chat_template:
            try:
                text = self._apply_template([{"role": "user", "content": "a"}])
            except ValueError:  # it wants other messages, whose errors name the record
                return openings
            ids = self._encode([text])[0]
            special = self._tokenizer.added_tokens_decoder
            if ids and ids[0] in special and special[ids[0]].special:
                openings.append(ids[:1])
        return openings

    def _is_opened(self, ids: list[int]) -> bool:
        return any(ids[: len(opening)] == opening for opening in self._openings)


def vocabulary_of(folder: str | Path, key: str) -> dict[str, int]:
    """Return the ids of the tokens of another folder's tokenizer.

    Raises ValueError, which names the key of the folder, for one that cannot be read.
    """
    return _read_tokenizer(Path(folder), key).get_vocab()


def _read_tokenizer(folder: Path, key: str) -> Any:
    """The folder's tokenizer, which writes exactly what tokens say."""
    from transformers import AutoTokenizer

    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{key} {folder} holds no tokenizer (tokenizer.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare ones
        what = _line(error)
        if "trust_remote_code" in str(error):
            what = "it needs code of its own, which is not run; give a folder with a tokenizer.json"
        raise ValueError(f"the tokenizer of {key} {folder} cannot be read: {what}") from error
    if tokenizer.is_fast and tokenizer.backend_tokenizer.decoder is not None:
        _keep_spaces(tokenizer.backend_tokenizer)
    return tokenizer


def _plain_backend(tokenizer: Any) -> Any:
    """What does all the work of a tokenizer, faster by itself; None if its class adds to it."""
    from transformers import PreTrainedTokenizerFast as Plain

    own = type(tokenizer)
    if not tokenizer.is_fast or any(
        getattr(own, name) is not getattr(Plain, name) for name in ("_encode_plus", "_decode")
    ):
        return None
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer.backend_tokenizer


def _keep_spaces(backend: Any) -> None:
    """Turn off `cleanup`, by which some decoders take spaces before punctuation away."""
    decoder = backend.decoder
    state = json.loads(decoder.__getstate__())
    for part in state.get("decoders", [state]):
        if "cleanup" in part:
            part["cleanup"] = False
    decoder.__setstate__(json.dumps(state).encode())
    backend.decoder = decoder


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
