"""Text to token ids and back, exactly, with tokenizers that do all that tokenizers do."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from samebit.recipes.data.conversation import GenerateRequest
from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.reward_pool import load_reward
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.data.text import TextCodec
from samebit.recipes.models.tiny_model import write_config
from samebit.rollout.types import Completion
from samebit.weight_sync.types import VersionSpan

BOS, EOS, CALL, START = "<s>", "</s>", "<call>", "<|start|>"
VOCAB = {t: i for i, t in enumerate([BOS, EOS, CALL, START, *"abcxy01 !=.,n't", *"pqr"])}
TEMPLATE = (
    "{{bos_token}}{% for m in messages %}{% if m.role == 'evil' %}{{raise_exception('no evil')}}"
    "{% endif %}{{m.content}}={% endfor %}{% if add_generation_prompt %}!{% endif %}"
)
SIZES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
ADDS_BOTH = f"{BOS} $A {EOS}"


@pytest.fixture
def codec(tmp_path):
    """codec(single, **settings): of a tokenizer of characters, saved and read again."""

    def make(single=None, *, template=None, chat=False, change=None, **settings):
        tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="x"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        if single is not None:
            ids = [(token, VOCAB[token]) for token in (BOS, EOS)]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=ids
            )
        if change is not None:
            change(tokenizer)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=EOS,
            additional_special_tokens=[CALL, START],
            chat_template=template,
            **settings,
        )
        fast.save_pretrained(tmp_path)
        write_config(tmp_path, "llama", vocab_size=len(VOCAB), **SIZES)
        return TextCodec(tmp_path, chat)

    return make


def tokens(codec, prompt):
    [ids] = codec.encode_prompts([prompt], [codec.render(prompt)])
    return [next(t for t, i in VOCAB.items() if i == each) for each in ids]


def said(text, *more, reason="length"):
    """A completion of these tokens."""
    ids = tuple(VOCAB[t] for t in (*text, *more))
    return Completion(
        request_id=0,
        sample_id=0,
        token_ids=ids,
        logprobs=(0.0,) * len(ids),
        finish_reason=reason,
        version_spans=(VersionSpan(0, None),),
    )


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        (None, "ab", ["a", "b"]),
        (f"{BOS} $A", "ab", [BOS, "a", "b"]),
        (f"{BOS} $A", "<s>ab", [BOS, "a", "b"]),  # it begins with BOS already
        (f"{BOS} $A", "<s><s>a", [BOS, BOS, "a"]),  # what the user wrote is the user's
        (f"$A {EOS}", "ab", ["a", "b"]),
        (ADDS_BOTH, "ab", [BOS, "a", "b"]),
        (ADDS_BOTH, "ab</s>", [BOS, "a", "b", EOS]),
        (ADDS_BOTH, "<s>ab</s>", [BOS, "a", "b", EOS]),
        (f"{BOS} $A", "<call>a", [BOS, CALL, "a"]),  # no beginning of a template
    ],
)
def test_a_text_prompt_gets_one_bos_and_no_end(codec, single, text, expected):
    assert tokens(codec(single), text) == expected


def test_a_prompt_that_is_cut_keeps_its_bos_and_its_end(codec):
    """The question stands at the end of a prompt."""
    adds = codec(f"{BOS} $A")
    [ids] = adds.encode_prompts(["abcxy"], ["abcxy"])
    assert adds.cut_left(ids, 3) == [VOCAB[BOS], VOCAB["x"], VOCAB["y"]]
    assert adds.cut_left(ids, 1) == ids  # which does not fit: there is nothing to ask
    assert codec().cut_left(ids[1:], 2) == [VOCAB["x"], VOCAB["y"]]


def test_what_stopped_a_completion_is_no_part_of_its_text(codec):
    """But the same token is, where labels hold it and it stopped nothing."""
    text = codec()
    text.keep_tokens_of(["a</s>"])
    assert text.decode(said("a", EOS, reason="stop")) == "a"
    assert text.decode(said("a", EOS, reason="length")) == "a</s>"
    assert text.decode(said("ab", reason="stop")) == "ab"  # by a token that is not special


def test_a_chat_prompt_is_what_its_template_writes(codec):
    messages = [{"role": "user", "content": "ab"}]
    chat = codec(ADDS_BOTH, template=TEMPLATE, chat=True)
    expected = [BOS, "a", "b", "=", "!"]
    assert tokens(chat, "ab") == tokens(chat, messages) == expected
    plain = codec(ADDS_BOTH, template=TEMPLATE)
    assert tokens(plain, messages) == tokens(plain, chat.render("ab")) == expected


def test_a_text_that_begins_like_the_template_gets_no_bos(codec):
    """The template is the authority: written by hand or by us, its text gives the same tokens."""
    template = START + TEMPLATE.removeprefix("{{bos_token}}")
    plain = codec(ADDS_BOTH, template=template)
    assert tokens(plain, "<|start|>ab=!") == [START, "a", "b", "=", "!"]
    assert tokens(plain, "ab") == [BOS, "a", "b"]


def test_stored_truncation_and_padding_are_not_obeyed(codec):
    """A prompt is never shortened in silence."""

    def change(tokenizer):
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=9, pad_id=0, pad_token=BOS)

    assert tokens(codec(change=change), "abcabc") == list("abcabc")


@pytest.mark.parametrize("label", ["x != y", "a , b .", "ca n't", " a", "a  b "])
def test_an_exactly_right_completion_is_rewarded(codec, label):
    """Whatever the tokenizer's settings would clean up."""
    text = codec(clean_up_tokenization_spaces=True)
    assert text.decode(said(label)) == label
    problem = Problem(index=0, prompt="", label=label, metadata={})
    reward = load_reward(RewardConfig())
    assert reward(text.decode(said(label, EOS, reason="stop")), problem) == 1.0


