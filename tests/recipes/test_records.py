"""What a run reads is checked whole before its first step, by dry_run too, and encoded once."""

import json
import logging
import shutil

import psutil
import pytest

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.cli.main import main
from samebit.recipes.data import records
from samebit.recipes.data.order import problem_index
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.models.tiny_model import (
    make_demo_model,
    write_character_tokenizer,
    write_weights,
)
from samebit.recipes.run.binding import bound_keys
from samebit.recipes.run.inputs import GrpoInputs, SftInputs
from samebit.recipes.run.sampling import Rollout
from samebit.rollout.types import Completion
from samebit.trainer.algorithms.grpo import group_advantages


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The demo's model, whose tokenizer has a chat template: S, U and A mark the roles."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    make_demo_model(folder, seed=0)
    write_character_tokenizer(folder, "0123456789=SUA")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 15}))
    write_weights(folder, seed=0)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content == '13' %}{{ raise_exception('unlucky') }}"
        "{% endif %}{{ {'system': 'S', 'user': 'U', 'assistant': 'A'}[m.role] }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    return folder


class Data:
    """A data file and what uses it."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.path = folder / "data.jsonl"

    def write(self, *given):
        self.path.write_text("".join(json.dumps(record) + "\n" for record in given))

    def arguments(self, command, *overrides, model=None):
        return [
            f"model.path={model or self.model}",
            f"output_dir={self.folder}",
            f"data.path={self.path}",
            f"data.eval_size={1 if command == 'grpo' else 0}",
            "device=cpu",
            "logger=disabled",
            "trainer.num_steps=1",
            "trainer.micro_batch_tokens=32",
            *(
                ["trainer.batch_size=2"]
                if command == "sft"
                else ["rollout.prompts_per_step=2", "rollout.max_prompt_len=6"]
            ),
            *(["rollout.max_new_tokens=6"] if command == "grpo" else []),
            *overrides,
        ]

    def read(self, command, *overrides, model=None):
        inputs = GrpoInputs if command == "grpo" else SftInputs
        return inputs(resolve(command, self.arguments(command, *overrides, model=model)))


@pytest.fixture
def data(demo_model, tmp_path):
    data = Data(demo_model, tmp_path)
    data.write(*good(*range(8)))
    return data


def good(*numbers):
    return [{"prompt": f"{i:02d}=", "label": f"{i:02d}"[::-1]} for i in numbers]


def prompts(inputs, split="train_set"):
    """The split's prompts, as characters of the tokenizer."""
    found = getattr(inputs, split)
    ids = [found.encoded(problem).prompt_ids for problem in found]
    return ["".join("?0123456789=SUA"[i] for i in each) for each in ids]


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_bad_records_of_late_steps_are_told_before_the_first(data, capsys, command):
    """dry_run and the run say the same line, and nothing is written."""
    long = {"prompt": "1" * 40, "label": "1"}
    data.write(*good(1, 2), long, *good(3, 4), long | {"prompt": "2" * 41}, *good(5, 6))
    key = "rollout.max_prompt_len allows 1 to 6"
    if command == "sft":
        key = "trainer.micro_batch_tokens allows 1 to 32"
    lines = []
    for more in (["dry_run=true"], []):
        assert main([command, *data.arguments(command, *more)]) == 1
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1]
    assert lines[0].count("\n") == 1
    assert "2 records cannot be used: " in lines[0]
    assert f"{data.path}, line 3: problem 2: its prompt has 40 tokens" in lines[0]
    assert f"{data.path}, line 6: problem 5: its prompt has 41 tokens" in lines[0]
    assert key in lines[0]
    assert not (data.folder / "run").exists()


def test_held_out_records_are_checked_too(data):
    data.write(*good(1, 2, 3), {"prompt": "1234567", "label": "1"})
    with pytest.raises(ValueError, match="line 4: problem 0: its prompt has 7 tokens"):
        data.read("grpo")
    data.read("sft")  # which does not use them


def test_labels_of_sft(data):
    data.write(
        *good(1, 2), {"prompt": "1", "label": "2" * 40}, {"prompt": "1", "label": ""}, *good(1)
    )
    message = "line 3: .*1 tokens and its label 41; trainer.micro.*; .*line 4: .*its label is empty"
    with pytest.raises(ValueError, match=message):
        data.read("sft")
    data.write({"prompt": "1" * 60, "label": "2" * 9}, *good(1))
    message = "prompt has 60 tokens and its label 10; the model's max_position_embeddings .* to 64"
    with pytest.raises(ValueError, match=message):
        data.read("sft", "trainer.micro_batch_tokens=100")


