"""Every file of configs/experiment: it says what it is for, and a dry run of it reads real data."""

import json
import re

import pytest
from speaker import make_speaker

from samebit.recipes.cli.compose import CONFIG_DIR, groups_of, resolve
from samebit.recipes.cli.main import main
from samebit.recipes.run.inputs import SftInputs
from samebit.recipes.sft import make_sample

COMMANDS = ("dpo", "eagle3", "grpo", "sft")
FILES = sorted((CONFIG_DIR / "experiment").glob("*/*.yaml"))
ASKED = [{"role": "user", "content": "What is 1/2 + 1/4?"}]
TALK = [{"role": "system", "content": "Be kind."}, *ASKED]
TALK += [{"role": "assistant", "content": "Why?"}, {"role": "user", "content": "Because."}]
TALK += [{"role": "assistant", "content": "It is 3/4."}]
RECORDS = {
    "sft/chats": {"messages": TALK},
    "dpo/pairs": {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
    "grpo/qwen3_math": {"prompt": ASKED, "reward_model": {"ground_truth": "3/4"}},
}
"""Of the recipes whose data is the user's: a record as their files describe it."""
OF_TASKS = {
    "reverse_digits": [],
    "reverse_digits_ppo": [],
    "reverse_digits_distillation": ["distillation.teacher={model}"],
    "smollm2_chain_sum": [],
    "smollm2_calculator": ["rollout.max_prompt_len=400", "trainer.num_steps=20"],
    "smollm2_online_draft": [],
}
"""Of those with a task: what they need where a character is a token."""
OF_DRAFTS = ("smollm2_draft", "smollm2_draft_boards")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A small random Qwen3 that reads characters and has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "speaker"
    return make_speaker(folder, num_layers=7, max_position_embeddings=4096)


def words_of(name, speaker, folder):
    """What a user gives beside the recipe, which is named as command/experiment."""
    words = [f"model.path={speaker}", f"output_dir={folder}", "device=cpu"]
    if name in RECORDS:
        file = folder / "data.jsonl"
        file.write_text("".join(f"{numbered(RECORDS[name], i)}\n" for i in range(300)))
        words.append(f"data.path={file}")
    return [f"experiment={name.partition('/')[2]}", *words]


def numbered(record, number):
    """A record of its own, as JSON: the same prompt twice would be held out and trained on."""
    return json.dumps(record).replace(" is ", f" is {number}: ").replace("Hi", f"Hi {number}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_recipe_says_what_it_is_for(file):
    """Purpose and hardware in one line, behind the one that Hydra wants first; the command."""
    lines = file.read_text().splitlines()
    comment = "\n".join(lines[2 : next(i for i, line in enumerate(lines) if line[0] != "#")])
    assert lines[0] == "# @package _global_"
    assert re.fullmatch(r"# [A-Z].+; .*(one GPU of \d+ GiB|CPU cores)\.", lines[1])
    assert f"samebit {file.parent.name} experiment={file.stem}" in comment


def test_every_command_that_trains_has_recipes_of_its_own(capsys):
    """Its help and its errors name these, and no other's."""
    found = {command: groups_of(command)["experiment"] for command in COMMANDS}
    assert [(f.parent.name, f.stem) for f in FILES] == [(c, x) for c in COMMANDS for x in found[c]]
    for command, names in found.items():
        assert main([command, "--help"]) == 0
        assert f"\n  experiment: {', '.join(names)}\n" in capsys.readouterr().out
        others = {name for other in COMMANDS for name in found[other]} - {*names}
        for name in ("none", min(others)):
            assert main([command, f"experiment={name}"]) == 2
            known = ", ".join(f"experiment={name}" for name in names)
            expected = f"samebit {command}: there is no experiment/{name}; give one of {known}\n"
            assert capsys.readouterr().err == expected
    assert groups_of("plan")["experiment"] == found["grpo"]


@pytest.mark.parametrize("name", OF_TASKS)
def test_recipes_of_tasks(name, speaker, tmp_path, capsys):
    """As they stand, but for the model; of the one with a calculator the first steps."""
    words = words_of(f"grpo/{name}", speaker, tmp_path)
    words += [word.format(model=speaker) for word in OF_TASKS[name]]
    assert main(["grpo", *words, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    for figure in (r"train_records +100,000", r"held_out_records +256"):
        assert re.search(rf"^{figure}$", out, re.MULTILINE)


def test_every_recipe_is_read():
    """By one of the tests here."""
    drafts = {f"eagle3/{name}" for name in OF_DRAFTS}
    named = {*RECORDS, *(f"grpo/{name}" for name in OF_TASKS), *drafts}
    assert named == {f"{file.parent.name}/{file.stem}" for file in FILES}


@pytest.mark.parametrize("name", RECORDS)
def test_recipes_for_your_file(name, speaker, tmp_path, capsys):
    """Without it they ask for it; of records as described every one is read."""
    command, words = name.partition("/")[0], words_of(name, speaker, tmp_path)
    assert main([command, *words[:-1], "dry_run=true"]) == 1
    assert f"samebit {command}: data.path is unset; give the file" in capsys.readouterr().err
    words += ["reward.num_workers=1"] if command == "grpo" else []
    assert main([command, *words, "dry_run=true"]) == 0
    held_out = 256 if command == "grpo" else 64
    assert re.search(rf"^train_records +{300 - held_out}$", capsys.readouterr().out, re.MULTILINE)


def test_all_but_the_answers_of_a_chat_is_masked(speaker, tmp_path):
    """What system and user said is read, and not trained on."""
    run = resolve("sft", words_of("sft/chats", speaker, tmp_path))
    inputs = SftInputs(run)
    sample = make_sample(inputs.train_set, 7, 0)
    texts = "".join(inputs.text.pieces(sample.token_ids))
    assert texts == (
        "[system]Be kind.[user]What is 7: 1/2 + 1/4?[assistant]Why?<eos>[user]Because."
        "[assistant]It is 7: 3/4.<eos>"
    )
    trained = sample.token_ids[sample.loss_mask]
    assert "".join(inputs.text.pieces(trained)) == "Why?<eos>It is 7: 3/4.<eos>"


@pytest.mark.parametrize("name", OF_DRAFTS)
def test_the_recipe_for_a_draft(name, speaker, tmp_path, capsys):
    """Every task of its list is there. A character is a token here, so prompts are longer, and
    there are fewer tokens to say."""
    words = words_of(f"eagle3/{name}", speaker, tmp_path)
    words += ["rollout.prompts_per_step=1", "rollout.max_prompt_len=1000", "dry_run=true"]
    words += ["draft.vocab_size=null"]
    assert main(["eagle3", *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^held_out_records +200$", out, re.MULTILINE)
    assert re.search(r"^optimizer_steps +400$", out, re.MULTILINE)
