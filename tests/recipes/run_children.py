"""What test runs import by name, here and in children: a reward, an entry point, and moments.

It imports nothing that needs torch, so that a reward's process starts in no time.
"""

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

calls: list[str] = []
later_calls: list[int] = []


class Runs:
    """Runs of a command on a model and the smallest task, under one folder."""

    words: tuple[str, ...]
    """What the command is told besides."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder

    def arguments(self, run_name, *overrides):
        return [
            f"model.path={self.model}",
            f"output_dir={self.folder}",
            f"run_name={run_name}",
            "device=cpu",
            "logger=disabled",
            "data=reverse_digits",
            "data.args.length=2",
            *self.words,
            *overrides,
        ]


def score_digits(text, problem, *, control):
    """Even digits are worth most, so a random model gets rewards of many sizes.

    If the file `control` holds "hold 7" or "fail 7", the 7th call in this process, the one worker
    of a run, blocks for ever after making the file <control>.held, or raises.
    """
    calls.append(text)
    file = Path(control)
    if file.exists():
        action, number = file.read_text().split()
        if len(calls) == int(number):
            if action == "fail":
                raise KeyError("no such unit")
            file.with_suffix(".held").touch()
            while True:
                signal.pause()
    right = sum(a == b for a, b in zip(text, problem.label, strict=False))
    return right + 0.5 * sum(c in "02468" for c in text) - 0.1 * len(text)


async def score_later(texts, problems, *, seed):
    """As score_digits, of several and later: calls end in an order that the seed draws.

    The ninth call in this process fails if the file that SCORE_LATER_FAILS names is there.
    """
    later_calls.append(seed)
    if len(later_calls) == 9 and Path(os.environ.get("SCORE_LATER_FAILS", "/no")).exists():
        raise KeyError("no such unit")
    for _ in range(hash((seed, len(later_calls))) % 50):
        await asyncio.sleep(0)
    pairs = zip(texts, problems, strict=True)
    return [score_digits(text, problem, control="/no") for text, problem in pairs]


generated: list[int] = []
ended: list[int] = []
"""Samples that two_turns has drawn, as they end."""


async def two_turns(engine, request, sampling_params, *, seed=0, control="/no"):
    """Two tokens, the first one of the label, up to three tokens; later, as the seed says.

    If the file `control` holds "hold 7", the 7th sample of this process waits for ever after making
    the file <control>.held.
    """
    from samebit.recipes.data.conversation import Conversation

    generated.append(request.sample_id)
    file, number = Path(control), len(generated)
    talk = Conversation(request)
    await talk.draw(engine, replace(sampling_params, max_new_tokens=2))
    if file.exists() and file.read_text() == f"hold {number}":
        file.with_suffix(".held").touch()
        await asyncio.Event().wait()
    for _ in range(hash((seed, number)) % 60 if seed else 0):
        await asyncio.sleep(0)
    talk.add(request.text.encode(request.problem.label[:1]))
    await talk.draw(engine, replace(sampling_params, max_new_tokens=3))
    ended.append(request.sample_id)
    return talk.sample()


async def dies(engine, request, sampling_params, *, deaths):
    """One turn. Rank 1, or a run's only process, kills itself at the sample of its life that the
    file `deaths` names first, and strikes it out."""
    from samebit.recipes.data.conversation import Conversation

    generated.append(request.sample_id)
    numbers = Path(deaths).read_text().split()
    if os.environ.get("RANK", "1") == "1" and numbers[:1] == [str(len(generated))]:
        Path(deaths).write_text(" ".join(numbers[1:]))
        os.kill(os.getpid(), signal.SIGKILL)
    talk = Conversation(request)
    await talk.draw(engine, sampling_params)
    return talk.sample()


def score_some(text, problem, *, control, every):
    """As score_digits for one problem in `every`; all the others have the same reward always."""
    found = score_digits(text, problem, control=control)
    return found if problem.index % every == 0 else 0.25


async def score_some_later(text, problem, *, every, seed):
    """As score_some, later: calls end in an order that the seed draws."""
    later_calls.append(seed)
    for _ in range(hash((seed, len(later_calls))) % 50):
        await asyncio.sleep(0)
    return score_some(text, problem, control="/no", every=every)


def score_pairs(text, problem):
    """Another number for about every pair of a text and a label, times the problem's level."""
    label, level = problem.label, problem.metadata["level"]
    return level * sum(ord(c) * ord(label[i % len(label)]) % 11 for i, c in enumerate(text)) / 7