@pytest.mark.parametrize("nested", [False, True])
def test_a_decoder_cleans_nothing_up(codec, nested):
    def change(tokenizer):
        decoder = decoders.WordPiece("##", cleanup=True)
        tokenizer.decoder = decoders.Sequence([decoder]) if nested else decoder

    assert codec(change=change).decode(said("a!b,c")) == "a ! b , c"


def test_special_tokens_of_labels_stay_in_the_text(codec):
    text = codec()
    done = said([CALL, "a", START], EOS, reason="stop")
    assert text.decode(done) == "a"
    text.keep_tokens_of(["<call>a", "b"])
    assert text.decode(done) == "<call>a"
    text.keep_tokens_of(["</s>"])  # of two end tokens the last one ends
    assert text.decode(said("a", EOS, EOS, reason="stop")) == "a</s>"


def test_labels_end_once(codec):
    text = codec(ADDS_BOTH)
    assert text.encode_labels(["ab", ""]) == [[VOCAB["a"], VOCAB["b"], VOCAB[EOS]], []]


def test_what_cannot_be_written_is_seen(codec):
    def lower(tokenizer):
        tokenizer.normalizer = normalizers.Lowercase()

    assert codec(change=lower).rewritten(["AB", "a!", "<call>"]) == ["ab", "a!", ""]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "evil", "content": "a"}], "the chat template refuses its prompt: .*no evil"),
        ([{"role": "none", "content": "a"}], "the chat template makes an empty text"),
        ([{"role": "type", "content": "a"}], "the chat template refuses its prompt: .*TypeError"),
    ],
)
def test_a_template_that_fails_is_named(codec, prompt, message):
    template = (
        "{% set m = messages[0] %}{% if m.role == 'evil' %}{{raise_exception('no evil')}}"
        "{% elif m.role == 'type' %}{{m.content + 1}}{% endif %}"
    )
    with pytest.raises(ValueError, match=message):
        codec(template=template).render(prompt)


def test_tools_go_to_the_template(codec):
    """A text has none, and a template that leaves them out would train on another prompt."""
    told = codec(template="{% for t in tools or [] %}{{t.name}}{% endfor %}" + TEMPLATE, chat=True)
    assert told.render("a", [{"name": "b"}, {"name": "c"}]) == f"bc{BOS}a=!"
    assert told.render("a") == told.render("a", []) == f"{BOS}a=!"
    with pytest.raises(ValueError, match="it has tools, which the chat template leaves out"):
        codec(template=TEMPLATE, chat=True).render("a", [{"name": "b"}])
    with pytest.raises(ValueError, match="it has tools, but its prompt is a text; give chat mess"):
        codec(template=TEMPLATE).render("a", [{"name": "b"}])


def test_messages_without_a_template(codec):
    with pytest.raises(ValueError, match="list of chat messages, but .* has no chat template"):
        codec().render([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="data.chat is true, but .* has no chat template"):
        codec(chat=True)


def test_a_tokenizer_that_cannot_be_read_is_named(codec, tmp_path):
    codec()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=f"tokenizer of model.path {tmp_path} cannot be read: "):
        TextCodec(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=f"tokenizer of model.path {tmp_path} cannot be read: "):
        TextCodec(tmp_path)
    settings |= {"auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}, "tokenizer_class": "My"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ValueError, match="it needs code of its own, which is not run"):
        TextCodec(tmp_path)


def test_what_a_template_writes_between_answers(codec):
    """From an answer's end to the next one's begin; the answer's own end is not given twice."""
    plain = codec(template=TEMPLATE)
    assert plain.after_answer([{"role": "user", "content": "b"}]) == "=b=!"
    with pytest.raises(ValueError, match="the chat template refuses its prompt: .*no evil"):
        plain.after_answer([{"role": "evil", "content": "b"}])
    deaf = codec(template="{{messages[-1].content}}")
    with pytest.raises(ValueError, match="leaves an earlier answer out, or rewrites it"):
        deaf.after_answer([{"role": "user", "content": "b"}])
    ends = codec(template=TEMPLATE.replace("}}=", "}}</s>="))
    problem = Problem(index=0, prompt="a", label="b", metadata={})
    given = {"sample_id": 0, "prompt_ids": (0,), "problem": problem, "max_new_tokens": 9}
    request = GenerateRequest(text=ends, **given)
    after = [VOCAB[c] for c in "=b"] + [VOCAB[EOS]] + [VOCAB[c] for c in "=!"]
    for reason, token, expected in (
        ("stop", EOS, after),
        ("length", "a", [VOCAB[EOS], *after]),
    ):
        turn = said("a", token, reason=reason)
        assert request.reply(turn, [{"role": "user", "content": "b"}]) == expected


def test_pieces_are_whole_characters(codec):
    """Of tokens that are bytes: a character stands where its last one does."""

    def by_bytes(tokenizer):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: i for i, letter in enumerate(letters)}
        tokenizer.model = models.BPE(vocab=vocab, merges=[])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()

    text = codec(change=by_bytes)
    ids = text.encode("a é日🙂b")
    assert text.pieces(ids) == ["a", " ", "", "é", "", "", "日", "", "", "", "🙂", "b"]
    cut = text.pieces(ids[:5])  # within a character
    assert cut == ["a", " ", "", "é", "\ufffd"]
    broken = text.pieces(ids[4:5] * 20)
    assert len(broken) == 20
    assert "".join(broken) == "\ufffd" * 20
    assert text.pieces([]) == []
