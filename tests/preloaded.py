"""What the fork server of the tests imports once for all processes that it starts."""

import gc
import importlib

from samebit.trainer.megatron.imports import lean_imports

MODULES = (
    "samebit.recipes.demo",
    "samebit.recipes.cli.compose",
    "samebit.rollout.engine_process",
    "samebit.trainer.algorithms.grpo",
    "rank_programs",
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.tokenization_auto",
    *(f"transformers.models.{x}.configuration_{x}" for x in ("llama", "qwen2", "qwen3")),
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
)

with lean_imports():
    for name in MODULES:
        importlib.import_module(name)

# No collection of a child's goes over it all, which would copy the memory that they share.
gc.freeze()
