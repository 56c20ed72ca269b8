"""An algorithm from a file outside the package, the example of docs/extending.md: what it computes,
and its settings. tests/test_extending.py resumes it."""

import re
import sys
from pathlib import Path
from shutil import copytree

import pytest

from samebit.recipes.cli import compose
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_grpo
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError, GrpoRun

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
NAME = "algorithm.name=my_algorithms:Reinforce"


CRITICS = """
from dataclasses import dataclass

from samebit.trainer.algorithms.distillation import Distillation
from samebit.trainer.algorithms.ppo import Ppo, PpoConfig
from samebit.trainer.config import AlgorithmConfig


@dataclass(kw_only=True)
class BothConfig(PpoConfig):
    sections = "critic", "distillation"


class Both(Ppo):
    Config = BothConfig
    needs_teacher = True


@dataclass(kw_only=True)
class MisnamedConfig(AlgorithmConfig):
    sections = ("crtic",)


class Misnamed(Ppo):
    Config = MisnamedConfig


class Forgotten(Ppo):
    Config = AlgorithmConfig
    __init__ = object.__init__


class Untaught(Forgotten):
    needs_values, needs_teacher = False, True
"""


@pytest.fixture(autouse=True)
def _source(tmp_path, monkeypatch):
    """The file of the page's example, where Python finds it."""
    [code] = re.findall(r"```python\n(# my_algorithms.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    file = tmp_path / "my_algorithms.py"
    file.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_algorithms", raising=False)


def test_at_a_ratio_of_1_its_gradient_is_dr_grpos(runs):
    """To the bit; with its own key it is another."""
    summary, rows, _ = runs.train("own", NAME)
    dr_grpo, expected, _ = runs.train("dr", "algorithm.normalize_std=false")
    assert summary["logprob_mismatches"] == 0
    assert summary["weights_digest"] == dr_grpo["weights_digest"]
    assert rows[1].keys() == expected[1].keys() - {"train/ratio", "train/clip_fraction"}
    bonus, *_ = runs.train("bonus", NAME, "algorithm.entropy_coef=0.1")
    assert bonus["weights_digest"] != summary["weights_digest"]


WRONG = """
class Wrong(Reinforce):
    def loss(self, inputs):
        raise {0}
"""


@pytest.mark.parametrize("error", ["KeyError('beta')", "SystemExit(0)", "TypeError('no')"])
def test_what_it_raises_is_said_with_its_name(runs, tmp_path, capsys, error):
    """In a line, and the run has failed."""
    with (tmp_path / "my_algorithms.py").open("a") as file:
        file.write(WRONG.format(error))
    words = runs.arguments("wrong", "algorithm.name=my_algorithms:Wrong", "overwrite=true")
    assert main(["grpo", *words]) == 1
    name = "samebit grpo: the algorithm my_algorithms:Wrong"
    assert f"{name} raised {error} in loss (SAMEBIT_TRACEBACK=1 shows" in capsys.readouterr().err


CONFIGURED = """
@dataclass(kw_only=True)
class ExitConfig(ReinforceConfig):
    def __post_init__(self):
        exit(0)


class Exits(Reinforce):
    Config = ExitConfig
"""


def test_it_cannot_end_the_command_as_if_all_were_done(tmp_path, capsys):
    """Wherever it exits: the place in its file is told."""
    file = tmp_path / "my_algorithms.py"
    lines = file.read_text().count("\n")
    with file.open("a") as more:
        more.write(CONFIGURED)
    assert main(["grpo", "model.path=m", "algorithm.name=my_algorithms:Exits"]) == 1
    assert f"{file}, line {lines + 5} (__post_init__) has raised SystemExit(0); raise an error" in (
        capsys.readouterr().err
    )


def test_its_settings_are_keys_with_types():
    run = resolve("grpo", ["model.path=m", NAME, "algorithm.entropy_coef=0.25"])
    assert isinstance(run, GrpoRun)
    assert (run.algorithm.name, run.algorithm.entropy_coef) == (NAME.partition("=")[2], 0.25)
    run.rollout.samples_per_prompt = 1
    run.validate()
    for word, message in {
        "algorithm.entropy_coef=much": "algorithm.entropy_coef is 'much'; it must be a number",
        "algorithm.kl_coef=0.1": "unknown key: algorithm.kl_coef",
        "algorithm=dr_grpo": "unknown key: algorithm.normalize_std",
        "algorithm.name=my_algorithms:Such": "which cannot be imported: module 'my_algorithms'",
        "algorithm.name=other": "it must be one of ('grpo', 'gspo',",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            resolve("grpo", ["model.path=m", NAME, word])
    # After another algorithm nothing of it is left.
    assert resolve("grpo", ["model.path=m"]).algorithm.kl_coef == 0


def test_help_shows_its_settings(capsys):
    assert main(["grpo", "--help", NAME]) == 0
    shown = capsys.readouterr().out
    assert "  entropy_coef: 0.0  # Weight of the entropy, which is rewarded." in shown
    assert "kl_coef" not in shown


def test_a_chosen_file_may_name_it(tmp_path, monkeypatch):
    """Of the group, or of an experiment."""
    copytree(compose.CONFIG_DIR, tmp_path / "configs")
    monkeypatch.setattr(compose, "CONFIG_DIR", tmp_path / "configs")
    preset = f"name: {NAME.partition('=')[2]}\nentropy_coef: 0.5\n"
    (tmp_path / "configs" / "algorithm" / "mine.yaml").write_text(preset)
    experiment = "# @package _global_\ndefaults:\n  - override /algorithm: mine\nseed: 7\n"
    (tmp_path / "configs" / "experiment" / "grpo" / "mine.yaml").write_text(experiment)
    for word in ("algorithm=mine", "experiment=mine"):
        run = resolve("grpo", ["model.path=m", word])
        assert run.algorithm.entropy_coef == 0.5
    assert run.seed == 7


def test_what_it_needs_has_its_section(runs, tmp_path, demo_model):
    """A critic's or a teacher's, which its settings name; no other."""
    (tmp_path / "my_critics.py").write_text(CRITICS)
    for name, message in {
        "Misnamed": "Config.sections are among ('critic', 'distillation')",
        "Forgotten": "Config.sections has `critic`, as its needs_values is set",
        "Untaught": "Config.sections has `distillation`, as its needs_teacher is set",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            describe_grpo(runs.resolve("own", f"algorithm.name=my_critics:{name}"))
    both = ["algorithm.name=my_critics:Both", f"distillation.teacher={demo_model}"]
    summary, rows, _ = runs.train("both", *both, "critic.warmup_steps=1", "trainer.num_steps=2")
    assert summary["logprob_mismatches"] == 0
    assert rows[1]["distillation/reverse_kl"] == 0.0
    assert rows[2]["critic/vf_loss"] > 0


def test_the_demo_has_its_own():
    with pytest.raises(ConfigError, match="grpo.algorithm.name is .*the demo's is grpo"):
        resolve("demo", ["device=cpu", f"grpo.{NAME}"])
