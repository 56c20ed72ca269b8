"""Small runs whose every result is kept: what equal inputs must give for ever, to the bit.

Results are plain JSON. Floats are written by float.hex; what cannot be compared but to the bit is a
text that begins with "digest ".
"""

import hashlib
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from helpers import edit_tensors

from samebit.recipes import grpo, sft
from samebit.recipes.cli.compose import resolve
from samebit.recipes.models.tiny_model import make_demo_model, make_random_model
from samebit.recipes.run.metrics import read_rows, without_times
from samebit.recipes.run.rollouts import list_rollouts, load_rollout
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.types import SamplingParams
from samebit.trainer.algorithms.grpo import group_advantages
from samebit.trainer.checkpoint import list_checkpoints
from samebit.weight_sync.digest import weights_digest

# Where worker processes find the reward, which is named as a module.
sys.path.append(str(Path(__file__).parents[1]))

MAX_64 = (1 << 64) - 1
SAMPLING = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "one token": {"top_k": 1, "temperature": 2.0},
    "all limits": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.7},
    "stop tokens": {"stop_token_ids": range(0, 331, 5)},
    "no stop at first": {"min_new_tokens": 4, "stop_token_ids": range(0, 331, 2)},
    "limits and no stop at first": {
        "min_new_tokens": 5, "stop_token_ids": range(1, 331, 2), "top_p": 0.8, "temperature": 1.3,
    },
    "greedy and no stop at first": {
        "min_new_tokens": 3, "stop_token_ids": range(0, 331, 2), "temperature": 0,
    },
    "without end": {"ignore_eos": True, "temperature": 1.5},
    "seed": {"seed": MAX_64},
    "another seed": {"seed": (5 << 32) + 1},
}  # fmt: skip
"""Sampling parameters by what is tried."""
IDS = [[3, (7 << 32) + 3], [MAX_64, 1 << 63]]
"""Sample ids of two prompts: their low and their high halves matter."""


def run(folder: Path, device: str) -> dict:
    """Every result by run, on models made in `folder`."""
    qwen3, llama, demo = folder / "qwen3", folder / "llama", folder / "demo"
    make_random_model(qwen3, "qwen3", seed=1, tied=False)
    make_random_model(llama, "llama", seed=2, tied=True)
    make_demo_model(demo, seed=3)
    for seed, path in enumerate((qwen3, llama, demo)):
        edit_tensors(path, partial(_fill, 2**-10 if path == demo else 2**-7, seed))
    return {
        "engine": {path.name: _engine(path, device) for path in (qwen3, llama)},
        "sampling": _sampling(llama, device),
        "grpo": _grpo(folder, demo, device),
        "sft": _sft(folder, demo, device),
    }


