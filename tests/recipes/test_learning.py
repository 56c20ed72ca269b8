"""Every preset of configs/algorithm learns, and so does dpo: a small model reverses four digits."""

import json
import random
import time

import pytest

from samebit.recipes import dpo, grpo, sft
from samebit.recipes.cli.compose import CONFIG_DIR, resolve
from samebit.recipes.data.text import TextCodec
from samebit.recipes.models.tiny_model import make_demo_model
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

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


TRUNCATED = ["rollout.top_p=0.9", "rollout.logprobs=truncated"]


@pytest.mark.parametrize(
    ("preset", "more"), [*((preset, []) for preset in PRESETS), ("grpo_kl", TRUNCATED)]
)
def test_it_learns(begun, tmp_path, preset, more):
    """From half of the held-out problems to most of them, with two optimizer steps a
    rollout, of which the second is off-policy; every log-prob of the first is the rollout's."""
    words = [f"model.path={begun}", f"output_dir={tmp_path}", f"algorithm={preset}", *TASK]
    words += ["data.seed=1", "rollout.max_prompt_len=16", "rollout.max_new_tokens=8"]
    words += ["rollout.eval_every=1000", "trainer.num_steps=100", "trainer.batch_size=128"]
    words += ["trainer.micro_batch_tokens=4096", "trainer.checkpoint_every=0"]
    words += [f"trainer.optimizer.{key}={value}" for key, value in OPTIMIZER.items()] + more
    start = time.perf_counter()
    summary = grpo.train(resolve("grpo", words))
    seconds = time.perf_counter() - start
    first, last = summary["reward_first"], summary["reward_last"]
    name = " ".join([preset, *more])
    print(f"\n{name}: held-out reward {first:.3f} -> {last:.3f} in {seconds:.0f} s")
    assert first < 0.6
    assert last >= ENOUGH
    assert summary["logprob_mismatches"] == 0


def test_dpo_learns(begun, tmp_path):
    """From pairs alone, whose worse answers differ in a digit: held-out problems, drawn at
    temperature 0 before and after."""
    rng = random.Random(5)

    def pair():
        digits = f"{rng.randrange(10**4):04d}"
        right = digits[::-1]
        place = rng.randrange(4)
        wrong = rng.choice([d for d in "0123456789" if d != right[place]])
        rejected = right[:place] + wrong + right[place + 1 :]
        return {"prompt": f"{digits}=", "chosen": right, "rejected": rejected}

    pairs = [pair() for _ in range(8448)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    words = [f"model.path={begun}", f"output_dir={tmp_path}", "device=cpu", "logger=disabled"]
    words += [f"data.path={tmp_path / 'pairs.jsonl'}", "data.eval_size=256", "eval_every=1000"]
    words += ["trainer.num_steps=100", "trainer.batch_size=64", "trainer.micro_batch_tokens=4096"]
    words += ["trainer.checkpoint_every=0", "algorithm.beta=0.1"]
    words += [f"trainer.optimizer.{key}={value}" for key, value in OPTIMIZER.items()]
    start = time.perf_counter()
    summary = dpo.train(resolve("dpo", words))
    seconds = time.perf_counter() - start
    first, last = (solved(model, pairs[-256:]) for model in (begun, tmp_path / "run" / "model"))
    print(f"\ndpo: held-out problems solved {first:.3f} -> {last:.3f} in {seconds:.0f} s")
    assert first < last
    assert last >= ENOUGH
    assert summary["eval_accuracy"] >= ENOUGH


def solved(model, pairs):
    """The share of problems whose most likely answer is the right one."""
    codec, engine = TextCodec(model), Engine(model, device="cpu")
    prompts = [pair["prompt"] for pair in pairs]
    groups = engine.generate(
        codec.encode_prompts(prompts, prompts), SamplingParams(temperature=0.0, max_new_tokens=8)
    )
    answers = [codec.decode(completion) for [completion] in groups]
    return sum(a == p["chosen"] for a, p in zip(answers, pairs, strict=True)) / len(pairs)
