"""file: a Hugging Face safetensors folder with its version, for recovery, export and tests.

The folder is written under a temporary name and renamed, and the version file comes last, so a
folder with a version file is whole. The folder it replaces is moved aside first and deleted last.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from samebit.weight_sync.mapping import ParamSpec, hf_tensors
from samebit.weight_sync.types import WeightSyncError, WeightVersion

VERSION_FILE = "weight_version.json"


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int
) -> None:
    """Write named tensors as one file, or as shards with an index if they exceed the limit."""
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size, total = size + num_bytes, total + num_bytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_hf_folder(
    folder: Path,
    specs: Sequence[ParamSpec],
    params: Mapping[str, torch.Tensor],
    version: WeightVersion,
    side_files: Iterable[Path] = (),
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write weights, `side_files` (config, tokenizer) and the version; replaces `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (folder.with_name(f".{folder.name}.{x}") for x in ("tmp", "old"))
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    write_safetensors(temporary, hf_tensors(specs, params), max_shard_bytes)
    for file in side_files:
        shutil.copy(file, temporary / file.name)
    (temporary / VERSION_FILE).write_text(json.dumps(vars(version)))
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def read_version(folder: Path) -> WeightVersion | None:
    """The version of a folder that write_hf_folder wrote; None for any other folder.

    Raises ValueError for a file of that name which holds something else.
    """
    file = folder / VERSION_FILE
    if not file.exists():
        return None
    try:
        return WeightVersion(**json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold the weights' step and digest: {error}") from None


class FileTransport:
    """Writes each version to `folder` and lets `load` (an engine's update from disk) read it."""

    def __init__(
        self,
        folder: Path,
        specs: Sequence[ParamSpec],
        load: Callable[[Path], WeightVersion],
    ) -> None:
        self._folder, self._specs, self._load = folder, specs, load
        self._step = 0
        self._params: Mapping[str, torch.Tensor] = {}

    def begin(self, step: int) -> None:
        """Remember the step; the receiver goes on serving until commit."""
        self._step = step

    def send(self, params: Mapping[str, torch.Tensor]) -> None:
        """Remember what to write: the version file needs the digest, known at commit."""
        self._params = params

    def commit(self, digest: str) -> WeightVersion:
        """Write the folder and have the receiver load and check it."""
        version = WeightVersion(self._step, digest)
        write_hf_folder(self._folder, self._specs, self._params, version)
        loaded = self._load(self._folder)
        if loaded != version:
            raise WeightSyncError(f"{self._folder}: wrote {version}, the receiver holds {loaded}")
        return version

    def abort(self, reason: str) -> None:
        """Nothing was handed over yet."""

    def close(self) -> None:
        """The folder stays: it is the recovery copy."""
