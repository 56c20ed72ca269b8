"""A draft model's folder: config.json and model.safetensors in one of two dialects, read strictly.

The engines that read such folders skip names they do not know, so a wrong one is a silent loss of
acceptance: here every tensor that is missing, unknown, or of another shape or dtype is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from samebit.rollout.models.draft import config as draft
from samebit.rollout.models.draft import sglang, speculators
from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.models.draft.layer_json import DTYPES
from samebit.rollout.models.draft.pickled import require_safetensors
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.models.json_file import JsonFile
from samebit.rollout.runtime.weight_files import SINGLE, WeightLoadError, find_tensors, open_file
from samebit.rollout.runtime.weights import fill
from samebit.weight_sync.folders import read_marker, replacing
from samebit.weight_sync.mapping import Read, hf_shapes, hf_tensors
from samebit.weight_sync.transports.file import require_replaceable, save_tensors

DIALECTS: dict[str, ModuleType] = {"sglang": sglang, "speculators": speculators}
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_VOCABULARY = {"d2t": "I64", "t2d": "BOOL"}
_MEANING = "norm_output"  # in our marker: whose the key of this name is


@dataclass(frozen=True)
class DraftFolder:
    """What a folder holds; its weights are read by `fill`."""

    path: Path
    dialect: str
    dtype: torch.dtype
    config: DraftConfig
    vocabulary: DraftVocabulary
    read: Read
    """Parts of its weights, by the names of config.param_specs' Hugging Face tensors."""
    norm_output: str | None = None
    """Whose meaning that key was said to have."""

    def fill(self, params: Mapping[str, Tensor]) -> None:
        """Fill params (of config.param_specs) in place, in their dtype; WeightLoadError for NaN or
        Inf."""
        fill(self.path, self.config.param_specs(), params, self.read)


def open_draft(
    folder: Path, num_target_layers: int | None = None, norm_output: str | None = None
) -> DraftFolder:
    """The draft of a folder, whose dialect its config.json tells.

    num_target_layers: of its target, for ids that must be layers of it and a draft that says none.
    norm_output: whose meaning that key has, "sglang" or "specforge", in a folder of the sglang
    dialect that is not ours. Raises FileNotFoundError for what is missing, ValueError that
    names file and key for what is wrong, ambiguous or not computed here, and WeightLoadError that
    lists every tensor that is missing, unknown or of another shape or dtype.
    """
    require_safetensors(folder)
    if norm_output not in (None, *sglang.NORM_OUTPUT):
        raise ValueError(f"norm_output is {norm_output!r}; it must be sglang, specforge or unset")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"draft folder {folder} has no config.json")
    written = JsonFile.read(folder / "config.json")
    files = find_tensors(folder)
    handles = {file: open_file(file) for file in sorted(set(files.values()))}
    dialect = "speculators" if speculators.TYPE_KEY in written.values else "sglang"
    meaning = norm_output or (read_marker(folder) or {}).get(_MEANING)
    owns = draft.HF_EMBEDDING in files
    config = DIALECTS[dialect].read(written, owns, num_target_layers, meaning)
    places = {_plain(name, dialect): (handles[file], name) for name, file in files.items()}
    dtype = _require_fit(written, config, places, dialect)
    vocabulary = DraftVocabulary.whole(config.vocab_size)
    if "d2t" in places:
        d2t, t2d = (places[name][0].get_tensor(name) for name in _VOCABULARY)
        try:
            vocabulary = DraftVocabulary.from_tensors(d2t, t2d)
        except ValueError as error:
            raise WeightLoadError(f"{folder}: {error}") from None

    def read(name: str, index: Any) -> Tensor:
        handle, own = places[name]
        if name == draft.HF_MASK:
            return handle.get_tensor(own).flatten()[index]
        return handle.get_slice(own)[index]

    return DraftFolder(folder, dialect, dtype, config, vocabulary, read, norm_output)


