"""Runs of dpo: they learn, resume to the same bytes, and name the line of a bad pair."""

import json

import pytest
from run_children import Runs
from test_records import chat_model  # noqa: F401

from samebit.recipes import dpo
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_dpo
from samebit.recipes.cli.main import main
from samebit.recipes.run.inputs import SftInputs
from samebit.recipes.run.metrics import read_rows
from samebit.rollout.engine import Engine
from samebit.trainer.checkpoint import CheckpointError
from samebit.trainer.packing import pack_samples, share_batches


def pair(digits, worse=None):
    """A problem of reverse_digits, and an answer that leaves the digits as they are."""
    return {"prompt": f"{digits}=", "chosen": digits[::-1], "rejected": worse or digits}


class DpoRuns(Runs):
    """Six steps of four pairs, with a checkpoint every two."""

    words = (
        "trainer.num_steps=6",
        "trainer.batch_size=4",
        "trainer.checkpoint_every=2",
        "trainer.micro_batch_tokens=32",
        "trainer.optimizer.lr=5e-3",
        "data.eval_size=3",
        "eval_every=3",
    )

    def arguments(self, run_name, *overrides):
        own = [x for x in super().arguments(run_name) if not x.startswith(("data=", "data.args"))]
        return [*own, f"data.path={self.folder / 'pairs.jsonl'}", *overrides]

    def write(self, *records):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.folder / "pairs.jsonl").write_text(lines)

    def train(self, run_name, *overrides):
        summary = dpo.train(resolve("dpo", self.arguments(run_name, *overrides)))
        return summary, read_rows(self.folder / run_name / "metrics.jsonl")

    def refusal(self, *overrides):
        """What a run is told that cannot begin."""
        with pytest.raises(ValueError) as error:
            SftInputs(resolve("dpo", self.arguments("refused", *overrides)))
        return str(error.value)


PAIRS = [pair(f"{i}{(7 * i + 1) % 10}") for i in range(1, 10)] + [pair("507"), pair("1234")]


@pytest.fixture
def runs(demo_model, tmp_path):
    runs = DpoRuns(demo_model, tmp_path)
    runs.write(*PAIRS)
    return runs


@pytest.fixture(scope="module")
def base(demo_model, tmp_path_factory):
    """One uninterrupted run. Do not write to its folder."""
    runs = DpoRuns(demo_model, tmp_path_factory.mktemp("dpo"))
    runs.write(*PAIRS)
    runs.result = runs.train("base")
    return runs


def test_it_prefers_the_better_answer(base):
    """The loss falls from log 2, and held-out margins are those of the exported model."""
    summary, rows = base.result
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.6
    held_out = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert list(held_out) == [0, 3, 6]
    assert held_out[0] == pytest.approx(0.693147, abs=1e-5)
    assert summary["eval_loss"] == held_out[6]
    inputs = SftInputs(resolve("dpo", base.arguments("base")))
    models = base.folder / "base" / "model", base.model
    ids = [inputs.eval_set.encoded(problem) for problem in inputs.eval_set]
    answers = [x for each in ids for x in (each.label_ids, each.rejected_ids)]
    texts = [[*e.prompt_ids, *x] for e in ids for x in (e.label_ids, e.rejected_ids)]
    scores = [Engine(model, device="cpu").score(texts) for model in models]
    new, old = ([sum(s[-len(x) :]) for s, x in zip(each, answers, strict=True)] for each in scores)
    ratios = [a - b for a, b in zip(new, old, strict=True)]
    margins = [0.1 * (x - y) for x, y in zip(ratios[::2], ratios[1::2], strict=True)]
    assert summary["eval_accuracy"] == sum(x > 0 for x in margins) / 3
    last = [row["eval/margin"] for row in rows if "eval/margin" in row][-1]
    assert last == pytest.approx(sum(margins) / 3, rel=1e-9)


def test_resumed(runs, base):
    """To the same weights and figures; not with another beta, nor other answers."""
    runs.train("resumed", "trainer.num_steps=3")
    assert runs.train("resumed", "resume=true")[0] == base.result[0]
    assert read_rows(runs.folder / "resumed" / "metrics.jsonl")[-1] == base.result[1][-1]
    with pytest.raises(CheckpointError, match=r"algorithm\.beta 0\.1 there, 0\.2 here"):
        runs.train("resumed", "resume=true", "algorithm.beta=0.2")
    runs.write({**PAIRS[0], "rejected": "9"}, *PAIRS[1:])
    with pytest.raises(CheckpointError, match="content of training records"):
        runs.train("resumed", "resume=true")


