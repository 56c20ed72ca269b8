"""Megatron's names of parameters, and the engine's: one adapter for each of its model classes.

The engine's names are GPTModel's in the whole model. HybridModel makes two layers of one, attention
and then MLP, and calls the last norm otherwise. Both number the layers of a chunk from 0.
"""

import re
from dataclasses import dataclass

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_FINAL_NORM = "decoder.final_layernorm."


def layer_of(name: str) -> int | None:
    """The layer that an engine's parameter belongs to; None for embedding, output and last norm."""
    found = _LAYER.search(name)
    return None if found is None else int(found.group())


@dataclass(frozen=True)
class Adapter:
    """One of Megatron's model classes."""

    num_parts: int
    """Layers of Megatron's that make one of the engine's."""
    final_norm: str

    def engine_name(self, name: str, first_layer: int) -> str:
        """The engine's name of a parameter of a chunk, whose layers begin with first_layer."""
        if name.startswith(self.final_norm):
            return _FINAL_NORM + name.removeprefix(self.final_norm)

        def renumber(found: re.Match[str]) -> str:
            return str(first_layer + int(found.group()) // self.num_parts)

        return _LAYER.sub(renumber, name)


GPT = Adapter(num_parts=1, final_norm="decoder.final_layernorm.")
HYBRID = Adapter(num_parts=2, final_norm="decoder.final_norm.")
