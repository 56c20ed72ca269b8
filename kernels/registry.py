"""The attention kinds by name. No torch here: recipes check names before they import it."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samebit.kernels.attention_kind import AttentionKind

ATTENTION_KINDS = {
    "canonical": "samebit.kernels.attention:CanonicalAttention",
}
"""Where each kind is, as "module:class"."""


def attention_kind(name: str) -> "type[AttentionKind]":
    """The kind of this name, one of ATTENTION_KINDS."""
    module, kind = ATTENTION_KINDS[name].split(":")
    return getattr(importlib.import_module(module), kind)
