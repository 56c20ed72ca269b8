"""What the engine's methods are given that concern its weights; a wrong one is a ValueError."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from samebit.rollout.values import as_integer, as_list, shown
from samebit.weight_sync.buckets import view_as

_FLATTENED = "flattened_bucket"


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


def as_weight_version(version: object) -> int | None:
    """The step that SGLang's weight_version says, a number or its text; None if it says none."""
    if version is None:
        return None
    if isinstance(version, str) and version.isdecimal() and version.isascii():
        return as_step(int(version))
    try:
        return as_step(version)
    except ValueError:
        raise ValueError(
            f"weight_version is {shown(version)}; it must be the step, as 12 or '12', or unset"
        ) from None


def as_pairs(named: object, is_flattened: bool = False) -> list[tuple[str, Tensor]]:
    """Hugging Face names with their tensors. is_flattened: those of a flattened bucket."""
    if is_flattened:
        return _parts(named)
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


def is_flattened(load_format: object) -> bool:
    """Whether tensors come in one flat buffer; SGLang has formats that are not here."""
    if load_format not in (None, _FLATTENED):
        raise ValueError(
            f"load_format {shown(load_format)} is unknown; use one of None, '{_FLATTENED}'"
        )
    return load_format is not None


def _parts(bucket: object) -> list[tuple[str, Tensor]]:
    """The tensors of a flattened bucket, by their names."""
    if not (isinstance(bucket, Mapping) and {"flattened_tensor", "metadata"} <= bucket.keys()):
        raise ValueError(
            f"named_tensors is {shown(bucket)}; with load_format '{_FLATTENED}' give a mapping of "
            "'flattened_tensor' and 'metadata', not serialized"
        )
    flat = bucket["flattened_tensor"]
    if not (isinstance(flat, Tensor) and flat.dim() == 1):
        raise ValueError(f"flattened_tensor is {shown(flat)}; give one tensor of one dimension")
    _require_dense("flattened_tensor", flat)
    parts = as_list(bucket["metadata"], "metadata", "a list of what each tensor is")
    return [_part(flat, part) for part in parts]


def _part(flat: Tensor, meta: object) -> tuple[str, Tensor]:
    try:
        name, shape, dtype = meta.name, tuple(meta.shape), meta.dtype  # type: ignore[attr-defined]
        start, end = meta.start_idx, meta.end_idx  # type: ignore[attr-defined]
    except AttributeError as error:
        raise ValueError(f"metadata has {shown(meta)}: {error}") from None
    if not (isinstance(name, str) and isinstance(dtype, torch.dtype)):
        raise ValueError(f"metadata has {shown(meta)}; name has to be a text, dtype torch's")
    whole = torch.Size(shape).numel() * dtype.itemsize
    if not 0 <= start <= end <= len(flat) or (end - start) * flat.itemsize != whole:
        raise ValueError(
            f"metadata has {name} from {start} to {end} of {len(flat)} {flat.dtype}, and {shape} "
            f"{dtype} are {whole} bytes"
        )
    return name, view_as(flat[start:end], dtype).view(shape)
