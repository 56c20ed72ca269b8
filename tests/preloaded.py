"""What the forkserver of the tests imports once: the recipes, as the command imports them."""

from samebit.trainer.megatron.imports import without_compiler

with without_compiler():
    import samebit.recipes.demo  # noqa: F401
