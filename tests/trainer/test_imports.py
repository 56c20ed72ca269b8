"""Megatron is imported without compiler and wandb; nothing of it that was to be compiled runs."""

from helpers import run_python

PROGRAM = """
import sys
import torch
from samebit.trainer.megatron.imports import lean_imports

compile_ = torch.compile
with lean_imports():
    import samebit.recipes.grpo
    theirs = torch.compile(lambda x: x + 1, backend="eager")
assert torch.compile is compile_
assert "torch._inductor.compile_fx" not in sys.modules
assert "wandb" not in sys.modules
import wandb
from megatron.core.fusions.fused_bias_gelu import bias_gelu
try:
    bias_gelu(torch.zeros(2), torch.zeros(2))
except RuntimeError as error:
    print(error)
"""


def test_megatrons_compiled_functions_refuse_to_run():
    said = run_python(PROGRAM)
    assert said.startswith("megatron.core.fusions.fused_bias_gelu.bias_gelu is no operation of")
