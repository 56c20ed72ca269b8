"""The attention kinds by name. No torch here: recipes check names before they import it."""

from typing import TYPE_CHECKING

from samebit.kernels.named import import_class

if TYPE_CHECKING:
    from samebit.kernels.attention_kind import AttentionKind

ATTENTION_KINDS = {
    "canonical": "samebit.kernels.attention:CanonicalAttention",
}
"""Where each kind is, as "module:class"."""


def attention_kind(name: str) -> "type[AttentionKind]":
    """The kind of this name, or one named as module:Class; ValueError for none."""
    from samebit.kernels.attention_kind import AttentionKind

    return import_class(ATTENTION_KINDS.get(name, name), "numerics.attention", AttentionKind)
