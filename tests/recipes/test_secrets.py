"""Secrets are used and not shown, and what a run cannot do without is told before it begins."""

import copy
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import pytest

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import GrpoRun, ModelSection
from samebit.recipes.run import metrics
from samebit.recipes.run.metrics import LoggerConfig, MetricsLogger, WandbError
from samebit.recipes.run.needs import MissingError, require_ready
from samebit.recipes.run.secrets import is_secret_name, scrubbed, to_dict, to_yaml, without_secrets
from samebit.weight_sync import meeting
from samebit.weight_sync.disk import write_atomically

KEY, FROM_ENVIRONMENT = "sk-named-5f1c", "from-the-environment-77ab"


@pytest.fixture
def secret_run(monkeypatch):
    monkeypatch.setenv("SAMEBIT_TEST_VALUE", FROM_ENVIRONMENT)
    words = [
        f"reward.args.api_key={KEY}",
        "reward.args.login={user: someone, password: 4711}",
        "reward.args.other=${oc.env:SAMEBIT_TEST_VALUE}",
        "reward.args.max_new_tokens=5",
        "model.path=${oc.env:SAMEBIT_TEST_VALUE}/model",
    ]
    return resolve("grpo", words)


def test_a_run_has_its_secrets_and_shows_none(secret_run):
    """In YAML, plain values, reprs and messages; pickled and copied too."""
    args = secret_run.reward.args
    assert args["api_key"] == KEY
    assert args["login"]["password"] + 1 == 4712
    assert f"{args['other']}" == str(args["other"]) == FROM_ENVIRONMENT
    assert json.loads(json.dumps(args))["api_key"] == KEY
    assert Path(secret_run.model.path).name == "model"
    for run in (secret_run, copy.deepcopy(secret_run), pickle.loads(pickle.dumps(secret_run))):
        assert run.reward.args == args
        for shown in (to_yaml(run), str(to_dict(run)), repr(run), f"{run.reward.args}"):
            assert KEY not in shown
            assert "4711" not in shown
            assert FROM_ENVIRONMENT not in shown
            assert "${oc.env:SAMEBIT_TEST_VALUE}/model" in shown or "model" not in shown
        assert to_dict(run)["reward"]["args"] == {
            "api_key": "***",
            "login": {"user": "someone", "password": "***"},
            "other": "${oc.env:SAMEBIT_TEST_VALUE}",
            "max_new_tokens": 5,
        }


def test_an_error_that_tells_a_secret_is_printed_without(secret_run):
    """As when a user's reward quotes its arguments."""
    said = f"wrong key {KEY}, {FROM_ENVIRONMENT}: 4711"
    assert scrubbed(said, secret_run) == "wrong key ***, ${oc.env:SAMEBIT_TEST_VALUE}: ***"


