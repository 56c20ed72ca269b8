"""The pass that `make sanitize` runs: it leaves no operation out, and notices bad output."""

import importlib
from pathlib import Path

import pytest
import torch
from programs import kernel_pass

from samebit.kernels import op as op_module
from samebit.kernels.op import Op


def all_operations():
    """The names of every Op in kernels/."""
    files = Path(op_module.__file__).parent.glob("*.py")
    modules = [importlib.import_module(f"samebit.kernels.{file.stem}") for file in files]
    return {op.name for module in modules for op in vars(module).values() if isinstance(op, Op)}


def test_every_operation_runs(monkeypatch, capsys):
    called = set()
    original = Op.__call__

    def record(op, *args, **kwargs):
        called.add(op.name)
        return original(op, *args, **kwargs)

    monkeypatch.setattr(Op, "__call__", record)
    assert kernel_pass.main("cpu") == 0
    assert called == all_operations()
    assert len(capsys.readouterr().out.splitlines()) == len(kernel_pass.PASSES)


def test_passes_run_by_name(capsys):
    assert kernel_pass.main("list") == 0
    names = capsys.readouterr().out.split()
    assert names == [one_pass.__name__ for one_pass in kernel_pass.PASSES]
    assert kernel_pass.main("cpu", "rope_pass") == 0
    assert capsys.readouterr().out.startswith("rope_pass")
    assert kernel_pass.main("cpu", "rope") == 2
    assert "'rope'" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_fails(monkeypatch, value, capsys):
    def broken_pass(make):
        yield torch.tensor([1.0, value])

    monkeypatch.setattr(kernel_pass, "PASSES", (broken_pass,))
    assert kernel_pass.main("cpu") == 1
    assert "broken_pass" in capsys.readouterr().out
