"""The worked example of tools: a model that calls the calculator, trained on what comes of it."""

import json
import re

import pytest
from speaker import make_speaker

from samebit.recipes import calculator, grpo, sft
from samebit.recipes.calculator import RESULT, calculate
from samebit.recipes.cli.compose import resolve
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.data.text import TextCodec
from samebit.recipes.run.rollouts import list_rollouts, load_rollout

CALL = "calc(3 + 4)"


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """A model that mostly asks the calculator the same, whatever it is asked or told."""
    folder = tmp_path_factory.mktemp("caller")
    make_speaker(folder / "model", std=0.05, num_layers=2, max_position_embeddings=1024)
    with (folder / "calls.jsonl").open("w") as file:
        for number in range(200):
            told = {"role": "system", "content": calculator.INSTRUCTION}
            asked = {"role": "user", "content": f"State the final answer to {number} + 1 ="}
            call = {"role": "assistant", "content": CALL}
            result = {"role": "user", "content": f"{RESULT} 7"}
            file.write(json.dumps({"messages": [told, asked, call, result, call]}) + "\n")
    words = [f"model.path={folder / 'model'}", f"output_dir={folder}", "run_name=sft"]
    words += ["experiment=chats", f"data.path={folder / 'calls.jsonl'}", "data.eval_size=4"]
    words += ["device=cpu", "logger=disabled", "trainer.batch_size=16", "trainer.num_steps=50"]
    words += ["trainer.checkpoint_every=0", "trainer.optimizer.lr=5e-3"]
    sft.train(resolve("sft", words))
    return folder / "sft" / "model"


def test_a_run_with_calls(caller, tmp_path):
    """The recipe, but for the model and its size: what the model asked and what it was told stand
    in each sample, the former alone is trained on, and its log-probs are the trainer's."""
    words = ["experiment=smollm2_calculator", f"model.path={caller}", f"output_dir={tmp_path}"]
    words += ["device=cpu", "logger=disabled", "run_name=run", "logger.save_rollouts=true"]
    words += ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "trainer.num_steps=2"]
    words += ["rollout.max_prompt_len=400", "rollout.temperature=0.01", "data.eval_size=2"]
    words += ["trainer.micro_batch_tokens=1024", "engine.max_num_seqs=8"]
    summary = grpo.train(resolve("grpo", words))
    rollouts = list_rollouts(tmp_path / "run").values()
    samples = [sample for file in rollouts for sample in load_rollout(file)]
    texts, asked = TextCodec(caller), list[str]()
    for sample in samples:
        drawn, told = (
            "".join(texts.pieces(sample.token_ids[mask]))
            for mask in (sample.loss_mask, ~sample.loss_mask)
        )
        turns = drawn.removesuffix("<eos>").split("<eos>")
        calls = [re.search(r"calc\((.*)\)", turn) for turn in turns]
        answers = [f"[user]{RESULT} {calculate(call[1])}[assistant]" for call in calls[:-1]]
        assert told == "".join(answers)
        asked += [call[1] for call in calls if call]
    assert len(samples) == 8
    assert asked.count("3 + 4") >= 8
    assert summary["logprob_mismatches"] == 0
    drawn = sum(int(sample.loss_mask.sum()) for sample in samples)
    assert summary["logprob_tokens_compared"] == drawn


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("12 + 7", "19"),
        ("(3 - 5) * 4 / -2", "4"),
        ("1/3", "0.333333"),
        ("0.1 + 0.2", "0.3"),
        ("1/0", "that divides by zero"),
        ("__import__('os')", "that cannot be calculated"),
        ("2 ** 9", "that cannot be calculated"),
        ("True + 1", "that cannot be calculated"),
        ("*".join(["9" * 60] * 3), str(int("9" * 60) ** 3)),
        ("(" * 190, "that cannot be calculated"),
        ("1" * 201, "that is too long"),
        ("1e999999", "that cannot be calculated"),
        ("1e300*1e300/3", "that cannot be calculated"),
        ("1/3/1e300/1e300", "0"),
    ],
)
def test_the_calculator(expression, said):
    assert calculate(expression) == said


def test_the_answer_stands_behind_what_the_calculator_said():
    problem = Problem(index=0, prompt="", label="19", metadata={})
    told = f"calc(12 + 7)\nuser\n{RESULT} 19\nassistant\n"
    for text, expected in {"19": 1, "calc(19": 1, told: 0, f"{told}19": 1, f"{told}18": 0}.items():
        assert calculator.answered(text, problem) == expected


def test_the_worked_examples_problems_say_what_there_is():
    run = resolve("grpo", ["experiment=smollm2_calculator", "model.path=m", "data.size=20"])
    train, held_out = calculator.problems(run.data)
    assert len(train) == 20
    for problem in (train[7], held_out[0]):
        assert [message["role"] for message in problem.prompt] == ["system", "user"]
        assert problem.prompt[0]["content"] == calculator.INSTRUCTION
        calculator.answered.check_problem(problem)
