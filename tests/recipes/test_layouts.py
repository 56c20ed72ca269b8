"""The program that runs GRPO under many layouts: what it starts, reads and judges."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import layouts

from samebit.recipes.cli.compose import resolve
from samebit.recipes.launch.launched import num_processes
from samebit.recipes.models.tiny_model import write_config
from samebit.recipes.run.rollouts import list_rollouts
from samebit.rollout.models.registry import load_model_config


def run(**changes):
    """A layout's part of a report, in which all is well."""
    return {
        "parallel": {},
        "logprob_tokens_compared": 100,
        "logprob_mismatches": 0,
        "grad_norm_min": 0.5,
        "first_rollout_digest": "aa",
        **changes,
    }


TENSOR = {"parallel": {"tensor": 2}, "first_rollout_digest": "bb"}


@pytest.mark.parametrize(
    ("found", "invariant", "said"),
    [
        ({"alone": run(), "data2": run(), "t": run(**TENSOR)}, False, []),
        ({"alone": run(), "t": run(**TENSOR)}, True, ["t: its first rollout is not that of alone"]),
        (
            {"alone": run(), "data2": run(first_rollout_digest="cc")},
            False,
            ["data2: its first rollout is not that of alone"],
        ),
        ({"a": run(logprob_mismatches=3)}, False, ["a: 3 log-probs differ"]),
        ({"a": run(logprob_tokens_compared=0)}, False, ["a: no log-prob was compared"]),
        ({"a": run(grad_norm_min=0.0)}, False, ["a: a step trained nothing"]),
        ({"a": run(grad_norm_min=float("nan"))}, False, ["a: a step trained nothing"]),
        ({"a": {"failed": "exit code 1: why"}, "b": run()}, False, ["a: exit code 1: why"]),
        ({}, False, ["no layout was run"]),
    ],
)
def test_what_speaks_against_the_promise(found, invariant, said):
    assert layouts.problems(found, invariant) == said


def test_layouts_are_chosen_by_the_machine():
    """Four GPUs hold every one, two GPUs those of two; names that there are not are refused."""
    options, rest = layouts.parse(["num_gpus=4", "trainer.num_steps=2"])
    assert rest == ["trainer.num_steps=2"]
    everything = layouts.chosen_layouts(options)
    assert everything == list(layouts.LAYOUTS)
    assert len(everything) > 9
    fewer = layouts.chosen_layouts(layouts.parse(["num_gpus=2"])[0])
    assert fewer == everything[:6]
    assert layouts.chosen_layouts(layouts.parse(["only=data2,alone"])[0]) == ["data2", "alone"]
    with pytest.raises(ValueError, match="only: no data3; there are alone, tensor2"):
        layouts.parse(["only=data3,alone"])


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_every_layout_is_a_valid_run(name, tmp_path):
    run = resolve("grpo", layouts.grpo_arguments(name, tmp_path / "model", tmp_path, "cpu"))
    sizes = [layouts.LAYOUTS[name].get(k, 1) for k in ("tensor", "pipeline", "context", "data")]
    assert num_processes(run) == sizes[0] * sizes[1] * sizes[2] * sizes[3]


def test_the_model_can_be_shared(tmp_path):
    """By four ranks, or in four groups of layers; and its text earns rewards of many sizes."""
    layouts.make_model(tmp_path / "model")
    model = load_model_config(tmp_path / "model")
    assert model.vocab_size == 2048
    assert (model.num_kv_heads % 4, model.num_layers % 4) == (0, 0)
    assert layouts.odd_characters("aabb", None) == 2 / 64


def test_a_finished_run_is_read(runs, tmp_path):
    summary, rows, _ = runs.train("run", "logger.save_rollouts=true", "trainer.num_steps=2")
    found = layouts.read_run(runs.folder / "run")
    assert found["steps"] == 2
    assert found["grad_norm_min"] == min(row["train/grad_norm"] for row in rows[1:])
    assert found["logprob_tokens_compared"] == summary["logprob_tokens_compared"] > 20
    assert layouts.problems({"alone": {"parallel": {}, **found}}, False) == []
    left_behind = runs.folder / "run" / "rollouts" / "step_00000005.safetensors"
    left_behind.touch()  # by a course of the run that a resumed one does not take
    runs.train("run", "logger.save_rollouts=true", "trainer.num_steps=2", "resume=true")
    assert list(list_rollouts(runs.folder / "run")) == [1, 2]


def test_a_run_that_fails_is_a_problem_and_written_down(tmp_path, monkeypatch, capsys):
    """Of the real command: a key that there is not."""
    monkeypatch.setattr(layouts, "make_model", lambda folder: None)
    out = tmp_path / "out.json"
    assert layouts.main(str(out), "device=cpu", "only=alone", "no.such.key=1") == 1
    report = json.loads(out.read_text())
    [line] = report["problems"]
    assert line.startswith("alone: exit code 2: samebit grpo: ")
    assert "no" in line
    assert (report["layouts_run"], report["logprob_tokens_compared"]) == (1, 0)
    assert f"layouts: {line}" in capsys.readouterr().err
    assert sys.executable not in out.read_text()


@pytest.fixture
def layout_steps(monkeypatch):
    """The program of that name, which imports another one that lies beside it."""
    monkeypatch.syspath_prepend(Path(layouts.__file__).parent)
    return importlib.import_module("layout_steps")


def test_steps_of_a_layout(layout_steps):
    """What is asked for, and what speaks against a run."""
    assert layout_steps.sizes_of("tensor:2+data:4") == {"tensor": 2, "data": 4}
    for wrong in ("tensor", "tensor:2+", "tensor:two", "2:tensor"):
        with pytest.raises(ValueError, match="is not NAME:SIZE"):
            layout_steps.sizes_of(wrong)
    good = {"logprobs_compared": [8, 8], "logprob_mismatches": 0, "grad_norm_min": 0.1}
    assert layout_steps.problems({"a": good}) == []
    assert layout_steps.problems({"a": good | {"logprob_mismatches": 3}}) == [
        "a: 3 log-probs differ"
    ]
    assert layout_steps.problems({"a": good | {"logprobs_compared": [8, 0]}}) == [
        "a: a step compared no log-prob"
    ]
    assert layout_steps.problems({"a": good | {"grad_norm_min": 0.0}}) == [
        "a: a step trained nothing"
    ]
    assert layout_steps.problems({}) == ["no layout was run"]


@pytest.mark.long
def test_steps_of_two_layouts_agree_with_the_rollout(layout_steps, tmp_path):
    """A small shape on the CPU, by the program itself."""
    shape, out = tmp_path / "shape", tmp_path / "steps.json"
    write_config(
        shape, "qwen3", vocab_size=2048, hidden_size=64, intermediate_size=128,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        tie_word_embeddings=False, max_position_embeddings=128, torch_dtype="bfloat16",
    )  # fmt: skip
    program = Path(layout_steps.__file__)
    sizes = ["steps=2", "prompts=4", "samples=2", "length=16"]
    words = ["device=cpu", f"shape={shape}", *sizes, "layouts=tensor:2,pipeline:2"]
    command = [sys.executable, program, out, *words]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stderr
    found = json.loads(out.read_text())["layouts"]
    for layout in ("tensor:2", "pipeline:2"):
        assert found[layout]["logprobs_compared"] == [128, 128]
        assert found[layout]["logprob_mismatches"] == 0
