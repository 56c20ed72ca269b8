"""The command line: what composes, what is refused and how it is said."""

import subprocess
import sys

import pytest
from helpers import run_python
from omegaconf import OmegaConf

from samebit.recipes.cli.commands import COMMANDS
from samebit.recipes.cli.compose import CONFIG_DIR, SCHEMAS, compose, groups_of, resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError, GrpoRun, SftRun
from samebit.recipes.demo_config import DemoRun
from samebit.recipes.run.binding import bound_keys
from samebit.recipes.tools_config import ExportRun, VerifyRun

NEEDED = {
    "grpo": ["model.path=m"],
    "sft": ["model.path=m", "trainer.batch_size=8"],
    "dpo": ["model.path=m", "trainer.batch_size=8"],
    "eagle3": ["model.path=m"],
    "demo": [],
    "verify": [],
    "export": ["checkpoint=c", "model=m", "out=o"],
}
GROUPS = {
    "grpo": ("algorithm", "data", "experiment", "logger", "placement", "reward"),
    "sft": ("data", "experiment", "logger"),
    "dpo": ("data", "experiment", "logger"),
    "eagle3": ("data", "experiment", "logger"),
    "demo": ("demo",),
}
CHOICES = [
    (command, group, name)
    for command in GROUPS
    for group, names in groups_of(command).items()
    for name in names
]


@pytest.mark.parametrize(("command", "group", "name"), CHOICES)
def test_every_file_of_every_group_composes(command, group, name):
    """A typing error in a rarely used file would only show when somebody needs it."""
    taught = ["distillation.teacher=t"] if "distillation" in name else []
    assert resolve(command, [*NEEDED[command], f"{group}={name}", *taught]) is not None


def test_every_group_belongs_to_a_command():
    """A folder that no command reads is dead."""
    assert {command: tuple(groups_of(command)) for command in GROUPS} == GROUPS
    read = {group for groups in GROUPS.values() for group in groups}
    assert {p.name for p in CONFIG_DIR.iterdir() if p.is_dir()} == read
    with_recipes = {command for command, groups in GROUPS.items() if "experiment" in groups}
    assert {p.name for p in (CONFIG_DIR / "experiment").iterdir()} == with_recipes
    assert {p.stem for p in CONFIG_DIR.glob("*.yaml")} <= set(SCHEMAS) == set(COMMANDS)


def test_no_number_is_infinite():
    """Where no meaning of a key says so before; arguments of users' own may be anything."""
    for key in (
        "algorithm.std_eps",
        "trainer.optimizer.weight_decay",
        "trainer.optimizer.adam_eps",
    ):
        for value in ("inf", "nan", "-inf"):
            with pytest.raises(ConfigError, match=f"^{key} is {value}; it must be "):
                resolve("grpo", ["model.path=m", f"{key}={value}"])
    run = resolve("grpo", ["model.path=m", "reward.name=m:f", "reward.args.x=inf"])
    assert str(run.reward.args["x"]) == "inf"


def test_groups_set_what_they_say():
    """A group file that composes but changes nothing would be a silent lie."""
    run = resolve(
        "grpo", ["model.path=m", "placement=process", "algorithm=grpo_kl", "reward=math_verify"]
    )
    assert (run.placement.engine, run.placement.transport) == ("process", "gloo")
    assert (run.algorithm.kl_coef, run.algorithm.kl_estimator) == (0.001, "k3")
    assert run.reward.name == "math_verify"
    assert resolve("grpo", ["model.path=m", "algorithm=dr_grpo"]).algorithm.normalize_std is False
    run = resolve("grpo", ["model.path=m", "experiment=reverse_digits"])
    assert (run.run_name, run.data.task, run.data.args) == (
        "reverse_digits",
        "reverse_digits",
        {"length": 6},
    )
    assert (run.rollout.max_new_tokens, run.trainer.optimizer.lr) == (8, 6e-4)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("grpo", GrpoRun),
        ("sft", SftRun),
        ("demo", DemoRun),
    ],
)
def test_a_command_gives_its_dataclass(command, kind):
    """Recipes get checked objects, not loose dictionaries."""
    run = resolve(command, [*NEEDED[command], "seed=7", "run_name=x", "output_dir=/tmp/y"])
    assert type(run) is kind
    assert run.seed == 7
    assert str(run.run_dir) == "/tmp/y/x"


