"""Megatron's names of parameters, and the engine's: one adapter for each of its model classes.

The engine's names are GPTModel's in the whole model: a block of attention and MLP is one layer.
HybridModel, to which Megatron moves, has two layers of a block, attention and then MLP, and another
name of the final norm. Both number the layers of a chunk of the pipeline from 0.
"""

import re
from dataclasses import dataclass

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_FINAL_NORM = "decoder.final_layernorm."


def block_of(name: str) -> int | None:
    """The block that an engine's parameter belongs to; None for embedding, output and last norm."""
    found = _LAYER.search(name)
    return None if found is None else int(found.group())


@dataclass(frozen=True)
class Adapter:
    """One of Megatron's model classes."""

    layers_per_block: int
    final_norm: str

    def engine_name(self, name: str, first_block: int) -> str:
        """The engine's name of a chunk's parameter; the chunk's layers begin with first_block."""
        if name.startswith(self.final_norm):
            return _FINAL_NORM + name.removeprefix(self.final_norm)

        def renumber(found: re.Match[str]) -> str:
            return str(first_block + int(found.group()) // self.layers_per_block)

        return _LAYER.sub(renumber, name)


GPT = Adapter(layers_per_block=1, final_norm="decoder.final_layernorm.")
HYBRID = Adapter(layers_per_block=2, final_norm="decoder.final_norm.")