def test_what_is_compared_holds_what_a_variable_gives_but_no_secret(monkeypatch):
    """A rotated key is no other configuration; another reward by a variable is."""
    monkeypatch.setenv("SAMEBIT_TEST_VALUE", "exact_match")
    monkeypatch.setenv("SAMEBIT_TEST_TOKEN", "a")
    words = ["model.path=m", "reward.name=${oc.env:SAMEBIT_TEST_VALUE}"]
    words += ["reward.args.x=${oc.env:SAMEBIT_TEST_TOKEN}", "reward.args.secret=b"]
    run = resolve("grpo", words)
    reward = to_dict(run, shown=False)["reward"]
    assert reward["name"] == "exact_match"
    assert reward["args"] == {"x": "${oc.env:SAMEBIT_TEST_TOKEN}", "secret": "***"}


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("api_key", "x", True),
        ("OPENAI_API_KEY", "x", True),
        ("apikey", "x", True),
        ("accessKey", "x", True),
        ("hf_token", "x", True),
        ("token_value", "x", True),
        ("password", 1, True),
        ("dbPassword", "x", True),
        ("credentials", "x", True),
        ("authorization", "x", True),
        ("max_new_tokens", 5, False),
        ("stop_token_ids", "1", True),  # of free arguments only: rather too much than too little
        ("token_budget", 100, False),
        ("prompt_key", "x", False),
        ("author", "x", False),
        ("length", 6, False),
    ],
)
def test_names_of_secrets(name, value, secret):
    assert is_secret_name(name, value) is secret


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("logger.api_key=abc", "logger.api_key=***"),
        ("--wandb-token=abc", "--wandb-token=***"),
        ("reward.password=a=b", "reward.password=***"),
        ("+SECRET=abc", "+SECRET=***"),
        (
            "logger={project: p, api_key: 'abc', offline: true}",
            "logger={project: p, api_key: ***, offline: true}",
        ),
        ("logger.api_key=${oc.env:WANDB_API_KEY}", "logger.api_key=${oc.env:WANDB_API_KEY}"),
        ("logger.api_key=${oc.env:KEY,abc}", "logger.api_key=***"),
        ("data.path=https://me:abc@host/x", "data.path=https://***@host/x"),
        ("data.prompt_key=question", "data.prompt_key=question"),
        ("rollout.max_new_tokens=8", "rollout.max_new_tokens=8"),
        ("tokens_per_step=8", "tokens_per_step=8"),
        ("reward.args.token_budget=100", "reward.args.token_budget=100"),
        ("reward.args.passphrase=one two, three", "reward.args.passphrase=***"),
        ("reward.args.secrets.hub=abc", "reward.args.secrets.hub=***"),
        ("reward.args={apiKey: abc, n: 1}", "reward.args={apiKey: ***, n: 1}"),
        ("reward.args={dbPassword: 'a, b', n: 1}", "reward.args={dbPassword: ***, n: 1}"),
        ("reward.args={auth: {user: a, pwd: b}, n: 1}", "reward.args={auth: ***, n: 1}"),
        ("reward.args={token: ${oc.env:T}, n: 1}", "reward.args={token: ${oc.env:T}, n: 1}"),
        ("bench", "bench"),
    ],
)
def test_a_recorded_command_holds_no_secret(argument, shown):
    assert without_secrets(argument) == shown


def test_files_that_hold_a_configuration_are_the_owners(tmp_path):
    """From their first byte on; others follow the umask."""
    for mode, expected in ((metrics.OWNER_ONLY, 0o600), (0o666, 0o644)):
        (tmp_path / ".x.tmp").touch(mode=0o666)  # what a kill left
        write_atomically(tmp_path / "x", "a", mode)
        assert (tmp_path / "x").stat().st_mode & 0o777 == expected


def test_nothing_of_a_run_holds_a_secret(runs, capsys, monkeypatch):
    """Neither a file, wandb's among them, nor what is printed."""
    monkeypatch.setenv("SAMEBIT_TEST_VALUE", FROM_ENVIRONMENT)
    words = [f"reward.args.api_key={KEY}", "reward.args.other=${oc.env:SAMEBIT_TEST_VALUE}"]
    arguments = [
        a for a in runs.arguments("open", *words) if not a.startswith(("logger", "reward.a"))
    ]
    arguments += [*words, "reward.name=secret_reward:strict", "trainer.num_steps=1"]
    monkeypatch.setattr(sys, "argv", ["samebit", "grpo", *arguments])
    monkeypatch.setattr(meeting, "_given", [])
    monkeypatch.setenv(meeting.SECRET, "of the ranks alone")
    assert main(["grpo", *arguments]) == 0
    printed = capsys.readouterr()
    found = {p: p.read_bytes() for p in runs.folder.rglob("*") if p.is_file()}
    assert any(path.suffix == ".wandb" for path in found)
    for text in (KEY, FROM_ENVIRONMENT):
        assert text not in printed.out + printed.err
        assert [path for path, content in found.items() if text.encode() in content] == []
    for name in ("config.yaml", "report.html"):
        assert (runs.folder / "open" / name).stat().st_mode & 0o777 == 0o600
    assert (runs.folder / "open" / "wandb").stat().st_mode & 0o777 == 0o700


