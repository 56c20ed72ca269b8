"""Every preset of configs/algorithm learns the demo's task by its recipe, within five minutes, and
so do truncated sampling and dpo: a small model reverses six digits."""

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

pytestmark = [
    pytest.mark.long,
    pytest.mark.algorithms,
    pytest.mark.timeout(300, func_only=True),
]

PRESETS = sorted(file.stem for file in (CONFIG_DIR / "algorithm").glob("*.yaml"))
ENOUGH = 0.8
HERE = ["device=cpu", "logger=disabled"]
OF_THEIR_OWN = ("ppo", "distillation")
"""Presets with a recipe; the others are given to reverse_digits."""


def taught(folder, num_steps):
    """A model after so many steps of supervised training."""
    make_demo_model(folder / "model", seed=0)
    words = [f"model.path={folder / 'model'}", f"output_dir={folder}", "run_name=sft", *HERE]
    words += ["data=reverse_digits", f"trainer.num_steps={num_steps}", "trainer.batch_size=128"]
    words += ["trainer.micro_batch_tokens=4096", "data.eval_size=0", "trainer.optimizer.lr=2e-3"]
    sft.train(resolve("sft", words))
    return folder / "sft" / "model"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model that is right now and then: what its sampling finds can be learnt from."""
    return taught(tmp_path_factory.mktemp("begun"), 90)


@pytest.fixture(scope="module")
def hesitant(tmp_path_factory):
    """One that is no better by its most likely tokens alone."""
    return taught(tmp_path_factory.mktemp("hesitant"), 80)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """One that is right nearly always."""
    return taught(tmp_path_factory.mktemp("teacher"), 300)


@pytest.fixture
def own(preset, request):
    """What a preset needs besides its recipe; all but distillation take two optimizer steps a
    rollout, the second off-policy."""
    if preset == "distillation":
        return [f"distillation.teacher={request.getfixturevalue('teacher')}"]
    return ["trainer.batch_size=128"]


@pytest.mark.parametrize("preset", PRESETS)
def test_it_learns(begun, own, tmp_path, preset):
    """From some of the held-out problems to most of them; every log-prob of the first optimizer
    step of a rollout is the rollout's."""
    learn(begun, tmp_path, preset, *own)


@pytest.mark.parametrize("preset", ["grpo", "grpo_kl"])
def test_it_learns_by_truncated_sampling(hesitant, own, tmp_path, preset):
    """The policy that is trained, and evaluated, is the one that draws."""
    learn(hesitant, tmp_path, preset, "rollout.top_p=0.9", "rollout.logprobs=truncated", *own)


@pytest.mark.parametrize("preset", ["distillation"])
def test_it_learns_what_the_teacher_finds_likeliest(begun, own, tmp_path, preset):
    """The KL over three tokens and the rest, in place of what the drawn ones estimate."""
    learn(begun, tmp_path, preset, "algorithm.loss_top_k=3", *own)


def learn(model, folder, preset, *more):
    """Train it by its recipe, and require that it has learnt."""
    recipe = f"reverse_digits_{preset}" if preset in OF_THEIR_OWN else "reverse_digits"
    words = [f"experiment={recipe}", f"algorithm={preset}", f"model.path={model}", *HERE]
    words += [f"output_dir={folder}", "data.seed=1", "rollout.eval_every=1000"]
    words += ["trainer.checkpoint_every=0", *more]
    start = time.perf_counter()
    summary = grpo.train(resolve("grpo", words))
    seconds = time.perf_counter() - start
    first, last = summary["reward_first"], summary["reward_last"]
    name = " ".join([preset, *(word for word in more if "/" not in word)])
    print(f"\n{name}: held-out reward {first:.3f} -> {last:.3f} in {seconds:.0f} s")
    assert first < 0.6
    assert last >= ENOUGH
    assert summary["logprob_tokens_compared"] > 100_000
    assert summary["logprob_mismatches"] == 0


def test_dpo_learns(begun, tmp_path):
    """From pairs alone, whose worse answers are the model's own wrong ones: problems that are in no
    pair, drawn at temperature 1 before and after."""
    numbers = random.Random(5).sample(range(10**6), 8256)
    digits = [f"{i:06d}" for i in numbers]
    pairs = []
    for each, drawn in zip(digits[:-256], answers(begun, digits)[:-256], strict=True):
        if wrong := [answer for answer in drawn if answer and answer != each[::-1]]:
            pairs.append({"prompt": f"{each}=", "chosen": each[::-1], "rejected": wrong[0]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    words = [f"model.path={begun}", f"output_dir={tmp_path}", *HERE]
    words += [f"data.path={tmp_path / 'pairs.jsonl'}", "algorithm.beta=1.0"]
    words += ["trainer.num_steps=700", "trainer.batch_size=64", "trainer.micro_batch_tokens=4096"]
    words += ["trainer.checkpoint_every=0", "trainer.optimizer.lr=3e-4"]
    start = time.perf_counter()
    dpo.train(resolve("dpo", words))
    seconds = time.perf_counter() - start
    first, last = (solved(model, digits[-256:]) for model in (begun, tmp_path / "run" / "model"))
    print(f"\ndpo: right answers {first:.3f} -> {last:.3f} in {seconds:.0f} s")
    assert first < 0.6
    assert last >= ENOUGH


def answers(model, digits):
    """Four answers to each problem."""
    codec, engine = TextCodec(model), Engine(model, device="cpu")
    prompts = [f"{each}=" for each in digits]
    params = SamplingParams(n=4, max_new_tokens=8)
    groups = engine.generate(codec.encode_prompts(prompts, prompts), params)
    return [[codec.decode(completion) for completion in group] for group in groups]


def solved(model, digits):
    """The share of answers that are right."""
    drawn = zip(digits, answers(model, digits), strict=True)
    return sum(x == each[::-1] for each, group in drawn for x in group) / (4 * len(digits))