@pytest.mark.parametrize(
    ("reward", "label", "message"),
    [
        ("number_match", "x", "the label 'x' holds no number; use another reward"),
        ("number_match", "1e5000", "ends in 1e5000, whose exponent .*-1000 to 1000"),
        ("number_match", "1/2", "the label '1/2' ends in a fraction or a power"),
        ("math_verify", "", "math-verify cannot parse the label"),
        ("reasoning_gym", "1", "scores problems of data.task reasoning_gym/<name> only"),
        ("run_children:fussy", "1", "2 digits, please"),
        ("run_children:vague", "1", "check_problem returned '2 digits, please'; it must raise"),
    ],
)
def test_labels_are_checked_by_the_reward_that_uses_them(data, reward, label, message):
    data.write({"prompt": "1=", "label": label}, *good(1))
    others = psutil.Process().children()
    with pytest.raises(ValueError, match=message) as caught:
        data.read("grpo", f"reward.name={reward}")
    assert f"{data.path}, line 1: problem 0: " in str(caught.value)
    assert psutil.Process().children() == others, "a worker is left"


def test_labels_that_the_tokenizer_cannot_write_are_told(data, caplog):
    data.write({"prompt": "1=", "label": "1x"}, {"prompt": "2=", "label": "y"}, *good(1))
    data.read("grpo")
    message = f"2 labels cannot be written with the model's tokens, so exact_match .*{data.path}, l"
    assert message.split(" .*")[0] in caplog.text
    assert "line 1: problem 0: '1x' becomes '1'" in caplog.text
    data.write({"prompt": "1=", "label": "1x"}, *good(1))
    data.read("sft")
    assert "1 labels cannot be written with the model's tokens, so something else" in caplog.text


def test_a_tokenizer_without_settings_ends_labels_by_a_token_that_the_model_lacks(data):
    """Its class in transformers brings that token: grpo, which teaches no label, needs none."""
    model = shutil.copytree(data.model, data.folder / "model")
    (model / "tokenizer_config.json").unlink()
    data.read("grpo", model=model)
    with pytest.raises(ValueError, match=r"ends a text with token \d+, .*give it a tokenizer_conf"):
        data.read("sft", model=model)


def test_a_template_that_raises_for_one_record(data, chat_model):
    data.write(*good(1, 2), {"prompt": "13", "label": "1"}, *good(3))
    message = "line 3: problem 2: the chat template refuses its prompt: .*unlucky"
    for command in ("grpo", "sft"):
        with pytest.raises(ValueError, match=message):
            data.read(command, "data.chat=true", model=chat_model)
    data.write({"prompt": [{"role": "user", "content": "1"}], "label": "1"}, *good(1))
    with pytest.raises(ValueError, match="line 1: .* has no chat template"):
        data.read("grpo")


def test_tokens_outside_the_models_vocabulary(data, chat_model, demo_model, tmp_path):
    folder = tmp_path / "model"
    make_demo_model(folder, seed=0)
    write_character_tokenizer(folder, "0123456789=SUA")
    data.write(*good(0), {"prompt": "1S=", "label": "1"}, *good(1))
    message = r"line 2: problem 1: its token 12 \('S'\) is outside the model's vocab_size of 12"
    with pytest.raises(ValueError, match=message):
        data.read("grpo", model=folder)
    data.write(*good(1, 2, 3))
    data.read("grpo", model=folder)  # tokens that no record has do no harm


