"""Where a completion ends: at every token that the model's folder names, and nowhere unsaid."""

import json
import os
import re
import shutil

import pytest
import torch
from helpers import edit_config

from samebit.recipes.data.text import TextCodec
from samebit.recipes.models.side_files import side_files
from samebit.recipes.models.tiny_model import make_demo_model, make_random_model
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config, load_stop_tokens, require_taught_end
from samebit.rollout.types import SamplingParams


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """The demo's model, whose config.json and tokenizer end with 0. Do not write to it."""
    path = tmp_path_factory.mktemp("stops") / "demo"
    make_demo_model(path, seed=3)
    return path


@pytest.fixture
def folder(demo_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(demo_folder, tmp_path / "model")


def write(folder, name, **keys):
    (folder / name).write_text(json.dumps(keys))


def edit(folder, name, **changes):
    write(folder, name, **{**json.loads((folder / name).read_text()), **changes})


def without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def test_the_demos_and_a_random_models(demo_folder, qwen3_path, llama_path):
    """What they were before generation_config.json and the tokenizer were looked at."""
    assert load_model_config(demo_folder).eos_token_ids == (0,)
    assert str(load_stop_tokens(demo_folder)) == "0 (config.json, tokenizer)"
    for path in (qwen3_path, llama_path):
        assert load_model_config(path).eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("config", "generation", "said"),
    [
        (11, [11, 4], "11 (config.json, generation_config.json), 4 (generation_config.json), 0"),
        (11, 4, "11 (config.json), 4 (generation_config.json), 0 (tokenizer)"),
        ([4, 4, 0], None, "4 (config.json), 0 (config.json, tokenizer)"),
        ([], [], "0 (tokenizer)"),
        (None, 7, "7 (generation_config.json), 0 (tokenizer)"),
    ],
)
def test_all_that_the_folder_names(folder, config, generation, said):
    edit_config(folder, eos_token_id=config)
    write(folder, "generation_config.json", eos_token_id=generation)
    found = load_stop_tokens(folder)
    assert str(found).startswith(said)
    assert load_model_config(folder).eos_token_ids == found.ids
    assert folder / "generation_config.json" in side_files(folder)  # goes with an export


def test_a_tokenizer_that_is_written_anew_is_read_anew(folder):
    """One process may export a model twice."""
    assert load_stop_tokens(folder).ids == (0,)
    file = folder / "tokenizer.json"
    token = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    tokenizer = json.loads(file.read_text())
    [entry] = [e for e in tokenizer["added_tokens"] if e["content"] == token]
    entry["id"] = 9
    before = file.stat().st_mtime_ns
    file.write_text(json.dumps(tokenizer))
    os.utime(file, ns=(before + 1, before + 1))
    assert load_stop_tokens(folder).ids == (0, 9)


def test_the_engine_stops_where_transformers_does(tmp_path):
    """Greedy, with a second end token in generation_config.json alone."""
    from transformers import AutoModelForCausalLM

    make_random_model(tmp_path, "qwen3", seed=2, tied=True, vocab_size=40)
    greedy = SamplingParams(temperature=0, max_new_tokens=24)
    [[free]] = Engine(tmp_path).generate([[5, 6]], greedy)
    end = next(t for i, t in enumerate(free.token_ids) if i > 2 and t not in free.token_ids[:i])
    edit_config(tmp_path, eos_token_id=39)
    write(tmp_path, "generation_config.json", eos_token_id=[39, end])
    [[found]] = Engine(tmp_path).generate([[5, 6]], greedy)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generate(
        torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=24, pad_token_id=0
    )
    assert list(found.token_ids) == theirs[0, 2:].tolist()
    assert (found.token_ids[-1], found.finish_reason) == (end, "stop")
    assert len(found.token_ids) < 24


def test_no_end_at_all(folder):
    without_tokenizer(folder)
    edit(folder, "config.json", eos_token_id=None)
    assert str(load_stop_tokens(folder)).startswith("none; every completion runs to its max_new")


def test_the_familys_default_counts_only_where_nothing_else_is_said(llama_path, tmp_path):
    """As in transformers, for whom a Llama without eos_token_id ends with 2; and it is said."""
    folder = shutil.copytree(llama_path, tmp_path / "llama")
    edit_config(folder, eos_token_id=None)  # takes the key away
    assert str(load_stop_tokens(folder)) == "2 (transformers' default for llama)"
    write(folder, "generation_config.json", eos_token_id=8)
    assert load_model_config(folder).eos_token_ids == (8,)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [12, -1, True, "0", 0.0, [0, 12], [[0]], {"id": 0}])
