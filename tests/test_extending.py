"""The examples of docs/extending.md, run together from files outside the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copyfile

import pytest

from samebit.recipes.cli.main import main
from samebit.recipes.models.tiny_model import write_character_tokenizer, write_config, write_weights
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.rollout.engine import Engine
from samebit.rollout.models import registry
from samebit.trainer.checkpoint import latest_checkpoint

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
OWN = {
    "model_family": "my_models:Twin",
    "data.task": "my_tasks:successors",
    "reward.name": "my_rewards:short_and_right",
    "algorithm.name": "my_algorithms:Reinforce",
    "rollout.generate": "my_turns:generate",
}
TRANSPORT = "placement.transport=my_transport:OneByOne"
PROPOSER = "engine.speculative=my_proposers:Again"
BENCH = ["workloads=[1x1x4x2]", "repeats=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files, where Python finds them, and a model of the page's family."""
    examples = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == len(OWN) + 3
    for name, code in examples:
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "FAMILIES", list(registry.FAMILIES))
    make_twin(tmp_path / "twin")
    return tmp_path


def make_twin(path):
    path.mkdir()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    shape |= {"tie_word_embeddings": True, "architectures": ["TwinForCausalLM"]}
    vocab_size = write_character_tokenizer(path, "012=")
    write_config(path, "llama", vocab_size=vocab_size, **shape)
    registry.load_model_config(path, OWN["model_family"])
    write_weights(path, seed=3)


def command(folder, run_name, *words):
    """A run of two steps of 32 samples, of which some are right by chance."""
    return [
        "grpo",
        *(f"{key}={name}" for key, name in OWN.items()),
        f"model.path={folder / 'twin'}",
        f"output_dir={folder}",
        f"run_name={run_name}",
        "device=cpu",
        "logger=disabled",
        "data.args.below=2",
        "data.eval_size=1",
        "reward.args.limit=3",
        "reward.num_workers=1",
        "algorithm.entropy_coef=0.01",
        "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=16",
        "rollout.max_prompt_len=8",
        "rollout.max_new_tokens=4",
        "rollout.eval_every=1",
        "trainer.num_steps=2",
        "trainer.checkpoint_every=1",
        "trainer.micro_batch_tokens=64",
        "trainer.optimizer.lr=1e-2",
        *words,
    ]


