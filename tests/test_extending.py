"""The examples of docs/extending.md, run together from files outside the package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copyfile

import pytest

from samebit.kernels.attention_kind import AttentionKind
from samebit.recipes.cli.main import main
from samebit.recipes.models.tiny_model import write_character_tokenizer, write_config, write_weights
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.rollout.models import registry
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.checkpoint import latest_checkpoint

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
OWN = {
    "model_family": "my_models:Twin",
    "data.task": "my_tasks:successors",
    "reward.name": "my_rewards:short_and_right",
    "algorithm.name": "my_algorithms:Reinforce",
}
TRANSPORT = "placement.transport=my_transport:OneByOne"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files, where Python finds them, and a model of the page's family."""
    examples = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == len(OWN) + 1
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
    vocab_size = write_character_tokenizer(path, "0123456789=")
    write_config(path, "llama", vocab_size=vocab_size, **shape)
    registry.load_model_config(path, OWN["model_family"])
    write_weights(path, seed=3, std=0.2)


def command(folder, run_name, *words):
    """A run of two steps of twelve samples."""
    return [
        "grpo",
        *(f"{key}={name}" for key, name in OWN.items()),
        f"model.path={folder / 'twin'}",
        f"output_dir={folder}",
        f"run_name={run_name}",
        "device=cpu",
        "logger=disabled",
        "data.args.below=50",
        "data.eval_size=4",
        "reward.args.limit=3",
        "reward.num_workers=1",
        "algorithm.entropy_coef=0.01",
        "rollout.prompts_per_step=3",
        "rollout.samples_per_prompt=4",
        "rollout.max_prompt_len=8",
        "rollout.max_new_tokens=4",
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
    """By the command line alone; resumed, and with the engine in a process of its own, alike."""
    process = start(folder, command(folder, "whole", TRANSPORT))
    assert main(command(folder, "parts", TRANSPORT, "trainer.num_steps=1")) == 0
    assert main(command(folder, "parts", TRANSPORT, "resume=true")) == 0
    assert main(command(folder, "process", "placement=process")) == 0
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    whole = result(folder, "whole")
    assert result(folder, "parts") == result(folder, "process") == whole

    summary, rows, samples = whole
    assert (summary["logprob_mismatches"], len(rows)) == (0, 3)
    assert 12 <= summary["logprob_tokens_compared"] <= 2 * 12 * 4
    assert rows[1].keys() >= {"rollout/reward_mean", "train/loss", "train/entropy"}
    assert "train/ratio" not in rows[1].keys()
    for x in samples:
        assert x["label"] == str(int(x["prompt"].removesuffix("=")) + 1)
        right = x["completion"].strip() == x["label"] and len(x["completion"]) <= 3
        assert x["reward"] == right
    manifests = [latest_checkpoint(folder / run / "checkpoints").manifest for run in ("whole", "parts")]
    assert manifests[0]["config"].items() >= OWN.items()
    assert manifests[0]["weights_digest"] if "weights_digest" in manifests[0] else True
