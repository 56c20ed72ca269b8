"""Between a problem's text and token ids, by the model folder's own tokenizer."""

from pathlib import Path
from typing import Any

from samebit.recipes.tasks.base import Problem
from samebit.rollout.models.registry import require_taught_end


class TextCodec:
    """Encodes prompts and labels, decodes completions. Raises ValueError without a tokenizer."""

    def __init__(self, model_path: str | Path, chat: bool = False) -> None:
        """With `chat`, a text prompt is one user message of the chat template."""
        from transformers import AutoTokenizer

        folder = Path(model_path)
        if not folder.is_dir():
            raise FileNotFoundError(f"model folder {folder} does not exist (from {Path.cwd()})")
        if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer_config.json")):
            raise ValueError(f"model.path {folder} holds no tokenizer (tokenizer.json)")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        require_taught_end(folder, self._tokenizer.eos_token_id)
        self._chat = chat
        if chat and self._tokenizer.chat_template is None:
            raise ValueError(
                f"data.chat is true, but the tokenizer of {folder} has no chat template"
            )

    def encode_prompt(self, problem: Problem, max_len: int, key: str) -> list[int]:
        """Token ids of a prompt; chat messages go through the chat template.

        ValueError for more than max_len, the value of the configuration's `key`.
        """
        prompt = problem.prompt
        if self._chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt)
        else:
            ids = self._tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=False
            )
        if not 0 < len(ids) <= max_len:
            raise ValueError(
                f"problem {problem.index}: its prompt has {len(ids)} tokens; {key} allows 1 "
                f"to {max_len}"
            )
        return list(ids)

    def encode_label(self, problem: Problem) -> list[int]:
        """Token ids of the reference answer, with the end-of-sequence token."""
        ids = self._tokenizer.encode(problem.label, add_special_tokens=False)
        if not ids:
            raise ValueError(f"problem {problem.index}: its label is empty; sft needs an answer")
        end = self._tokenizer.eos_token_id
        return [*ids, *([] if end is None else [end])]

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """The completion's text without special tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
