"""Chats without a label: all the assistant's messages are trained on, to the token, or refused."""

import json
import shutil

import pytest
from test_records import Data, chat_model  # noqa: F401
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from samebit.recipes import sft
from samebit.recipes.cli.compose import resolve
from samebit.recipes.run.metrics import read_rows
from samebit.rollout.engine import Engine

TURN = "{{ {'system': 'S', 'user': 'U', 'assistant': 'A', 'tool': '='}[m.role] }}"
END = "{% if m.role != 'user' %}<eos>{% endif %}"
OPEN = "{% if add_generation_prompt %}A{% endif %}"
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.name }}{% endfor %}{% for m in messages %}"
    f"{TURN}{{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}{{{{ c.n }}}}{{% endfor %}}{END}"
    f"{{% endfor %}}{OPEN}"
)


def chat(*contents):
    """Messages of user and assistant in turns, a system's before them where it begins with S."""
    roles = ["user", "assistant"] * len(contents)
    if contents[0][0] == "S":
        contents, roles = (contents[0][1:], *contents[1:]), ["system", *roles]
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


@pytest.fixture
def data(request, tmp_path):
    """Its template ends the system's, the tool's and the assistant's messages with <eos>."""
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue("chat_model"), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Data(folder, tmp_path)


def read(data, *overrides):
    """Each sample as text, and again with a dot for each token that is masked."""
    train_set = data.read("sft", *overrides).train_set
    found = []
    for i in range(len(train_set)):
        sample = sft.make_sample(train_set, i, i)
        text = ["$0123456789=SUA"[x] for x in sample.token_ids]
        mask = [t if m else "." for t, m in zip(text, sample.loss_mask, strict=True)]
        found.append(("".join(text), "".join(mask)))
    return found


def test_every_answer_is_trained_on(data):
    """With its end token, also where a chat begins with one; what others say is not, nor what
    stands between."""
    calls = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [{"n": "34"}]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "6"},
        {"role": "assistant", "content": "78"},
    ]
    data.write(
        {"prompt": chat("S0", "12", "345", "6", "7"), "label": None},
        {"prompt": calls, "tools": [{"name": "99"}]},
        {"prompt": chat("12", "3", "4"), "label": "56"},
        {"prompt": chat("12", "3", "4", "56")},
        {"prompt": chat("12", "3"), "label": "4"},
        {"prompt": chat("0", "12", "3", "4")[1:], "tools": [{"name": "99"}]},
        {"prompt": chat("0", "12")[1:]},
    )
    rows = [json.loads(line) for line in data.path.read_text().splitlines()]
    data.write(*({"tools": None} | row for row in rows))
    assert read(data, "data.tools_key=tools") == [
        ("S0$U12A345$U6A7$", ".......345$...7$"),
        ("99U1A34$=5$A6$A78$", ".....34$....6$.78$"),
        ("U12A3$U4A56$", ".........56$"),
        ("U12A3$U4A56$", "....3$...56$"),
        ("U12A3$A4$", ".......4$"),
        ("99A12$U3A4$", "...12$...4$"),
        ("A12$", ".12$"),
    ]


def test_what_the_template_writes_into_an_answer_is_the_answers(data):
    """As Qwen3's does into the last one: an empty thought."""
    thought = "{% if loop.last and m.role == 'assistant' %}00{% endif %}{{ m.content }}"
    file = data.model / "chat_template.jinja"
    file.write_text(TEMPLATE.replace("{{ m.content }}", thought))
    data.write({"prompt": chat("1", "23", "4", "5")})
    assert read(data) == [("U1A23$U4A005$", "...23$...005$")]


def test_it_learns_all_answers(data):
    """The first loss is that of the model's own log-probs of what is trained on, and no more."""
    data.write(*({"prompt": chat(f"{i}", f"{i}{i}", "7", "8")} for i in range(2)))
    more = ["data.eval_size=0", "eval_every=20", "trainer.loss_mean=token"]
    run = resolve("sft", data.arguments("sft", *more))
    samples = sft.samples_of_step(run, 0, data.read("sft", *more).train_set)
    scores = Engine(data.model, device="cpu").score([s.token_ids.tolist() for s in samples])
    trained = [
        x
        for score, s in zip(scores, samples, strict=True)
        for x, m in zip(score, s.loss_mask[1:], strict=True)
        if m
    ]
    assert len(trained) == 2 * 5
    sft.train(run)
    [row] = read_rows(data.folder / run.run_name / "metrics.jsonl")
    assert row["train/loss"] == pytest.approx(-sum(trained) / 10, rel=1e-6)