def test_tools_take_no_keys_that_they_would_ignore():
    """A key that does nothing is worse than an error."""
    assert type(resolve("verify", ["seed=7"])) is VerifyRun
    assert type(resolve("export", NEEDED["export"])) is ExportRun
    for command, key in (("verify", "resume"), ("export", "device"), ("export", "dry_run")):
        with pytest.raises(ConfigError, match=key):
            resolve(command, [*NEEDED[command], f"{key}=true"])
    with pytest.raises(ConfigError, match="grpo.seed is the demo's own; give seed=5"):
        resolve("demo", ["grpo.seed=5"])
    with pytest.raises(ConfigError, match="model_family is 'a:B'.*where the demo makes its model"):
        resolve("demo", ["device=cpu", "model_family=a:B"])


def test_resolving_again_starts_from_the_defaults():
    """Hydra keeps global state: one call must not leak into the next."""
    assert resolve("grpo", ["model.path=m", "trainer.num_steps=3"]).trainer.num_steps == 3
    assert resolve("grpo", ["model.path=m"]).trainer.num_steps == 100


def test_arguments_of_tasks_and_rewards_are_free():
    """args take whatever the function takes, without Hydra's plus sign."""
    run = resolve(
        "grpo",
        [
            "model.path=m",
            "data=reverse_digits",
            "data.args.length=3",
            "reward.args.timeout_s=9",
            "+reward.args.other=x",
        ],
    )
    assert run.data.args == {"length": 3}
    assert run.reward.args == {"timeout_s": 9, "other": "x"}


