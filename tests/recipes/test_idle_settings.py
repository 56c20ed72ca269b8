"""A setting that nothing would read is an error; its default, given or not, never is."""

from functools import partial

import pytest

from samebit.recipes.bench.config import TABLES, BenchEngineRun, BenchKernelsRun
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError, GrpoRun, ModelSection, SftRun
from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.tasks.base import DataConfig
from samebit.recipes.demo_config import DemoRun
from samebit.recipes.run.metrics import LoggerConfig
from samebit.recipes.tools_config import DiffRun, ExportRun, FetchRun, VerifyRun
from samebit.rollout.config import EngineConfig
from samebit.trainer.config import GrpoConfig, OptimizerConfig, TrainerConfig

FILE = partial(DataConfig, path="x.jsonl")
DIGITS = partial(DataConfig, task="reverse_digits")
ENGINE = partial(BenchEngineRun, model="m")
KERNELS = partial(BenchKernelsRun, model="m")
DECAY = OptimizerConfig(lr_schedule="cosine", lr_warmup_steps=5)


def sft(data=None, logger=None, optimizer=None, **settings):
    run = SftRun(
        model=ModelSection(path="m"),
        data=data or DataConfig(eval_size=0),
        logger=logger or LoggerConfig(),
        trainer=TrainerConfig(batch_size=4, num_steps=5, optimizer=optimizer or OptimizerConfig()),
        **settings,
    )
    run.validate()
    return run


def grpo(optimizer, **settings):
    trainer = TrainerConfig(batch_size=64, num_steps=1, optimizer=optimizer)
    run = GrpoRun(model=ModelSection(path="m"), trainer=trainer, **settings)
    run.validate()
    return run


IDLE = {
    "trainer.optimizer.min_lr is 1e-07": lambda: OptimizerConfig(min_lr=1e-7),
    "algorithm.kl_estimator is 'k1'": lambda: GrpoConfig(kl_estimator="k1"),
    "algorithm.std_eps is 0.5": lambda: GrpoConfig(normalize_std=False, std_eps=0.5),
    "logger.project is 'mine'": lambda: LoggerConfig(wandb="disabled", project="mine"),
    "data.size is 7": lambda: FILE(size=7),
    "data.seed is 7": lambda: FILE(seed=7),
    "data.prompt_key is 'q'": lambda: DIGITS(prompt_key="q"),
    "data.label_key is 'a'": lambda: DIGITS(label_key="a"),
    "data.metadata_keys is ['m']": lambda: DIGITS(metadata_keys=["m"]),
    "reward.timeout_s is 5.0": lambda: RewardConfig(timeout_s=5.0),
    "reward.num_workers is 2": lambda: RewardConfig(name="number_match", num_workers=2),
    "eval_every is 5": lambda: sft(eval_every=5),
    "logger.save_rollouts is True": lambda: sft(logger=LoggerConfig(save_rollouts=True)),
    "logger.num_samples is 9": lambda: sft(logger=LoggerConfig(num_samples=9)),
    "overwrite is True": lambda: sft(resume=True, overwrite=True),
    "trainer.optimizer.lr_warmup_steps is 5": lambda: sft(optimizer=DECAY),
    "lr_warmup_steps is 5; it must be below 4": lambda: grpo(DECAY),
    "load_format is 'dummy'": lambda: VerifyRun(load_format="dummy"),
    "load_format is 'bogus'": lambda: VerifyRun(load_format="bogus", model="m"),
    "load_format is 'bog'": lambda: ENGINE(load_format="bog"),
    "seed is 7": lambda: VerifyRun(seed=7, model="m"),
    "cpu_threads is 0": lambda: ENGINE(cpu_threads=0),
    "profile_steps is 8": lambda: ENGINE(profile_steps=8),
    "engine.overlap is True": lambda: ENGINE(
        variants=["no_overlap"], engine=EngineConfig(overlap=True)
    ),
    "engine.cuda_graphs is True": lambda: ENGINE(
        variants=["no_graphs"], engine=EngineConfig(cuda_graphs=True)
    ),
    "engine.group_attention is False": lambda: ENGINE(
        variants=["no_groups"], engine=EngineConfig(group_attention=False)
    ),
    "engine.seed is 7": lambda: ENGINE(engine=EngineConfig(seed=7)),
    "engine.load_format is 'dummy'": lambda: ENGINE(engine=EngineConfig(load_format="dummy")),
    "engine.max_model_len is 8": lambda: grpo(DECAY, engine=EngineConfig(max_model_len=8)),
    "variants is ['default', 'default']": lambda: ENGINE(variants=["default", "default"]),
    "tables is ['rows']": lambda: KERNELS(tune=True, tables=["rows"]),
    "replays is 3": lambda: KERNELS(tune=True, replays=3),
    "seed is 3": lambda: KERNELS(tune=True, seed=3),
    "rows is [4]": lambda: KERNELS(tables=["prefill"], rows=[4]),
    "limit is 3": lambda: DiffRun(a="a", b="b", limit=3),
    "model is ''": lambda: VerifyRun(model=""),
    "out is ''": lambda: FetchRun(out=""),
    "checkpoint is ''": lambda: ExportRun(checkpoint="", model="m", out="o"),
    "grpo.model.path is 'm'; it must be left alone": lambda: DemoRun(
        sft=None, grpo=GrpoRun(model=ModelSection(path="m"))
    ).validate(),
}