def write_draft(
    folder: Path,
    config: DraftConfig,
    vocabulary: DraftVocabulary,
    params: Mapping[str, Tensor],
    dialect: str = "sglang",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a draft as a folder of a dialect, replacing an earlier one of ours as a whole.

    params: whole ones of config.param_specs; dtype: what they are rounded to, if not their own.
    Raises ValueError for what the dialect cannot say, FileExistsError for a folder that is not
    ours.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect is {dialect!r}; it must be one of {', '.join(DIALECTS)}")
    size = (len(vocabulary), vocabulary.vocab_size)
    if size != (config.draft_vocab_size, config.vocab_size):
        raise ValueError(
            f"a vocabulary of {size[0]} of {size[1]} tokens for a draft of "
            f"{config.draft_vocab_size} of {config.vocab_size}"
        )
    dtype = dtype or params[draft.OUTPUT].dtype
    keys = DIALECTS[dialect].write(config, str(dtype).removeprefix("torch."))
    tensors = {
        _spelled(name, dialect): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in hf_tensors(config.param_specs(), params)
    }
    if draft.HF_MASK in tensors:
        tensors[draft.HF_MASK] = tensors[draft.HF_MASK].view(_mask_shape(config))
    tensors |= {"d2t": vocabulary.d2t.contiguous(), "t2d": vocabulary.t2d}
    meaning = {_MEANING: "sglang"} if dialect == "sglang" and config.feeds_normed else {}
    require_replaceable(folder)
    with replacing(folder, **meaning) as new:
        save_tensors(tensors, new / SINGLE)
        (new / "config.json").write_text(json.dumps(keys, indent=2) + "\n")


def _mask_shape(config: DraftConfig) -> tuple[int, int, int]:
    """As speculators keeps it: of one sample's one token."""
    return (1, 1, config.num_features)


def _spelled(name: str, dialect: str) -> str:
    """A Hugging Face name of the specs, in a dialect."""
    prefix = DIALECTS[dialect].LAYER
    own = name.startswith(draft.HF_LAYER)
    return prefix + name.removeprefix(draft.HF_LAYER) if own else name


def _plain(name: str, dialect: str) -> str:
    """The name of the specs. One that another dialect would spell so is none."""
    prefix = DIALECTS[dialect].LAYER
    if name.startswith(prefix):
        return draft.HF_LAYER + name.removeprefix(prefix)
    return f"{name} (of another dialect)" if name.startswith(draft.HF_LAYER) else name


def _require_fit(
    written: JsonFile, config: DraftConfig, places: Mapping[str, Any], dialect: str
) -> torch.dtype:
    """The dtype of all weights."""
    shapes = hf_shapes(config.param_specs())
    shapes |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    if config.is_block:
        shapes[draft.HF_MASK] = _mask_shape(config)
    unnamed = config.draft_vocab_size == config.vocab_size and not set(_VOCABULARY) & set(places)
    wanted = set(shapes) - set(_VOCABULARY) if unnamed else set(shapes)
    dtype = _said_dtype(written) or _dtype_of(places, "lm_head.weight")
    problems = [f"missing: {_spelled(name, dialect)}" for name in sorted(wanted - set(places))]
    problems += [f"unknown: {name}" for name in sorted(set(places) - wanted)]
    for name in sorted(wanted & set(places)):
        handle, own = places[name]
        tensor = handle.get_slice(own)
        shape, found = tuple(tensor.get_shape()), tensor.get_dtype()
        if shape != shapes[name]:
            problems.append(f"shape of {own}: {shape} in the file, {shapes[name]} by config.json")
        right = _VOCABULARY.get(name)
        if right is not None and found != right:
            problems.append(f"dtype of {own}: {found}; it must be {right}")
        elif right is None and _DTYPES.get(found) != dtype:
            problems.append(f"dtype of {own}: {found}; it must be {dtype} as all others")
    if problems:
        raise WeightLoadError(
            f"{written.path.parent} does not fit its config.json ({dialect} dialect):\n  "
            + "\n  ".join(problems)
        )
    return getattr(torch, dtype)


def _said_dtype(written: JsonFile) -> str | None:
    inner = written.get("transformer_layer_config")
    said = [*(written.get(key) for key in DTYPES)]
    said += [inner.get(key) for key in DTYPES] if isinstance(inner, dict) else []
    return next((name for name in said if name is not None), None)


def _dtype_of(places: Mapping[str, Any], name: str) -> str:
    if name not in places:
        return "float32"  # it is missing, which is said
    handle, own = places[name]
    found = handle.get_slice(own).get_dtype()
    return _DTYPES.get(found, "float32, bfloat16 or float16")