def start(folder, arguments):
    """`samebit` as a user starts it, with the folder on PYTHONPATH."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    program = [sys.executable, "-P", "-m", "samebit.recipes.cli.main", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(program, env=env, stdout=pipe, stderr=pipe, text=True)


def result(folder, run_name):
    """What is equal between equal runs."""
    run = folder / run_name
    rows = without_times(read_rows(run / "metrics.jsonl"))
    return json.loads((run / "summary.json").read_text()), rows, read_rows(run / "samples.jsonl")


def test_the_pages_examples_train_together(folder, capsys):
    """By the command line alone; resumed, with guesses, with the engine in another process, and of
    a dataset that makes its problems on demand, alike."""
    process = start(folder, command(folder, "whole", TRANSPORT))
    assert main(command(folder, "parts", TRANSPORT, "trainer.num_steps=1")) == 0
    assert main(command(folder, "parts", TRANSPORT, "resume=true", PROPOSER)) == 0
    assert main(command(folder, "process", "placement=process", PROPOSER)) == 0
    by_class = "data.task=my_sets:Successors"
    assert main(command(folder, "class", by_class, "trainer.num_steps=1")) == 0
    assert main(command(folder, "class", by_class, "resume=true")) == 0
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    whole = result(folder, "whole")
    assert result(folder, "parts") == result(folder, "process") == whole
    assert result(folder, "class") == whole

    summary, rows, samples = whole
    assert (summary["logprob_mismatches"], len(rows)) == (0, 3)
    assert summary["logprob_tokens_compared"] > 64
    assert any(0 < row["rollout/reward_mean"] < 1 for row in rows[1:])
    assert rows[1].keys() >= {"train/loss", "train/entropy", "eval/reward_mean"}
    assert "train/ratio" not in rows[1]  # of GRPO
    for x in samples:
        assert (x["prompt"], x["label"]) in {("1=", "2"), ("0=", "1")}
        assert x["reward"] == (x["completion"] == x["label"])

    again = ("resume=true", "dry_run=true")
    bound = latest_checkpoint(folder / "whole" / "checkpoints").manifest["config"]
    assert bound.items() >= OWN.items()
    for key in ("model_family", "data.task"):
        module, _, name = OWN[key].partition(":")
        copyfile(folder / f"{module}.py", folder / f"{module}_2.py")
        registry.FAMILIES.pop()
        assert main(command(folder, "whole", *again, f"{key}={module}_2:{name}")) == 1
        assert f"{key} {OWN[key]} there, {module}_2:{name} here" in capsys.readouterr().err
    registry.FAMILIES.pop()
    where = [f"checkpoint={folder / 'whole'}", f"model={folder / 'twin'}", f"out={folder / 'out'}"]
    assert main(["export", f"model_family={OWN['model_family']}", *where]) == 0
    source = folder / "my_tasks.py"
    source.write_text(source.read_text() + "\n# edited\n")
    assert main(command(folder, "whole", *again)) == 0
    assert "the source of data.task has changed since" in capsys.readouterr().err


QWEN3 = "samebit.rollout.models.qwen3:Qwen3"
TAKES = "which cannot be imported: "
WRONG = {
    "model_family=nowhere:Twin": f"{TAKES}No module named 'nowhere'; put its folder on PYTHONPATH",
    "model_family=my_models:Triplet": f"{TAKES}module 'my_models' has no attribute 'Triplet'",
    "model_family=my_models:Family": "it must be a subclass of samebit.rollout.models.config:Model",
    "model_family=my_models:DenseModel": "its `family` must be a Family whose architecture is none",
    f"model_family={QWEN3}": "it must be a list with one of the known: Qwen3ForCausalLM",
    "data.task=my_tasks:predecessors": f"{TAKES}module 'my_tasks' has no attribute 'predecessors'",
    "data.task=my_tasks:__name__": "it must be a function: load(config) -> (train, held_out)",
    "data.task=dataclasses:astuple": "it must be a function: load(config) -> (train, held_out)",
    "data.task=json:loads": "which failed: TypeError('the JSON object must be str",
    "data.task=my_sets:Problem": "which failed: TypeError(",
    "numerics.attention=samebit.kernels.attention:CanonicalAttention": "a name that no kind of",
    "engine.speculative=my_proposers:None": f"{TAKES}module 'my_proposers' has no attribute 'None'",
    "engine.speculative=my_models:Twin": "a subclass of samebit.rollout.speculative.proposer:Propo",
    "numerics.attention=my_models:Twin": "a subclass of samebit.kernels.attention_kind:Att",
}


def test_what_cannot_be_used_is_refused_by_key_and_value(folder, capsys):
    """At the start as in a dry run, which read the same inputs; nothing is left of it."""
    for word, reason in WRONG.items():
        key, _, name = word.partition("=")
        assert main(command(folder, "run", "dry_run=true", word)) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"samebit grpo: {key} is '{name}'")
        assert reason in said
    assert main(command(folder, "run", word)) == 1
    assert not (folder / "run").exists()


def test_a_problem_stands_at_its_index(folder, capsys):
    """Else a model would be given one problem and another's label."""
    with (folder / "my_tasks.py").open("a") as file:
        file.write("from dataclasses import replace\ndef renumbered(config):\n")
        file.write("    train, held_out = successors(config)\n")
        file.write("    return [replace(p, index=1) for p in train], held_out\n")
    assert main(command(folder, "run", "dry_run=true", "data.task=my_tasks:renumbered")) == 1
    said = capsys.readouterr().err
    assert "holds Problem(index=1, prompt='1=', label='2'" in said
    assert "at 0; give a Problem with index 0" in said


def test_no_prompt_is_in_both_splits(folder, capsys):
    """Of the problems that the run will use."""
    with (folder / "my_tasks.py").open("a") as file:
        file.write("from dataclasses import replace\ndef shared(config):\n")
        file.write("    train, held_out = successors(config)\n")
        file.write("    more = train[: config.args['num']]\n")
        file.write("    more = [replace(p, index=i) for i, p in enumerate(more, len(held_out))]\n")
        file.write("    return train, held_out + more\n")
    task = ("dry_run=true", "data.task=my_tasks:shared", "data.args.below=9")
    assert main(command(folder, "run", *task, "data.args.num=0")) == 0
    capsys.readouterr()
    assert main(command(folder, "run", *task, "data.args.num=1")) == 1
    said = capsys.readouterr().err
    assert "this held-out prompt is that of problem 0 of the train split too; none may be" in said