WRONG = {
    "unknown key": (["trainer.num_step=3"], r"num_step.*Did you mean: .*trainer.num_steps"),
    "unknown top key": (["sead=3"], r"sead.*Did you mean: .*seed"),
    "unknown nested key": (
        ["trainer.optimizer.learning_rate=3"],
        r"trainer.optimizer.learning_rate",
    ),
    "unknown group choice": (["placement=remote"], r"placement/remote.*colocated.*process"),
    "unknown group": (["motor=fast"], "motor"),
    "text for a number": (["trainer.num_steps=many"], r"'many'.*Integer|trainer.num_steps"),
    "number for a flag": (["resume=7up"], "resume|7up"),
    "fraction for a count": (["rollout.prompts_per_step=1.5"], "1.5"),
    "out of range": (["trainer.num_steps=0"], "trainer.num_steps is 0; it must be positive"),
    "unknown schedule": (
        ["trainer.optimizer.lr_schedule=step"],
        r"lr_schedule is 'step'; it must be one of .*'constant', 'linear', 'cosine'",
    ),
    "batch does not divide": (
        ["rollout.prompts_per_step=6", "rollout.samples_per_prompt=4", "trainer.batch_size=9"],
        "6 x 4 = 24 samples are no multiple of trainer.batch_size = 9",
    ),
    "batch too large": (
        ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=4", "trainer.batch_size=16"],
        "2 x 4 = 8 samples are no multiple of trainer.batch_size = 16",
    ),
    "alias to another process": (
        ["placement.engine=process"],
        r"placement.transport is 'alias'; it must be one of \('gloo', 'nccl', 'ipc', 'file'\)",
    ),
    "gloo in one process": (
        ["placement.transport=gloo"],
        r"placement.transport is 'gloo'; it must be one of \('alias', 'stages', 'file'\)",
    ),
    "deltas of what is shared": (
        ["placement.delta=true"],
        r"placement.delta is True; it must be false with placement.transport 'alias', or the "
        r"transport one of \('gloo', 'nccl', 'ipc'\)",
    ),
    "no time to wait": (
        ["placement=process", "placement.timeout_s=0"],
        "placement.timeout_s is 0.0; it must be positive, and below 1e8",
    ),
    "a wait where there is none": (
        ["placement.timeout_s=30"],
        "placement.timeout_s is 30.0; it must be 600.0 with placement.transport 'alias'",
    ),
    "deltas in files": (
        ["placement=process", "placement.transport=file", "placement.delta=true"],
        "placement.delta is True; it must be false with placement.transport 'file'",
    ),
    "sample longer than a batch": (
        ["rollout.max_prompt_len=5000", "rollout.max_new_tokens=4000"],
        "= 9000 exceed trainer.micro_batch_tokens = 8192",
    ),
    "sample longer than a batch by one": (
        ["rollout.max_prompt_len=5000", "rollout.max_new_tokens=3193"],
        "= 8193 exceed trainer.micro_batch_tokens = 8192",
    ),
    "temperature zero": (["rollout.temperature=0"], "rollout.temperature is 0.0; it must be posit"),
    "tensor parallel, engine apart": (
        ["trainer.parallel.tensor=2", "placement=process"],
        "placement.engine_tensor is 1; it must be 2 with placement.engine=process and "
        "trainer.parallel.tensor=2 unless numerics.tp_invariant=true: another number of processes "
        "computes other bits without it",
    ),
    "several processes, by files": (
        ["trainer.parallel.data=2", "placement.transport=file"],
        "placement.transport is 'file'; it must be alias with placement=colocated and 2 processes",
    ),
    "pipeline that shares memory": (
        ["trainer.parallel.pipeline=2"],
        "placement.transport is 'alias'; it must be stages with placement=colocated and 2 processe",
    ),
    "stages of one process": (
        ["placement.transport=stages"],
        "placement.transport is 'stages'; it must be alias or file with placement=colocated and 1",
    ),
    "more copies than samples": (
        ["trainer.parallel.data=8", "trainer.batch_size=4"],
        "trainer.parallel.data is 8; it must be at most 4, a step's samples",
    ),
    "chunks of one stage": (
        ["trainer.parallel.virtual_pipeline=2"],
        "trainer.parallel.virtual_pipeline is 2; it must be 1 where trainer.parallel.pipeline is 1",
    ),
    "nothing to overlap": (
        ["trainer.parallel.overlap_grad_reduce=true"],
        "overlap_grad_reduce is True; it must be false where trainer.parallel.data and context are",
    ),
    "unknown recompute": (
        ["trainer.parallel.recompute=some"],
        r"trainer.parallel.recompute is 'some'; it must be one of \('none', 'selective', 'full'\)",
    ),
    "unknown attention": (
        ["numerics.attention=flash"],
        r"numerics.attention is 'flash'; it must be one of \('canonical', 'flashinfer'\)",
    ),
    "no held-out problems": (["data.eval_size=0"], "data.eval_size is 0"),
    "no override at all": (["hello"], "'hello' is no key=value of an existing key"),
    "an option": (["-x"], "'-x' is no key=value"),
    "a new key": (["++trainer.foo=3"], r"'\+\+trainer.foo=3' is no key=value of an existing key"),
    "a new top key": (["args=3"], "args"),
    "a removed section": (["~data"], "'~data' is no key=value"),
    "top_p": (["rollout.top_p=2"], r"rollout.top_p is 2.0; it must be in \[1e-30, 1\]"),
    "no pages": (["engine.page_size=0"], "engine.page_size is 0; it must be positive"),
    "a setting that the run makes": (
        ["engine.seed=3"],
        "engine.seed is 3; it must be 0, its default: nothing reads it where .* seed are the run's",
    ),
    "a family of the engine alone": (
        ["engine.model_family=a:B"],
        "engine.model_family is 'a:B'; it must be None, its default",
    ),
    "unknown wandb mode": (["logger.wandb=bogus"], "logger.wandb is 'bogus'; give one of disabl"),
    "no threads": (["cpu_threads=0"], "cpu_threads is 0; it must be positive"),
    "seed too large": (["seed=99999999999999"], "seed is 99999999999999; it must be in"),
}


