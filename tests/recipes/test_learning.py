"""Every preset of configs/algorithm learns: a small model reverses four digits."""

import time

import pytest

from samebit.recipes import grpo, sft
from samebit.recipes.cli.compose import CONFIG_DIR, resolve
from samebit.recipes.models.tiny_model import make_demo_model

pytestmark = [pytest.mark.long, pytest.mark.algorithms]

PRESETS = sorted(file.stem for file in (CONFIG_DIR / "algorithm").glob("*.yaml"))
ENOUGH = 0.8
TASK = ["device=cpu", "logger=disabled", "data=reverse_digits", "data.args.length=4"]
OPTIMIZER = {"lr": 6e-4, "lr_warmup_steps": 10, "lr_schedule": "linear", "min_lr": 1e-4}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model that is right now and then: what its sampling finds can be learnt from."""
    folder = tmp_path_factory.mktemp("begun")
    make_demo_model(folder / "model", seed=0)
    words = [f"model.path={folder / 'model'}", f"output_dir={folder}", "run_name=sft", *TASK]
    words += ["trainer.num_steps=50", "trainer.batch_size=128", "trainer.micro_batch_tokens=4096"]
    sft.train(resolve("sft", [*words, "data.eval_size=0", "trainer.optimizer.lr=2e-3"]))
    return folder / "sft" / "model"


@pytest.mark.parametrize("preset", PRESETS)
def test_it_learns(begun, tmp_path, preset):
    """From half of the held-out problems to most of them, with two optimizer steps a
    rollout, of which the second is off-policy; every log-prob of the first is the rollout's."""
    words = [f"model.path={begun}", f"output_dir={tmp_path}", f"algorithm={preset}", *TASK]
    words += ["data.seed=1", "rollout.max_prompt_len=16", "rollout.max_new_tokens=8"]
    words += ["rollout.eval_every=1000", "trainer.num_steps=100", "trainer.batch_size=128"]
    words += ["trainer.micro_batch_tokens=4096", "trainer.checkpoint_every=0"]
    words += [f"trainer.optimizer.{key}={value}" for key, value in OPTIMIZER.items()]
    start = time.perf_counter()
    summary = grpo.train(resolve("grpo", words))
    seconds = time.perf_counter() - start
    first, last = summary["reward_first"], summary["reward_last"]
    print(f"\n{preset}: held-out reward {first:.3f} -> {last:.3f} in {seconds:.0f} s")
    assert first < 0.6
    assert last >= ENOUGH
    assert summary["logprob_mismatches"] == 0