def test_what_is_no_token(folder, name, value):
    """It would never come, or end every other request with an IndexError."""
    write(folder, "generation_config.json")
    edit(folder, name, eos_token_id=value)
    message = rf"{name}: eos_token_id is {re.escape(json.dumps(value))}; .*\[0, 12\)"
    with pytest.raises(ValueError, match=message):
        load_model_config(folder)


@pytest.mark.parametrize(("content", "why"), [("{", "is not JSON"), ("[1]", r"holds \[1\]")])
def test_a_generation_config_that_cannot_be_read(folder, content, why):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"generation_config.json {why}"):
        load_model_config(folder)


VOCABULARIES = {
    "added": {"added_tokens": [{"id": 5, "content": "<end>"}], "model": {"vocab": {}}},
    "wordpiece": {"model": {"vocab": {"a": 0, "<end>": 5}}},
    "unigram": {"model": {"vocab": [[str(i), -1.0] for i in range(5)] + [["<end>", -2.0]]}},
}


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("token", ["<end>", {"content": "<end>", "lstrip": False}])
def test_the_tokenizers_end_token(folder, name, token):
    """As a text or an object, in each kind of vocabulary."""
    write(folder, "tokenizer.json", **VOCABULARIES[name])
    write(folder, "tokenizer_config.json", eos_token=token)
    assert load_model_config(folder).eos_token_ids == (0, 5)


def test_the_tokenizers_other_files(folder):
    """added_tokens_decoder names ids; special_tokens_map.json is read only without it."""
    without_tokenizer(folder)
    decoder = {"3": {"content": "<a>"}, "4": {"content": "<b>"}}
    write(folder, "special_tokens_map.json", eos_token="<b>")
    write(folder, "tokenizer_config.json", eos_token="<a>", added_tokens_decoder=decoder)
    assert load_model_config(folder).eos_token_ids == (0, 3)
    write(folder, "tokenizer.json", model={"vocab": {"<a>": 3, "<b>": 4}})
    write(folder, "tokenizer_config.json", eos_token="<a>")
    assert load_model_config(folder).eos_token_ids == (0, 4)
    (folder / "tokenizer.json").unlink()  # a vocabulary in a format of its own
    assert load_model_config(folder).eos_token_ids == (0,)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<gone>", 'eos_token is "<gone>"; it must be one of the tokens of tokenizer.json'),
        (7, "eos_token is 7; it must be a text"),
        ({"id": 7}, 'eos_token is {"id": 7}; it must be a text'),
    ],
)
def test_an_end_token_that_the_tokenizer_does_not_know(folder, token, message):
    edit(folder, "tokenizer_config.json", eos_token=token, added_tokens_decoder={})
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model_config(folder)


def test_an_end_token_outside_the_model(folder):
    write(folder, "tokenizer.json", added_tokens=[{"id": 12, "content": "<eos>"}])
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token is .*its id is 12"):
        load_model_config(folder)


def test_an_end_that_nobody_stops_at_is_not_taught(folder, monkeypatch):
    """The tokenizer as transformers loads it may end otherwise than its files say."""
    require_taught_end(folder, TextCodec(folder).end_token_id)
    from transformers import PreTrainedTokenizerBase

    monkeypatch.setattr(PreTrainedTokenizerBase, "eos_token_id", 9, raising=False)
    message = r"ends a text with token 9, at which the model does not stop \(0 \(config.json"
    with pytest.raises(ValueError, match=message):
        require_taught_end(folder, TextCodec(folder).end_token_id)


def test_something_must_be_left_to_draw(demo_folder):
    """Where no stop token may be drawn yet, another token must be."""
    engine = Engine(demo_folder)
    params = {"max_new_tokens": 2, "min_new_tokens": 1}
    almost = SamplingParams(stop_token_ids=range(1, 11), **params)
    [[completion]] = engine.generate([[1]], almost)
    assert completion.token_ids[0] == 11
    everything = SamplingParams(stop_token_ids=range(1, 12), **params)
    with pytest.raises(ValueError, match="min_new_tokens is 1, but all 12 tokens of the vocab"):
        engine.generate([[1]], everything)
