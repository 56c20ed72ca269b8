"""What a word of the command line becomes: text as typed, the rest by its type, or a message."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from samebit.recipes.cli import compose
from samebit.recipes.cli.compose import SCHEMAS, groups_of, resolve
from samebit.recipes.cli.main import main
from samebit.recipes.cli.overrides import read_words
from samebit.recipes.config import ConfigError, check_run_folder
from samebit.recipes.run.secrets import to_dict, to_yaml


def read(*words, command="grpo"):
    return read_words(words, SCHEMAS[command], groups_of(command))


AS_TYPED = [
    "2025_01_05", "1.10", "true", "1e5", "0x10", "~", "a:b", "#x", "a b", " x ", "it's", "a,b/",
    "epoch=3/t.jsonl", "it's/", "données/", "[x", "[a,b]", "{x}", "{a: 1}", "$HOME", "a${b", "\\x",
    "a\\", "a\\${b", "'a\\", "'it''s'", "'", '"', "(a)", "choice(a,b)", "*", "a@b", "", "\t",
    "${", "}${{", "a\nb", "日本", "-1", "+x", "nan", "'a' b", "x=", "%", "!", "`", "<a>", "no",
]  # fmt: skip


def test_text_is_taken_as_typed():
    """Into the configuration, and from its YAML back, character by character."""
    words = [f"data.prompt_key={text}" for text in AS_TYPED]
    for text, (key, value) in zip(AS_TYPED, read(*words).values, strict=True):
        assert key == "data.prompt_key"
        # \\${ is how OmegaConf writes ${ as text, and stays so.
        assert OmegaConf.create({"x": value}).x == text.replace("\\${", "${"), text


def test_text_in_a_whole_configuration(tmp_path):
    """A name that is another run's as a number, and paths that a grammar does not take."""
    run = resolve(
        "grpo",
        ["model.path=epoch=3/it's", "run_name=2025_01_05", "data.path=données/a,b.jsonl",
         "output_dir=a${b", "data.eval_path=null", "data.metadata_keys=[2025_01, 1.10, 'a,b', é]"],
    )  # fmt: skip
    assert (run.model.path, run.run_name) == ("epoch=3/it's", "2025_01_05")
    assert (run.data.path, run.data.eval_path) == ("données/a,b.jsonl", None)
    assert (run.output_dir, str(run.run_dir)) == ("a${b", "a${b/2025_01_05")
    assert run.data.metadata_keys == ["2025_01", "1.10", "a,b", "é"]
    again = to_yaml(run)
    (tmp_path / "x.yaml").write_text(again)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "x.yaml"), resolve=True) == (
        to_dict(run)
    )


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("'x'", "x"),
        ('"1.10"', "1.10"),
        ("'a b'", "a b"),
        ("'null'", "null"),
        (r"'it\'s'", "it's"),
        ("null", None),
        ("NULL", None),
    ],
)
def test_quotes_around_a_whole_value_and_null_mean_what_they_did(typed, text):
    """Where a value is text or unset; quotes are for a text `null`."""
    assert read(f"data.path={typed}").values == [("data.path", text)]


def test_null_is_text_where_a_text_must_be():
    assert read("run_name=null").values == [("run_name", "null")]


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("[]", []),
        ("[a,b]", ["a", "b"]),
        ("[2025_01, 1.10,true, null]", ["2025_01", "1.10", "true", "null"]),
        ("['a,b', \"c\", it's]", ["a,b", "c", "it's"]),
        ("[é, a b]", ["é", "a b"]),
    ],
)
def test_lists_of_texts_hold_texts(typed, texts):
    assert read(f"data.metadata_keys={typed}").values == [("data.metadata_keys", texts)]


def test_the_last_value_of_a_key_holds():
    """In the order of the words, whether given by itself or with its section."""
    base = ["model.path=m", "data.path=a"]
    assert resolve("grpo", [*base, "data={path: b, chat: true}"]).data.path == "b"
    run = resolve("grpo", [*base, "data={path: b}", "data.path=c", "placement=process", "seed=1"])
    assert (run.data.path, run.placement.transport, run.seed) == ("c", "gloo", 1)