def test_overlong_chats(data):
    """Refused by their tokens, dropped, or without their oldest turns."""
    data.write(
        {"prompt": chat("S9", "1" * 9, "22", "3" * 9, "4" * 5, "5", "6")},
        {"prompt": chat("1", "2")},
    )
    message = "line 1: problem 0: its chat has 39 tokens; trainer.micro_batch_tokens allows 1 to 32"
    with pytest.raises(ValueError, match=message):
        read(data)
    [short] = read(data, "data.overlong_prompts=drop")
    assert short == ("U1A2$", "...2$")
    expected = "S9$U333333333A44444$U5A6$", "..............44444$...6$"
    assert read(data, "data.overlong_prompts=truncate_left") == [expected, short]
    more = ["data.overlong_prompts=truncate_left", "trainer.micro_batch_tokens=7"]
    with pytest.raises(ValueError, match="line 1: .*its chat has at least 8 tokens; .* 1 to 7$"):
        read(data, *more)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (TEMPLATE.replace("<eos>", ""), r"message 2, an answer: .* writes no <eos> \(the end"),
        (
            TEMPLATE.replace("m.role != 'user'", "m.role != 'user' and loop.last"),
            "message 4, an answer: the chat template writes no <eos> between it and the last",
        ),
        (
            TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else '9' }}"),
            "message 2, an answer: the chat template writes what stands before it otherwise",
        ),
        (
            TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[-1] }}"),
            "message 2, an answer: its content is not whole in the chat as the template writes it",
        ),
    ],
)
def test_templates_that_do_not_show_the_answers(data, template, fault):
    (data.model / "chat_template.jinja").write_text(template)
    data.write({"prompt": chat("1", "23", "4", "5")})
    with pytest.raises(ValueError, match=f"line 1: problem 0: its {fault}"):
        read(data)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_refused(data, answer):
    data.write({"prompt": chat("1", answer, "4", "5")})
    with pytest.raises(ValueError, match="its message 2, an answer: it is empty"):
        read(data)


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"prompt": chat("1", "2", "3")}, "line 1 has no 'label'; its keys are"),
        ({"prompt": chat("1", "2", "3"), "label": None}, "line 1: 'label' is None; give a text"),
        (
            {"prompt": chat("1", "2<eos>3")},
            "message 2, an answer: its content is not whole in the chat",
        ),
        ({"prompt": chat("1", "2?3")}, "its characters become the token <eos>, the end token"),
    ],
)
def test_records_that_are_refused(data, record, fault):
    data.write(record)
    with pytest.raises(ValueError, match=fault):
        read(data)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (TEMPLATE.replace(OPEN, ""), "the chat template writes nothing where an answer begins"),
        (
            TEMPLATE.replace("'A', 'tool'", "'A' if loop.index > 1 else '', 'tool'"),
            "the chat template does not open it as it opens an answer to a user",
        ),
    ],
)
def test_first_answers_whose_beginning_nobody_knows(data, template, fault):
    (data.model / "chat_template.jinja").write_text(template)
    data.write({"prompt": chat("0", "12")[1:]})
    with pytest.raises(ValueError, match=f"line 1: problem 0: its message 1, an answer: {fault}"):
        read(data)


def test_an_answer_that_merges_with_what_is_before_it(data):
    """The model never reads such a token where it is to answer."""
    characters = "0123456789=SUA"
    vocab = {"<eos>": 0} | {c: i + 1 for i, c in enumerate(characters)} | {"A1": 15}
    tokenizer = Tokenizer(models.BPE(vocab, [("A", "1")], unk_token="<eos>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.save_pretrained(data.model)
    (data.model / "chat_template.jinja").write_text(TEMPLATE)
    data.write({"prompt": chat("1", "2", "3", "1")})
    with pytest.raises(ValueError, match="its message 4, an answer: its first characters and"):
        read(data)
    data.write({"prompt": chat("1", "2", "3", "2")})
    assert read(data) == [("U1A2$U3A2$", "...2$...2$")]


def test_other_commands_ask_for_a_label(data):
    data.write({"prompt": chat("1", "2")}, {"prompt": chat("1", "3")})
    with pytest.raises(ValueError, match="line 1 has no 'label'"):
        data.read("grpo")