def _fill(unit: float, seed: int, tensors: dict[str, torch.Tensor]) -> None:
    """Small multiples of `unit`, norms about 1: the same on every machine, as randn is not."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        whole = torch.randint(-64, 65, tensor.shape, generator=generator)
        tensor.copy_(1 + whole / 256 if name.endswith("norm.weight") else whole * unit)


def prompts_of(*lens: int) -> list[list[int]]:
    """Prompts of these lengths."""
    return [[(7 * i * i + 31 * n + 3) % 331 for i in range(n)] for n in lens]


def _engine(path: Path, device: str) -> dict:
    engine = Engine(path, device=device, seed=11, page_size=16, kv_cache_tokens=2048)
    prompts = prompts_of(1, 5, 17, 66)
    greedy = SamplingParams(temperature=0, max_new_tokens=6)
    plain = SamplingParams(max_new_tokens=8)
    group = SamplingParams(n=3, max_new_tokens=6)
    layers = (0, 2, 3)
    [[seen]] = engine.generate(prompts[2:3], plain, return_hidden_states=layers)
    return {
        "weights": engine.weight_version.digest,
        "greedy": _completions(engine.generate(prompts, greedy)),
        "plain": _completions(engine.generate(prompts, plain)),
        "group": _completions(engine.generate(prompts[1:3], group)),
        "score": _hex(engine.score(prompts[1:])),
        "score at 0.7": _hex(engine.score(prompts[1:], 0.7)),
        "hidden states": {str(i): summary(seen.hidden_states[i]) for i in layers},
    }


def _sampling(path: Path, device: str) -> dict:
    engine = Engine(path, device=device, seed=(1 << 63) + 5, kv_cache_tokens=4096)
    prompts = prompts_of(4, 9)
    return {
        name: _completions(
            engine.generate(prompts, SamplingParams(n=2, max_new_tokens=7, **params), IDS)
        )
        for name, params in SAMPLING.items()
    }


def _grpo(folder: Path, model: Path, device: str) -> dict:
    """Two steps of two updates each, and the same run resumed after the first."""
    arguments = [
        *_arguments(folder, model, device, "grpo"),
        "data.args.length=2",
        "data.size=20",
        "data.eval_size=3",
        "reward.name=golden.reward:score",
        "reward.num_workers=1",
        "algorithm=grpo_kl",
        "algorithm.kl_coef=0.1",
        "rollout.prompts_per_step=3",
        "rollout.samples_per_prompt=4",
        "rollout.max_prompt_len=8",
        "rollout.max_new_tokens=6",
        "rollout.temperature=0.8",
        "rollout.top_k=9",
        "rollout.top_p=0.95",
        "rollout.min_p=0.01",
        "logger.save_rollouts=true",
        "trainer.batch_size=6",
        "trainer.optimizer.lr_schedule=linear",
    ]
    run, found = _run_and_resume(grpo, arguments, model)
    groups = run.rollout.samples_per_prompt
    for step, file in list_rollouts(run.run_dir).items():
        samples = load_rollout(file)
        rewards = torch.tensor([s.reward for s in samples]).view(-1, groups)
        found[f"rollout {step}"] = {
            "samples": [_sample(s) for s in samples],
            "advantages": _hex(group_advantages(rewards, run.algorithm).tolist()),
        }
    return found


def _sft(folder: Path, model: Path, device: str) -> dict:
    """Two steps, and the same run resumed after the first."""
    arguments = [
        *_arguments(folder, model, device, "sft"),
        "data.args.length=3",
        "data.size=12",
        "data.eval_size=2",
        "trainer.batch_size=8",
        "trainer.loss_mean=sequence",
        "trainer.optimizer.lr_schedule=cosine",
        "trainer.optimizer.weight_decay=0.1",
    ]
    return _run_and_resume(sft, arguments, model)[1]


def _run_and_resume(recipe: ModuleType, arguments: list[str], model: Path) -> tuple[Any, dict]:
    """The run, and what two steps of it gave; its second step also resumed from the first."""
    command = recipe.__name__.rpartition(".")[2]
    run = resolve(command, arguments)
    whole = recipe.train(run)
    found = _trained(run.run_dir, model)
    shutil.rmtree(run.run_dir / "checkpoints" / "step_00000002")
    resumed = recipe.train(resolve(command, [*arguments, "resume=true"]))
    return run, found | {"summary": _hex(whole), "resumed": _hex(resumed)}


def _arguments(folder: Path, model: Path, device: str, name: str) -> list[str]:
    """What both recipes are given."""
    return [
        f"model.path={model}",
        f"output_dir={folder}",
        f"run_name=run_{name}",
        f"device={device}",
        "seed=7",
        "cpu_threads=1",
        "logger=disabled",
        "data=reverse_digits",
        "trainer.num_steps=2",
        "trainer.checkpoint_every=1",
        "trainer.micro_batch_tokens=32",
        "trainer.optimizer.lr=1e-3",
        "trainer.optimizer.min_lr=1e-4",
        "trainer.optimizer.clip_grad=0.5",
    ]


def _trained(run_dir: Path, model: Path) -> dict:
    """Metrics of every step; weights and what the optimizer remembers of gradients after it."""
    specs = load_model_config(model).param_specs()
    states = {}
    for checkpoint in list_checkpoints(run_dir / "checkpoints"):
        state = checkpoint.load()
        optimizer = state["optimizer"]
        states[str(checkpoint.step)] = {
            "weights": f"digest {weights_digest(specs, state['params'])}",
            "weight sums": {name: summary(p)["sum"] for name, p in state["params"].items()},
            "first moments": {name: summary(x["exp_avg"]) for name, x in optimizer.items()},
            "second moments": [summary(x["exp_avg_sq"])["bits"] for x in optimizer.values()],
            "masters": [summary(x["master"])["bits"] for x in optimizer.values() if "master" in x],
        }
    return {
        "metrics": _hex(without_times(read_rows(run_dir / "metrics.jsonl"))),
        "checkpoints": states,
    }


def summary(x: torch.Tensor) -> dict:
    """Of a tensor: all its bits as a digest, and two sums that another machine may compare with."""
    x = x.detach().cpu().contiguous()
    wide = x.double().flatten()
    ramp = torch.linspace(1, 2, len(wide), dtype=torch.float64)
    data = x.view(torch.uint8).numpy().tobytes()
    return {
        "bits": f"digest {hashlib.sha256(data).hexdigest()[:16]}",
        "sum": _hex(float(wide.sum())),
        "ramp": _hex(float((wide * ramp).sum())),
    }


def _completions(groups: list) -> list:
    return [
        {
            "id": c.sample_id,
            "tokens": list(c.token_ids),
            "logprobs": _hex(list(c.logprobs)),
            "end": c.finish_reason,
        }
        for group in groups
        for c in group
    ]


def _sample(sample) -> dict:
    return {
        "id": sample.sample_id,
        "prompt": sample.prompt_ids.tolist(),
        "tokens": sample.token_ids.tolist(),
        "logprobs": _hex(sample.logprobs.tolist()),
        "reward": _hex(sample.reward),
    }


def _hex(value):
    """The same with every float as its hexadecimal text, and digests marked as such."""
    match value:
        case float():
            return value.hex()
        case list() | tuple():
            return [_hex(each) for each in value]
        case dict():
            return {
                key: f"digest {each}" if key == "weights_digest" else _hex(each)
                for key, each in value.items()
            }
    return value