@pytest.mark.parametrize("command", ["grpo", "sft"])
def test_overlong_records_are_dropped_if_asked_to(data, capsys, caplog, command):
    long = {"prompt": "1" * 40, "label": "1"}
    other = long | {"prompt": "2" * 40}
    more, held_out = ["data.overlong_prompts=drop"], []  # sft holds none out
    if command == "grpo":
        more, held_out = [*more, "data.eval_size=2"], [*good(2), other]
    data.write(*good(8), long, *good(0, 1), *held_out)
    with caplog.at_level(logging.WARNING):
        inputs = data.read(command, *more)
    assert "train split: 1 of 4 records are overlong" in caplog.text
    assert [(p.index, p.prompt) for p in inputs.train_set] == [(0, "08="), (1, "00="), (2, "01=")]
    assert prompts(inputs) == ["08=", "00=", "01="]
    assert main([command, *data.arguments(command, *more, "dry_run=true")]) == 0
    printed = dict(
        line.split() for line in capsys.readouterr().out.splitlines()[-30:] if "records" in line
    )
    assert printed["train_records"] == "3"
    assert printed["train_records_dropped"] == "1"
    if command == "grpo":
        assert "held-out split: 1 of 2 records are overlong" in caplog.text
        assert [(p.index, p.prompt) for p in inputs.eval_set] == [(0, "02=")]
        assert (printed["held_out_records"], printed["held_out_records_dropped"]) == ("1", "1")
    data.write(long, other, *(good(1, 2) if command == "grpo" else []))
    with pytest.raises(ValueError, match="no record of the train split is left"):
        data.read(command, *more)


@pytest.mark.parametrize("policy", ["drop", "truncate_left"])
def test_many_records_are_read_like_few(data, monkeypatch, policy):
    """They are encoded some at a time; each keeps its own tokens, label and place."""
    monkeypatch.setattr(records, "CHUNK", 3)
    long = {"prompt": "0123456789=", "label": "9"}
    all_records = [long if i in (2, 3, 7) else good(i)[0] for i in range(11)]
    data.write(*all_records, {"prompt": "99=", "label": "99"})
    inputs = data.read("grpo", f"data.overlong_prompts={policy}")
    kept = [r for r in all_records if policy != "drop" or r is not long]
    assert prompts(inputs) == [r["prompt"][-6:] for r in kept]
    assert [(p.index, p.label) for p in inputs.train_set] == [
        (i, r["label"]) for i, r in enumerate(kept)
    ]
    cut_or_dropped = (inputs.train_set.num_cut, inputs.train_set.num_dropped)
    assert cut_or_dropped == ((0, 3) if policy == "drop" else (3, 0))
    arguments = data.arguments("grpo", f"data.overlong_prompts={policy}")
    figures = describe_grpo(resolve("grpo", arguments))
    name = {"drop": "records_dropped", "truncate_left": "prompts_cut"}[policy]
    assert (figures[f"train_{name}"], figures[f"held_out_{name}"]) == (3, 0)
    assert (figures["train_records"], figures["held_out_records"]) == (len(kept), 1)


def test_a_fault_is_told_of_its_record(data):
    """Also behind one that is dropped, which the reward is not asked about."""
    long = {"prompt": "0123456789=", "label": "9"}
    data.write(*good(1), long, *good(2), {"prompt": "3=", "label": "x"}, *good(4, 5))
    dropping = ["reward.name=number_match", "data.overlong_prompts=drop"]
    with pytest.raises(ValueError, match="line 4: problem 3: the label 'x' holds no number"):
        data.read("grpo", *dropping)


def test_plain_prompts_are_cut_at_their_left(data, chat_model, caplog):
    data.write({"prompt": "0123456789=", "label": "1"}, *good(1, 2))
    inputs = data.read("grpo", "data.overlong_prompts=truncate_left")
    assert prompts(inputs)[0] == "56789="
    assert "train split: 1 of 2 records are overlong (rollout.max_prompt_len" in caplog.text
    cut = ["data.overlong_prompts=truncate_left", "trainer.micro_batch_tokens=8"]
    assert prompts(data.read("sft", *cut))[0] == "56789="  # with a label of 1 and its end
    more = ["data.chat=true", "rollout.max_prompt_len=1"]
    with pytest.raises(
        ValueError, match="at least 13 tokens; rollout.max_prompt_len allows 1 to 1"
    ):
        data.read("grpo", "data.overlong_prompts=truncate_left", *more, model=chat_model)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (30, "S9U0A1U2A3A4U567A"),
        (16, "S9U2A3A4U567A"),
        (13, "S9U2A3A4U567A"),
        (12, "S9U567A"),
        (7, "S9U567A"),
        (6, None),
    ],
)
def test_chats_are_cut_by_turns(data, chat_model, limit, expected):
    """The system message and the last user turn stay; a turn goes with its answers."""
    turns = [
        "system 9",
        "user 0",
        "assistant 1",
        "user 2",
        "assistant 3",
        "assistant 4",
        "user 567",
    ]
    chat = [dict(zip(("role", "content"), turn.split(), strict=True)) for turn in turns]
    data.write({"prompt": chat, "label": "1"}, {"prompt": chat[1:2], "label": "1"})
    more = ["data.overlong_prompts=truncate_left", f"rollout.max_prompt_len={limit}"]
    more.append("trainer.micro_batch_tokens=64")
    if expected is not None:
        assert prompts(data.read("grpo", *more, model=chat_model))[0] == expected
        return
    with pytest.raises(ValueError, match="line 1: .*its prompt has at least 7 tokens; .* 1 to 6"):
        data.read("grpo", *more, model=chat_model)