def test_the_longest_sample_may_fill_a_batch():
    """To its last token."""
    lengths = ["rollout.max_prompt_len=5000", "rollout.max_new_tokens=3192"]
    run = resolve("grpo", ["model.path=m", *lengths])
    assert run.rollout.max_prompt_len + 3192 == run.trainer.micro_batch_tokens


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_configuration_says_what_is_wrong(capsys, case):
    """One line on stderr that names the key, and exit code 2 before anything runs."""
    overrides, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        resolve("grpo", ["model.path=m", *overrides])
    assert main(["grpo", "model.path=m", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("samebit grpo: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("grpo", ["model.path=..."]),
        ("sft", ["model.path=..."]),
        ("export", ["checkpoint=...", "model=...", "out=..."]),
    ],
)
def test_missing_keys_are_all_named(capsys, command, keys):
    """What a user must give, in one go."""
    assert main([command]) == 2
    assert capsys.readouterr().err == f"samebit {command}: required: {', '.join(keys)}\n"


def test_sft_needs_a_batch_size(capsys):
    """There is no rollout whose size it could take."""
    assert main(["sft", "model.path=m"]) == 2
    assert "trainer.batch_size is None; it must be set for sft" in capsys.readouterr().err


def test_a_run_is_bound_by_what_can_change_a_result():
    """Else a run could not be resumed with another engine; else two different runs could mix. Of
    files it is the content, see test_binding."""

    def digest(*overrides):
        return bound_keys(resolve("grpo", ["model.path=m", *overrides]))

    base = digest()
    for free in (
        "placement=process",
        ["placement=process", "placement.delta=true"],
        "engine.page_size=16",
        "logger=disabled",
        "resume=true",
        "run_name=x",
        "output_dir=x",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=9",
        "trainer.num_steps=7",
        "device=cpu",
        "model.path=n",
        "data.path=x.jsonl",
    ):
        assert digest(*([free] if isinstance(free, str) else free)) == base, free
    for bound in (
        "seed=1",
        "algorithm.kl_coef=0.1",
        "rollout.top_p=0.9",
        "trainer.micro_batch_tokens=999",
        "trainer.optimizer.adam_eps=1e-7",
        "data.seed=1",
        "reward.args.x=1",
    ):
        assert digest(bound) != base, bound
    decaying = "trainer.optimizer.lr_schedule=cosine"
    assert digest(decaying, "trainer.num_steps=7") != digest(decaying)


def test_without_a_command(capsys):
    """`samebit` alone shows what there is, and is not a success."""
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert all(f"  {command}" in usage for command in COMMANDS)
    for flag in ("-h", "--help", "help"):
        assert main([flag]) == 0
        assert capsys.readouterr().out == usage


def test_an_unknown_command(capsys):
    """A misspelled command gets the list, on stderr."""
    assert main(["gpro", "seed=1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("samebit: no command 'gpro'")
    assert "usage: samebit" in err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_lists_groups_keys_and_defaults(capsys, command):
    """--help is the reference of the configuration."""
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"samebit {command}: {COMMANDS[command]}" in text
    assert ("placement: colocated, process" in text) == (command in ("grpo", "plan"))
    elsewhere = ("diff", "export", "fetch-smollm2", "replay", "report", "submit", "watch")
    assert ("output_dir: outputs" in text) == (command not in elsewhere)
    keys = text.split("(??? must be given):")[1]
    assert OmegaConf.create(keys) == compose(command, [])
    if command == "grpo":
        assert "  path: ???  # A Hugging Face folder: config.json" in keys
        assert "  clip_ratio_low: 0.2" in keys
        assert "dry_run: false  # Print what the run would be and stop.\n" in keys


def test_help_and_wrong_configurations_do_not_import_torch():
    """They must answer at once, also on a machine that is busy or has no torch."""
    code = (
        "import sys\n"
        "from samebit.recipes.cli.main import main\n"
        "codes = [main([]), main(['grpo', '--help']), main(['grpo', 'seed=x'])]\n"
        "slow = {'torch', 'transformers', 'megatron', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "print(codes, sorted(slow))"
    )
    assert run_python(code).splitlines()[-1] == "[2, 0, 2] []"


def test_the_console_command_passes_its_exit_code_on():
    """Scripts rely on it."""
    command = [sys.executable, "-P", "-m", "samebit.recipes.cli.main"]
    assert subprocess.run([*command, "grpo", "--help"], capture_output=True).returncode == 0
    assert subprocess.run([*command, "nothing"], capture_output=True).returncode == 2
