"""The measurement against transformers, on the CPU: chats, random tokens, and a wrong engine."""

import json
import shutil

import pytest
import torch
from programs import transformers_error
from programs.transformers_error import CONVERSATIONS, Errors, Outcome

from samebit.recipes.models.tiny_model import write_character_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def few(monkeypatch):
    """Two short chats, two passages and three random sequences instead of many."""
    monkeypatch.setattr(transformers_error, "NUM_PASSAGES", 2)
    monkeypatch.setattr(transformers_error, "PASSAGE_TOKENS", 10)
    monkeypatch.setattr(transformers_error, "CONVERSATIONS", (("ab?", "ba"), ("b", "aab")))
    monkeypatch.setattr(transformers_error, "random_lens", lambda longest: [2, 17, 70])


def measure(folder, tmp_path):
    code = transformers_error.main(str(folder), str(tmp_path / "out.json"), "cpu")
    return code, json.loads((tmp_path / "out.json").read_text())


def test_random_tokens_without_a_tokenizer(qwen3_path, tmp_path, few):
    code, report = measure(qwen3_path, tmp_path)
    assert (code, report["pass"], report["text"]) == (0, True, "random tokens")
    assert (report["tokens"], report["greedy_tokens"]) == (1 + 16 + 69, 3 * 32)
    assert 0 < report["engine"]["mean"] <= report["engine"]["rms"] <= report["engine"]["max"]
    assert report["engine"]["greedy_agreement"] == 1.0


def test_chats_go_through_the_template(qwen3_path, tmp_path, few):
    folder = shutil.copytree(qwen3_path, tmp_path / "model")
    write_character_tokenizer(folder, "ab?[]")
    plain = transformers_error.chat_texts(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    first, second = transformers_error.chat_texts(folder)
    assert (first.token_ids, first.prompt_len) == ([4, 1, 2, 3, 5, 2, 1, 0], 5)
    assert (second.token_ids, second.prompt_len) == ([4, 2, 5, 1, 1, 2, 0], 3)
    assert plain[0].token_ids == [1, 2, 3, 2, 1, 0]
    code, report = measure(folder, tmp_path)
    assert (code, report["text"]) == (0, "chats and prose")
    assert report["tokens"] == 7 + 6 + 2 * 9


def test_a_wrong_engine_fails(qwen3_path, tmp_path, few, monkeypatch):
    original = transformers_error.Engine.score

    def wrong(engine, token_ids):
        return original(engine, token_ids, temperature=0.99)

    monkeypatch.setattr(transformers_error.Engine, "score", wrong)
    code, report = measure(qwen3_path, tmp_path)
    assert (code, report["pass"]) == (1, False)


def test_errors():
    found = Outcome(torch.tensor([-1.0, -2.0]).double(), torch.tensor([1, 2, 3, 4]))
    reference = Outcome(torch.tensor([-1.0, -5.0]).double(), torch.tensor([1, 2, 3, 5]))
    assert transformers_error.errors(found, reference) == Errors(1.5, 4.5**0.5, 3.0, 0.75)


def test_the_conversations_are_varied():
    assert len(set(CONVERSATIONS)) == len(CONVERSATIONS) == 32
    lens = [len(answer.split()) for _, answer in CONVERSATIONS]
    assert min(lens) == 1
    assert max(lens) > 150
