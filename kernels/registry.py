"""The attention kinds by name. No torch here: recipes check names before they import it."""

from typing import TYPE_CHECKING

from samebit.kernels.named import import_class

if TYPE_CHECKING:
    from samebit.kernels.attention_kind import AttentionKind

ATTENTION_KINDS = {
    "canonical": "samebit.kernels.attention:CanonicalAttention",
    "flashinfer": "samebit.kernels.flashinfer:FlashInferAttention",
}
"""Where each kind is, as "module:class"."""


def attention_kind(name: str) -> "type[AttentionKind]":
    """The kind of this name, or one named as module:Class; ValueError for none."""
    from samebit.kernels.attention_kind import AttentionKind

    found = import_class(ATTENTION_KINDS.get(name, name), "numerics.attention", AttentionKind)
    if name not in ATTENTION_KINDS:
        named = isinstance(own := getattr(found, "name", None), str) and own not in ATTENTION_KINDS
        if not (named and hasattr(found, "is_invariant")):
            what = "its class must have is_invariant, and a name that no kind of samebit has"
            raise ValueError(f"numerics.attention is {name!r}; {what}")
    return found