PACKAGES = {
    "wandb": (["grpo", "model.path=m"], "logger.wandb, which is 'offline', needs the package"),
    "tensorboard": (["sft", "model.path=m", "trainer.batch_size=1", "logger.tensorboard=true"],
                    "logger.tensorboard, which is true, needs the package tensorboard, which is"),
    "math_verify": (["grpo", "model.path=m", "logger=disabled", "reward=math_verify"],
                    "reward.name, which is 'math_verify', needs the package math-verify"),
    "reasoning_gym": (["sft", "model.path=m", "data=chain_sum", "trainer.batch_size=1"],
                      "data.task, which is 'reasoning_gym/chain_sum', needs the package"),
    "matplotlib": (["grpo", "model.path=m"], "report.html, with its curves, needs the package mat"),
    "pyarrow": (["grpo", "model.path=m", "data.path=x.parquet"], "a .parquet file, needs the pack"),
    "gguf": (["demo", "demo=smollm2", "device=cpu"], "the GGUF file of SmolLM2 needs the package"),
    "accelerate": (["fetch-smollm2", "out=o"], "the GGUF file of SmolLM2 needs the package accel"),
}  # fmt: skip


@pytest.mark.parametrize("module", PACKAGES)
def test_a_missing_package_is_told_first(monkeypatch, capsys, tmp_path, module):
    """Before a phase, in dry_run, with what to do; nothing is written."""
    arguments, message = PACKAGES[module]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    dry = [] if arguments[0] == "fetch-smollm2" else ["dry_run=true"]
    for more in ([], dry):
        assert main([*arguments, *more]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert f"is not installed: pip install {module.replace('_', '-')}" in error
    assert list(tmp_path.iterdir()) == []


def test_the_demos_second_phase_counts_before_its_first(monkeypatch, tmp_path):
    from samebit.recipes import demo

    monkeypatch.setitem(sys.modules, "wandb", None)
    run = resolve("demo", [f"output_dir={tmp_path}", "device=cpu"])
    with pytest.raises(MissingError, match="grpo.logger.wandb, which is 'offline', needs the pack"):
        demo.main(run)
    assert list(tmp_path.iterdir()) == []


def test_wandb_online_needs_a_login(monkeypatch, tmp_path):
    """Asked for before anything is touched, wherever wandb looks, and without a server."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = GrpoRun(model=ModelSection(path="m"), logger=LoggerConfig(wandb="online"))
    with pytest.raises(MissingError, match="no API key is configured: run `wandb login`, set WAND"):
        require_ready(run)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(MissingError, match="API_KEY invalid.*or give logger.wandb=offline"):
        require_ready(run)
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "a" * 40)
    netrc.chmod(0o600)
    require_ready(run)
    netrc.unlink()
    with monkeypatch.context() as other:  # a version without it
        other.delattr("wandb.sdk.lib.wbauth")
        other.setitem(sys.modules, "wandb.sdk.lib.wbauth", None)
        require_ready(run)
    wandb.teardown()


@pytest.mark.parametrize("project", ["", "a/b", "a\\b", "a#b", "a?b", "a%b", "a:b", "x" * 129])
def test_a_project_is_a_name_that_wandb_takes(project):
    with pytest.raises(ValueError, match=r"logger.project is .*; it must be a name that wandb"):
        LoggerConfig(project=project)


def test_an_error_of_wandb_is_ours(tmp_path, monkeypatch):
    import wandb

    def refuse(**_settings):
        raise wandb.errors.CommError("no route")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(WandbError, match="logger.wandb is 'offline' and wandb cannot start: no"):
        MetricsLogger(tmp_path, LoggerConfig(), "run", {}, None)


def test_no_foreign_package_is_advised():
    """`samebit` on the public index would be somebody else's."""
    root = Path(importlib.util.find_spec("samebit.recipes.grpo").origin).parent
    advised = [p for p in root.rglob("*.py") if "install samebit" in p.read_text()]
    assert advised == []