def test_a_word_is_read_by_its_command():
    """`placement` is a group of grpo's, `model` a text of demo's and of bench kernels'."""
    assert read("model=smollm2", command="demo").values == [("model", "smollm2")]
    assert read("placement=process").choices == ["placement=process"]
    assert read("model=1.10", "rows=[1,2]", command="bench kernels").values == [
        ("model", "1.10"),
        ("rows", [1, 2]),
    ]


WRONG = {
    "model.path": "'model.path' is no key=value of an existing key",
    "~data.path": "'~data.path' is no key=value",
    "=x": "'=x' is no key=value",
    "hydra.run.dir=x": "unknown key: hydra.run.dir",
    "trainer.num_step=1": "unknown key: trainer.num_step. Did you mean: trainer.num_steps",
    "data={pth: x}": r"unknown key: data.pth. Did you mean: data.path",
    "run_name.x=1": "unknown key: run_name.x",
    "--run_name": "--run_name is short for run_name=true; give run_name=...",
    "data={path: 1.10}": r"data.path is 1.1, no text: quote it",
    "data={metadata_keys: [1]}": r"data.metadata_keys is \[1\], no text: quote it",
    "data.metadata_keys=a": r"data.metadata_keys is 'a'; it must be a list such as \[a,b\]",
    "trainer.num_steps=a,b": "trainer.num_steps is 'a,b'; it must be a whole number",
    "trainer.num_steps=é": "trainer.num_steps is 'é'; it must be a whole number",
    "trainer.optimizer=x": "trainer.optimizer is 'x'; it must be a section",
    "placement=remote": "there is no placement/remote; give one of placement=colocated, placement=",
    "experiment=é": "there is no experiment/é; give one of experiment=qwen3_math, exp",
    "placement=null": "there is no placement/null",
    "engine=process": "there is no engine=process; it is placement=process now",
    "engine.transport=gloo": "unknown key: engine.transport; it is placement.transport now",
    "engine={placement: process}": "unknown key: engine.placement; it is placement.engine now",
    "reward=mine:f": "math_verify, reward=number_match, reward=reasoning_gym; your own function is "
    "reward.name=mine:f",
    "reward.args.x=it's": r"reward.args.x=it's cannot be read; quote a text: ",
    "reward.args.x=a,b": """x=a,b cannot be read; quote a text: 'reward.args.x="a,b"'""",
    "reward.args.api_key=a,b": r"reward.args.api_key=\*\*\* cannot be read",
    "run_name=a\0b": "run_name is 'a.x00b'; it must be UTF-8 text without NUL",
    "run_name=\udce9": "run_name is .*; it must be UTF-8 text",
}


@pytest.mark.parametrize("word", WRONG)
def test_words_that_cannot_be_read(word):
    with pytest.raises(ConfigError, match=WRONG[word]):
        read(word)


def test_the_advice_to_quote_works():
    """What the message says is a word of the shell."""
    with pytest.raises(ConfigError) as caught:
        read("reward.args.x=it's é")
    [word] = shlex.split(str(caught.value).split("quote a text: ")[1])
    assert read(word).values == [("reward.args.x", "it's é")]


UNRESOLVED = {
    "run_name=${oc.env:SAMEBIT_NO_SUCH}": "run_name=.*: Environment variable 'SAMEBIT_NO_SUCH' not",
    "run_name=${nokey}": "run_name=.*: Interpolation key 'nokey' not found",
    "run_name=${run_name}": "run_name=.*: Recursive interpolation",
    "run_name=${nores:x}": "run_name=.*: Unsupported interpolation type nores",
    "seed=${oc.env:SAMEBIT_TEXT}": "seed=.*: what it gives is not of this key's type",
    "trainer.num_steps=1.5": "trainer.num_steps is 1.5; it must be a whole number",
    "resume=7up": "resume is '7up'; it must be true or false",
    "resume=7": "resume is 7; it must be true or false",
    "trainer={parallel: {sequence: yes}}": "trainer.parallel.sequence is 'yes'; it must be true or",
    "engine={releasable: 0}": "engine.releasable is 0; it must be true or false, or null",
    "resume=null": "resume is None; it must be true or false",
    "resume=${oc.env:SAMEBIT_TEXT}": "resume=.*: what it gives is not of this key's type",
    "resume=${oc.env:SAMEBIT_SEVEN}": "resume=.*: what it gives is not of this key's type",
    "resume=${seed}": "resume=.*: what it gives is not of this key's type",
    "trainer.num_steps=null": "trainer.num_steps is None; it must be a whole number",
}


