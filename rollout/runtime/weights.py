"""Weights from disk: safetensors folders, or seeded random values where there is only a config."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from samebit.rollout.runtime.weight_files import (
    IGNORED_SUFFIXES,
    WeightLoadError,
    find_tensors,
    open_file,
)
from samebit.weight_sync.mapping import (
    Index,
    ParamSpec,
    Read,
    hf_parts,
    hf_shapes,
    load_params,
    parts_of,
)
from samebit.weight_sync.session import non_finite

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Which are one where a model ties them; some folders and trainers have both nevertheless."""
_READERS = 4  # threads
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def load_safetensors(
    folder: Path,
    specs: Sequence[ParamSpec],
    params: Mapping[str, Tensor],
    whole: Sequence[ParamSpec] | None = None,
) -> None:
    """Fill params in place from a Hugging Face folder, sharded or not; no other bytes are read.

    whole: all that the folder must hold, where `specs` are one pipeline stage's.
    Raises as open_safetensors does before anything is written, and WeightLoadError for NaN or Inf.
    """
    fill(folder, specs, params, open_safetensors(folder, whole or specs))


def fill(
    folder: Path, specs: Sequence[ParamSpec], params: Mapping[str, Tensor], read: Read
) -> None:
    """Fill params in place by a reader of `folder`; WeightLoadError for NaN or Inf."""
    device = params[specs[0].name].device
    with read_ahead(read, hf_parts(specs), pin=device.type == "cuda") as reader:
        load_params(specs, params, reader)
    if bad := non_finite(params):
        raise WeightLoadError(f"{folder} holds NaN or Inf in: {', '.join(bad)}")


@contextmanager
def read_ahead(read: Read, parts: Sequence[tuple[str, Index]], pin: bool) -> Iterator[Read]:
    """A reader that fetches the next parts on threads while the present one is used.

    parts: the order of reading. pin: copies go through page-locked memory, so that the device takes
    them at full speed. A bar shows the progress of what takes more than a second.
    """

    def fetch(name: str, index: Index) -> Tensor:
        tensor = read(name, index)
        if not pin:
            return tensor
        # pin_memory() would keep the gaps between columns.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    waiting: dict[tuple[str, Index], Future[Tensor]] = {}
    upcoming = iter(parts)
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=len(parts), desc="weights", unit=" tensors", delay=1, leave=False) as bar,
    ):

        def next_one(name: str, index: Index) -> Tensor:
            for coming in itertools.islice(upcoming, 1 if waiting else 2 * _READERS):
                waiting[coming] = pool.submit(fetch, *coming)
            bar.update()
            part = name, index
            return waiting.pop(part).result() if part in waiting else fetch(*part)

        yield next_one


def open_safetensors(folder: Path, specs: Sequence[ParamSpec]) -> Read:
    """A reader of a folder that fits the specs; what it gives lies in the mapped file.

    Only the files' headers are read before. Raises as find_tensors does, and WeightLoadError that
    lists every missing, extra or misshapen tensor and those of a dtype that is not read.
    """
    file_of = find_tensors(folder)
    shapes = hf_shapes(specs)
    handles = {f: open_file(f) for f in sorted(set(file_of.values()))}
    tied = {HEAD} - set(shapes)
    extra = {n for n in set(file_of) - set(shapes) - tied if not n.endswith(IGNORED_SUFFIXES)}
    problems = [f"missing: {name}" for name in sorted(set(shapes) - set(file_of))]
    problems += [f"extra: {name}" for name in sorted(extra)]
    for name in sorted(set(shapes) & set(file_of)):
        tensor = handles[file_of[name]].get_slice(name)
        found, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if found != shapes[name]:
            problems.append(f"shape of {name}: {found} in the file, {shapes[name]} in the config")
        if dtype not in _DTYPES:
            problems.append(
                f"dtype of {name}: {dtype} in {file_of[name].name}; read are "
                f"{', '.join(_DTYPES.values())}"
            )
    if problems:
        raise WeightLoadError(f"{folder} does not fit the model:\n  " + "\n  ".join(problems))
    _check_tied(tied & set(file_of), handles, file_of)
    return lambda name, index: handles[file_of[name]].get_slice(name)[index]


def _check_tied(names: set[str], handles: Mapping, file_of: Mapping[str, Path]) -> None:
    for name in names:
        head = handles[file_of[name]].get_tensor(name)
        if not torch.equal(head, handles[file_of[EMBEDDING]].get_tensor(EMBEDDING)):
            raise WeightLoadError(
                f"config.json says tie_word_embeddings, but {name} differs from {EMBEDDING}"
            )


def load_dummy(
    specs: Sequence[ParamSpec], params: Mapping[str, Tensor], seed: int, std: float = 0.02
) -> None:
    """Fill params with N(0, std), norms with ones; each tensor by its own seed and name."""
    shapes = hf_shapes(specs)
    device = params[specs[0].name].device

    def draw(name: str) -> Tensor:
        if "norm." in name:
            return torch.ones(shapes[name], device=device)
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(key[:7]))
        return torch.randn(shapes[name], generator=generator, device=device) * std

    load_params(specs, params, parts_of(draw))