def open_run(run):
    """open_session with the records that a run of grpo reads."""
    from samebit.recipes.data.tasks.registry import load_datasets
    from samebit.recipes.run.session import open_session

    train_set, held_out = load_datasets(run.data)
    return open_session(run, {"training records": train_set, "held-out records": held_out})


def roll_out(recipe, step):
    """The rollout of a step of grpo, scored."""
    rollout = recipe.rollout_source.draw(recipe.rollout_source.training_prompts(step))
    recipe.rollout_source.score(rollout)
    return rollout


def update(recipe, rollout):
    """The optimizer steps of grpo on a rollout: their figures."""
    from samebit.recipes.run.training_metrics import PhaseTimer

    return recipe.update(rollout, PhaseTimer())


def has_lines(file, count):
    """A condition: so many rows of a .jsonl file are written."""
    return lambda: file.exists() and file.read_bytes().count(b"\n") >= count


def has_begun_to_save(checkpoints, step):
    """A condition: a checkpoint of this step, or of a later one, is there or being written."""

    def holds():
        names = [path.name.strip(".") for path in checkpoints.glob("*step_*")]
        return any(int(name.split(".")[0].removeprefix("step_")) >= step for name in names)

    return holds


def run_cli_and_hang(arguments):
    """`samebit`, whose first optimizer step blocks for ever after making output_dir/hangs."""
    from samebit.trainer.megatron.trainer import MegatronTrainer

    folder = next(a for a in arguments if a.startswith("output_dir=")).removeprefix("output_dir=")

    def hang(*_):
        (Path(folder) / "hangs").touch()
        while True:
            signal.pause()

    MegatronTrainer.train_step = hang
    run_cli(arguments)


def run_cli(arguments):
    """`samebit` as a child process."""
    from samebit.recipes.cli.main import main

    sys.exit(main(arguments))


def run_cli_without_gpus(*arguments):
    """`samebit` where there is none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    run_cli(arguments)


def engine_here(run, config, device, cluster):
    """In place of _start_apart: an engine of this process, which another thread calls, too."""
    from samebit.kernels.reduce import RankGroup
    from samebit.rollout.engine import Engine

    assert run.placement.num_engine_processes == 1
    ranks = RankGroup(invariant=run.numerics.tp_invariant)
    return Engine(run.model.path, config, device=device, ranks=ranks)


def reward_here(config, poll):
    """In place of load_reward: a reward that runs in this process."""
    from samebit.recipes.data.rewards import bind_reward

    return bind_reward(config.name, dict(config.args))


def in_one_process(set_attribute):
    """Have runs with placement=process start no process; by `setattr`, or a monkeypatch's."""
    from samebit.recipes.launch import placement
    from samebit.recipes.run import inputs

    set_attribute(placement, "_start_apart", engine_here)
    set_attribute(inputs, "load_reward", reward_here)


def run_cli_in_one_process(arguments):
    """`samebit` with placement=process, which starts none."""
    in_one_process(setattr)
    run_cli(arguments)


def run_cli_as_rank(rank, size, port, secret, *arguments):
    """`samebit` as one of the processes that a launcher has started."""
    be_rank(rank, size, port, secret)
    run_cli(arguments)


def be_rank(rank, size, port, secret):
    """What a launcher tells a process."""
    from samebit.trainer.megatron.setup import DETERMINISTIC
    from samebit.weight_sync.meeting import SECRET

    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = rank
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = size
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, SECRET: secret}
    os.environ |= DETERMINISTIC | {"TORCHELASTIC_USE_AGENT_STORE": "True"}


def fussy(text, problem):
    """Scores 1; wants labels of two digits."""
    return 1.0


def _check(problem):
    if len(problem.label) != 2:
        raise ValueError("2 digits, please")


fussy.check_problem = _check


def vague(text, problem):
    """Scores 1; says what it wants in the wrong way."""
    return 1.0


vague.check_problem = lambda problem: "2 digits, please"