@pytest.mark.parametrize("word", UNRESOLVED)
def test_values_that_cannot_be_used(monkeypatch, capsys, word):
    """One line that names the key; what an environment variable holds is not in it."""
    monkeypatch.setenv("SAMEBIT_TEXT", "hidden-text")
    monkeypatch.setenv("SAMEBIT_SEVEN", "7")
    with pytest.raises(ConfigError, match=UNRESOLVED[word]) as caught:
        resolve("grpo", ["model.path=m", word])
    assert "hidden-text" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_are_true_or_false(monkeypatch):
    """In whichever way they are said."""
    monkeypatch.setenv("SAMEBIT_FLAG", "True")
    for word in ("TRUE", "'true'", "${oc.env:SAMEBIT_FLAG}", "${overwrite}"):
        words = ["model.path=m", "data=chain_sum", "overwrite=true", f"resume={word}"]
        with pytest.raises(ConfigError, match="resume.*overwrite|overwrite.*resume"):
            resolve("grpo", words)


def test_ctrl_c_where_nothing_is_to_be_saved(monkeypatch, capsys):
    def interrupted(_run):
        raise KeyboardInterrupt

    monkeypatch.setattr("samebit.recipes.verify.main", interrupted)
    assert main(["verify", "device=cpu"]) == 130
    assert capsys.readouterr().err == "samebit verify: interrupted\n"


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"samebit \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_keys_of_a_section_that_is_null(capsys):
    assert main(["demo", "demo=smollm2", "sft.trainer.num_steps=3"]) == 2
    assert "sft.trainer.num_steps is given, but sft.trainer is null" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "..", "a/", "/a", "a/../b", "-x", "a\nb", "é" * 101])
def test_a_runs_name_is_a_folders_name(name):
    with pytest.raises(ValueError, match=r"run_name is .*; it must be a folder's name"):
        check_run_folder(name, "outputs")


def test_runs_may_be_grouped_in_folders():
    run = resolve("grpo", ["model.path=m", "run_name=sweep/lr_1e-6"])
    assert run.run_dir == Path("outputs/sweep/lr_1e-6")


@pytest.mark.parametrize("command", ["grpo", "verify", "bench kernels"])
def test_every_command_with_a_runs_name_checks_it(command):
    given = {"grpo": ["model.path=m"], "bench kernels": ["model=m"], "verify": []}[command]
    with pytest.raises(ConfigError, match=r"run_name is '\.\.'; it must be a folder's name"):
        resolve(command, [*given, "run_name=.."])
    with pytest.raises(ConfigError, match="output_dir is ''; it must be the path of a folder"):
        resolve(command, [*given, "output_dir="])


def test_values_by_place_are_paths_as_they_are(capsys, tmp_path, monkeypatch):
    """Also with an equals sign, where that names no key."""
    monkeypatch.chdir(tmp_path)
    assert main(["diff", "epoch=3/it's é", "b"]) == 2
    assert "epoch=3/it's é is no folder" in capsys.readouterr().err


def test_a_number_where_a_file_must_have_another_type(tmp_path, monkeypatch):
    """YAML reads 2025_01_05 as a number too: the run would get another name."""
    folder = shutil.copytree(compose.CONFIG_DIR, tmp_path / "configs")
    monkeypatch.setattr(compose, "CONFIG_DIR", folder)
    experiment = folder / "experiment" / "grpo" / "mine.yaml"
    experiment.write_text("# @package _global_\nrun_name: 2025_01_05\n")
    with pytest.raises(ConfigError, match="mine.yaml: run_name is 20250105, no text: quote it"):
        resolve("grpo", ["model.path=m", "experiment=mine"])
    experiment.write_text("# @package _global_\nrun_name: '2025_01_05'\n")
    assert resolve("grpo", ["model.path=m", "experiment=mine"]).run_name == "2025_01_05"
    experiment.write_text("# @package _global_\ntrainer: {parallel: {sequence: 7}}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: trainer.parallel.sequence is 7; it must be"):
        resolve("grpo", ["model.path=m", "experiment=mine"])
    (folder / "data" / "mine.yaml").write_text("path: 1.10\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: data.path is 1.1, no text: quote it"):
        resolve("grpo", ["model.path=m", "data=mine"])
