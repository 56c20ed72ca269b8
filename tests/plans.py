"""A tiny model whose parameters a hand can count, and plans of runs of it and of others."""

from samebit.recipes.cli.compose import resolve
from samebit.recipes.models.tiny_model import write_config
from samebit.recipes.plan import make_plan
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import measured
from samebit.recipes.planning.times import StepModel
from samebit.rollout.models.registry import load_model_config

GIB = 2**30
# Two layers, D = 64, F = 192, 4 query heads and 2 kv heads of 16, 1,000 tokens, tied embeddings.
D, F, V, PADDED, KV = 64, 192, 1000, 1024, 2 * 16
LAYER = D * (4 * 16 + 2 * KV) + 4 * 16 * D + 3 * D * F + 2 * D + 2 * 16  # norms of D, of q and k
ELEMENTS = 2 * LAYER + PADDED * D + D


def write_tiny(folder):
    write_config(
        folder, "qwen3", hidden_size=D, intermediate_size=F, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=V,
        tie_word_embeddings=True,
    )  # fmt: skip
    return folder


def plan_of(folder, *words):
    return make_plan(resolve("plan", [f"model.path={folder}", *words]))


def step_of(folder, *words):
    run, model = resolve("plan", [f"model.path={folder}", *words]), load_model_config(folder)
    return StepModel(run, model, Layout.of(run, model), measured())