@pytest.mark.parametrize("message", IDLE)
def test_a_setting_that_nothing_reads_is_refused(message):
    """The message names the key, its value and why it does nothing."""
    with pytest.raises(ValueError, match="is") as caught:
        IDLE[message]()
    assert message in str(caught.value)
    assert "; it must be " in str(caught.value)


def test_what_is_read_is_taken():
    """The same settings where they do something, and defaults everywhere."""
    OptimizerConfig(lr=1.0, min_lr=0.5, lr_schedule="linear")
    GrpoConfig(kl_coef=0.1, kl_estimator="k1", std_eps=0.5)
    GrpoConfig(kl_estimator="k3", normalize_std=False, std_eps=1e-6)
    LoggerConfig(wandb="offline", project="mine")
    LoggerConfig(wandb="disabled", project="samebit")
    FILE(prompt_key="q", label_key="a", metadata_keys=["m"], size=100_000, seed=0)
    RewardConfig(name="math_verify", timeout_s=5.0, num_workers=2)
    RewardConfig(name="exact_match", timeout_s=60.0, num_workers=None)
    DIGITS(size=7, seed=7, prompt_key="prompt", metadata_keys=[])
    VerifyRun(seed=7)
    VerifyRun(load_format="dummy", model="m", seed=0)
    ENGINE(profile=True, profile_steps=8)
    ENGINE(variants=["default", "no_graphs"], engine=EngineConfig(cuda_graphs=True))
    KERNELS(tune=True, rows=[4], tables=list(TABLES))
    sft(optimizer=OptimizerConfig(lr_schedule="cosine", lr_warmup_steps=4))
    sft(optimizer=OptimizerConfig(lr_warmup_steps=50))
    sft(FILE(eval_size=100), eval_every=5)
    sft(FILE(eval_size=0, eval_path="y.jsonl"), eval_every=5)
    grpo(OptimizerConfig(lr_schedule="cosine", lr_warmup_steps=3), resume=True)


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (
            "sft",
            ["model.path=m", "trainer.batch_size=4", "data.path=x.jsonl", "eval_every=5"],
            "eval_every is 5; it must be 20, its default: nothing reads it where no record is held",
        ),
        (
            "grpo",
            ["model.path=m", "trainer.optimizer.min_lr=1e-7"],
            "trainer.optimizer.min_lr is 1e-07; it must be 0.0, its default: nothing reads it "
            "where trainer.optimizer.lr_schedule is 'constant'",
        ),
        ("verify", ["seed=7", "model=m"], "seed is 7; it must be 0, its default: nothing reads"),
        ("demo", ["grpo.model.path=x"], "grpo.model.path is 'x'; it must be left alone: the demo"),
        ("demo", ["sft.eval_every=9"], "sft.eval_every is 9; it must be 20, its default"),
    ],
)
def test_a_user_sees_one_line(capsys, command, words, message):
    with pytest.raises(ConfigError):
        resolve(command, words)
    assert main([command, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