@pytest.mark.usefixtures("chat_model")
def test_answers_as_messages(runs, request):
    """A text, the assistant's message, or all of the chat, whose prompt need not be said, or is the
    user's text: the same pair."""
    runs.model = request.getfixturevalue("chat_model")
    user, answer = {"role": "user", "content": "12="}, {"role": "assistant", "content": "21"}
    worse = {"role": "assistant", "content": "12"}
    forms = [("21", "12"), ([answer], [worse]), ([user, answer], [user, worse])]
    runs.write(*({"prompt": [user], "chosen": a, "rejected": b} for a, b in forms))
    inputs = SftInputs(resolve("dpo", runs.arguments("chat", "data.eval_size=0", "eval_every=20")))
    found = [inputs.train_set.encoded(problem) for problem in inputs.train_set]
    assert found == [found[0]] * 3
    chats = {"chosen": [user, answer], "rejected": [user, worse]}
    runs.write(chats, {"prompt": None} | chats, {"prompt": "12="} | chats)
    words = runs.arguments("chats", "data.eval_size=0", "eval_every=20", "data.chat=true")
    train_set = SftInputs(resolve("dpo", words)).train_set
    assert [train_set.encoded(problem) for problem in train_set] == found
    assert len(found[0].label_ids) == len(found[0].rejected_ids) == 3


USER, ASSISTANT = {"role": "user", "content": "12="}, {"role": "assistant", "content": "1"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "1=", "chosen": "1"}, "line 2 has no 'rejected'; its keys are"),
        (pair("77"), "line 2: 'chosen' and 'rejected' are the same answer"),
        ({**pair("12"), "rejected": ""}, "line 2: problem 1: one of its answers is empty; dpo"),
        ({**pair("12"), "chosen": None}, "line 2: 'chosen' is None; give a text or a list that"),
        ({**pair("12"), "chosen": [USER]}, "; give a text or a list that ends with an assistant"),
        (
            {**pair("12"), "chosen": [USER, ASSISTANT]},
            "line 2: 'chosen' has 1 messages before its last, not the prompt's; a text prompt is "
            "one with data.chat=true",
        ),
        ({"chosen": "1", "rejected": "2"}, "line 2 has no 'prompt'; its keys are"),
        ({"chosen": [ASSISTANT], "rejected": "2"}, "line 2 has no 'prompt'; its keys are"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, USER, ASSISTANT]},
            "line 2: 'rejected' has 2 messages before its last, not the prompt's",
        ),
        (
            pair("1234567890"),
            "line 2: problem 1: its prompt has 11 tokens and its label 11 and its rejected answer "
            "11; the model's max_position_embeddings allows 1 to 64, trainer.micro_batch_tokens "
            "32 of prompt and answer twice (or give data.overlong_prompts)",
        ),
    ],
)
def test_bad_pairs_are_named_by_line(runs, record, message):
    runs.write(PAIRS[0], record, *PAIRS[2:])
    assert message in runs.refusal()


def test_overlong_pairs_are_dropped_whole_or_cut(runs):
    runs.write(PAIRS[0], pair("1234567890"), *PAIRS[2:])
    for policy, count in (("drop", 7), ("truncate_left", 8)):
        words = runs.arguments(policy, f"data.overlong_prompts={policy}")
        train_set = SftInputs(resolve("dpo", words)).train_set
        assert len(train_set) == count
        longest = max(
            2 * len(x.prompt_ids) + len(x.label_ids) + len(x.rejected_ids)
            for x in map(train_set.encoded, train_set)
        )
        assert longest <= 32


def test_two_copies_share_the_pairs(runs):
    """A micro-batch is halved for them, and no pair is parted."""
    run = resolve("dpo", runs.arguments("copies", "trainer.parallel.data=2"))
    data = SftInputs(run).train_set
    samples = dpo.samples_of_step(run, 0, data)
    batches = pack_samples(samples, 1000, "sequence", at_least=2)
    shares = share_batches(batches, 2)
    for share in shares:
        [batch] = share
        assert [s.unit for s in batch.samples[::2]] == [s.unit for s in batch.samples[1::2]]
        assert len(batch.samples) == 4


def test_a_dry_run_and_what_is_refused(runs, capsys):
    figures = describe_dpo(resolve("dpo", runs.arguments("dry")))
    assert (figures["pairs_per_step"], figures["train_records"]) == (4, 8)
    assert figures["reference_mib"] == figures["weights_mib"]
    for words, message in (
        (["algorithm.beta=0"], "algorithm.beta is 0.0; it must be positive and finite"),
        (["algorithm.label_smoothing=0.5"], "algorithm.label_smoothing is 0.5; it must be in"),
        (["algorithm.name=grpo"], "algorithm.name is 'grpo'; it must be dpo, as the command is"),
        (["trainer.loss_mean=token"], "trainer.loss_mean is 'token'; it must be sequence: a"),
        (["logger.save_rollouts=true"], "the command is dpo, which draws no samples"),
    ):
        assert main(["dpo", *runs.arguments("dry", *words, "dry_run=true")]) == 2
        assert message in capsys.readouterr().err
