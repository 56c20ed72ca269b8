"""What the engine's methods are given that concern its weights; a wrong one is a ValueError."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from samebit.rollout.values import as_integer, as_list, shown


def as_step(step: object) -> int:
    """A weight version's step. ValueError unless it is an integer of [0, 2^63)."""
    if not 0 <= (number := as_integer(step, "step")) < 1 << 63:
        raise ValueError(f"step is {number}; it must be at least 0, and below 2^63")
    return number


def as_tensors(params: object, what: str = "params") -> Mapping[str, Tensor]:
    """Tensors by engine names. ValueError for anything else, and for those that are not dense."""
    if not isinstance(params, Mapping):
        raise ValueError(f"{what} is {shown(params)}; give a mapping of engine names to tensors")
    for name, value in params.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{what} has {shown(name)}: {shown(value)}; give names and tensors")
        _require_dense(name, value)
    return params


def _require_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name} is {kind} on {tensor.device}; give a dense tensor")


def as_names(names: object) -> list[str]:
    """Hugging Face names, in a list."""
    found = as_list(names, "names", "a list of Hugging Face names")
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"names has {shown(name)}; give Hugging Face names")
    return found


def as_shapes(shapes: object) -> list[tuple[int, ...]]:
    """Shapes, in a list."""
    found = as_list(shapes, "shapes", "a list of shapes")
    return [
        tuple(as_integer(n, "shapes") for n in as_list(shape, "shapes", "a list of shapes"))
        for shape in found
    ]


def as_pairs(named: object) -> list[tuple[str, Tensor]]:
    """Hugging Face names with their tensors."""
    if isinstance(named, Mapping) or not isinstance(named, Iterable):
        raise ValueError(
            "update_weights_from_tensor takes (Hugging Face name, tensor) pairs; a mapping of "
            "engine names is for copy_weights"
        )
    pairs = list(named)
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and _fits(pair)):
            raise ValueError(f"named_tensors has {shown(pair)}; give (name, tensor) pairs")
        _require_dense(*pair)
    return pairs


def _fits(pair: Sequence[object]) -> bool:
    return len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)


def require_plain(load_format: str | None) -> None:
    """SGLang has formats of which none is here."""
    if load_format is not None:
        raise ValueError(f"load_format '{load_format}' is unknown; there is none but None")