def test_a_cut_chat_keeps_its_tools(data, chat_model, tmp_path):
    """They stand before its turns, and count."""
    shutil.copytree(chat_model, tmp_path / "model")
    file = tmp_path / "model" / "chat_template.jinja"
    file.write_text("{% for t in tools or [] %}{{ t.name }}{% endfor %}" + file.read_text())
    turns = ("user", "0"), ("assistant", "1"), ("user", "56")
    chat = [{"role": role, "content": content} for role, content in turns]
    rows = [
        {"prompt": chat, "label": "1", "tools": [{"name": "77"}]},
        {"prompt": "1", "label": "1"},
    ]
    data.write(*(row | {"tools": row.get("tools")} for row in rows))
    more = ["data.tools_key=tools", "data.overlong_prompts=truncate_left", "data.chat=true"]
    found = {
        limit: prompts(
            data.read("grpo", *more, f"rollout.max_prompt_len={limit}", model=file.parent)
        )
        for limit in (10, 9, 8)
    }
    assert found == {10: ["77U0A1U56A"], 9: ["77U56A"], 8: ["77U56A"]}
    with pytest.raises(
        ValueError, match="line 1: problem 0: its prompt is a list of chat messages"
    ):
        data.read("grpo", "data.tools_key=tools")


def test_a_policy_that_does_not_exist(data):
    with pytest.raises(ValueError, match="data.overlong_prompts is 'cut'; give one of error, drop"):
        resolve("grpo", data.arguments("grpo", "data.overlong_prompts=cut"))


def test_of_generated_problems_those_are_encoded_that_come(runs, monkeypatch):
    """What the run will draw, once each; and a run goes on where it was not foreseen."""
    inputs = GrpoInputs(runs.resolve("used", "data.size=100000", "seed=3"))
    calls = []
    monkeypatch.setattr(type(inputs.text), "encode_prompts", lambda *_: calls.append(1) or [[1]])
    for position in range(6 * 3):
        inputs.train_set.encoded(inputs.train_set[problem_index(position, 100000, 3)])
    assert not calls
    unforeseen = next(
        i for i in range(100) if all(problem_index(p, 100000, 3) != i for p in range(18))
    )
    assert inputs.train_set.encoded(inputs.train_set[unforeseen]).prompt_ids.tolist() == [1]


def test_keys_that_change_no_result_bind_no_checkpoint(runs):
    base = bound_keys(runs.resolve("a"))
    for free in ("reward.timeout_s=5", "reward.num_workers=3"):
        assert bound_keys(runs.resolve("a", free)) == base
    assert bound_keys(runs.resolve("a", "data.overlong_prompts=drop")) != base


def rollout(*rewards):
    completion = Completion(
        request_id=0,
        sample_id=0,
        token_ids=(1,),
        logprobs=(0.0,),
        finish_reason="stop",
        version_spans=(),
    )
    problem = Problem(index=3, prompt="1", label="1", metadata={})
    return Rollout([problem], [[1]], [[completion] * len(rewards)], [[""]], [list(rewards)])


def test_close_rewards_have_advantages(runs):
    """Their differences are below what fp32 can hold of them."""
    config = runs.resolve("close").algorithm
    found = group_advantages(rollout(1e6, 1e6 + 0.01, 1e6 + 0.02).reward_tensor, config)[0].tolist()
    assert found == pytest.approx([-1, 0, 1], abs=1e-3)
    with pytest.raises(ValueError, match="the rewards .* of a prompt lie too far apart"):
        group_advantages(rollout(1e300, -1e300).reward_tensor, config)