OWN_CLASS = """
class Odd(Successors):
    def __getitem__(self, index):
        return {}["question"]

class Empty(Successors):
    def __len__(self):
        return 0

class Split(Successors):
    def __len__(self):
        return 0 if self.numbers[0] == 0 else 1

class Uncounted(Successors):
    def __len__(self):
        return 2.5

class Endless(Successors):
    def __len__(self):
        return 1 << 31

class Unread(Successors):
    def __init__(self, config, held_out):
        open("/nowhere")

class Worded(Successors):
    def __getitem__(self, index):
        return int("one")

class Asks(Successors):
    field, value = "label", 7
    def __getitem__(self, index):
        return replace(super().__getitem__(index), **{self.field: self.value})

class AsksNumber(Asks):
    field = "prompt"

class Knows(Asks):
    field, value = "metadata", None

class Sorts(Asks):
    field, value = "metadata", {1: "one", "two": 2}

class Calls(Asks):
    field, value = "metadata", {"f": lambda: 1}

class Halves(Asks):
    value = chr(0xD800)

class Leaves(Asks):
    def __getitem__(self, index):
        raise SystemExit(0)

class LeavesAtOnce(Asks):
    def __init__(self, config, held_out):
        raise SystemExit
"""
ODD = {
    "Odd": "the train split raised KeyError('question') at 0",
    "Empty": "data.task is 'my_sets:Empty', which has no problem to train on; give at least 1",
    "Split": "data.task is 'my_sets:Split', which has no held-out problem; give at least 1",
    "Uncounted": "data.task is 'my_sets:Uncounted', which failed: TypeError(\"'float' object",
    "Endless": "which has 2147483648 problems in a split; give at most 1073741824",
    "Unread": "data.task is 'my_sets:Unread', which failed: FileNotFoundError(",
    "Worded": "the train split at 0: invalid literal for int() with base 10: 'one'",
    "Asks": "problem 0: its label is 7; give a text",
    "AsksNumber": "problem 0: its prompt is 7; give a text or a list of chat messages",
    "Knows": "problem 0: its metadata is None; give a dict",
    "Sorts": "problem 0: its metadata is {1: 'one', 'two': 2}, which cannot be written down (Type",
    "Calls": "which cannot be written down (PicklingError(",
    "Leaves": "the train split raised SystemExit(0) at 0",
    "LeavesAtOnce": "data.task is 'my_sets:LeavesAtOnce', which failed: SystemExit()",
    "Halves": "problem 0: it holds the lone surrogate \\ud800, which is no character",
}


def test_a_dataset_that_cannot_be_used_is_named(folder, capsys):
    """In a dry run, and not where the first step would ask it."""
    with (folder / "my_sets.py").open("a") as file:
        file.write("from dataclasses import replace\n" + OWN_CLASS)
    for name, reason in ODD.items():
        words = command(folder, "run", "dry_run=true", f"data.task=my_sets:{name}")
        assert main(words) == 1
        assert reason in capsys.readouterr().err


def test_other_commands_and_the_engine_take_a_family(folder, capsys):
    """Those that read a model; each refuses the folder without it."""
    model, family = folder / "twin", "my_models:Twin"
    registry.FAMILIES.pop()
    with pytest.raises(ValueError, match="it must be a list with one of the known: Llama"):
        Engine(model, device="cpu")
    engine = Engine(model, device="cpu", model_family=family)
    assert type(engine.model_config).__name__ == "Twin"
    assert engine.update_weights_from_disk(model).step == 1
    where = [f"model={model}", f"output_dir={folder}", "device=cpu"]
    for words in (["verify", "properties=[batch_size]"], ["bench", "engine", *BENCH]):
        registry.FAMILIES.pop()
        assert main([*words, *where]) == 1
        assert "TwinForCausalLM" in capsys.readouterr().err
        assert main([*words, *where, f"model_family={family}"]) == 0
