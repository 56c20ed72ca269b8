"""file: a Hugging Face safetensors folder with its version, for recovery, export and tests.

The folder is written aside and renamed, so one that is there is whole; see weight_sync/folders.py.
Modes of files and folders follow the umask.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from samebit.weight_sync.folders import MARKER, read_marker, replacing
from samebit.weight_sync.mapping import ParamSpec, hf_tensors, unequal_shapes
from samebit.weight_sync.transports.base import Transport, WeightSource
from samebit.weight_sync.types import WeightSyncError, WeightVersion

VERSION_FILE = "weight_version.json"


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file with the mode of any new file; safetensors makes private ones."""
    from safetensors.torch import save_file

    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write named tensors as one file, or as shards with an index if they exceed the limit."""
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_bytes)
    for file_name, names in split.filename_to_tensors.items():
        save_tensors({name: state[name] for name in names}, folder / file_name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def is_export(folder: Path) -> bool:
    """Whether we wrote this Hugging Face folder: it has our marker, or at least a version."""
    marked = (read_marker(folder) or {}).get("kind") == "model"
    return marked or (folder / VERSION_FILE).is_file()


def require_replaceable(folder: Path) -> None:
    """FileExistsError unless the folder is one of ours, empty or absent."""
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not is_export(folder):
        raise FileExistsError(
            f"{folder} holds no {MARKER} of an export and no {VERSION_FILE}: no export made it, so "
            "nothing there is replaced; give another folder"
        )


def write_weights(
    folder: Path,
    specs: Sequence[ParamSpec],
    params: Mapping[str, Tensor],
    version: WeightVersion,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write the weights and their version into a folder."""
    write_safetensors(folder, hf_tensors(specs, params), max_shard_bytes)
    (folder / VERSION_FILE).write_text(json.dumps(vars(version)))


def write_hf_folder(
    folder: Path,
    specs: Sequence[ParamSpec],
    params: Mapping[str, Tensor],
    version: WeightVersion,
    side_files: Iterable[Path] = (),
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write weights, `side_files` (config, tokenizer) and the version; replaces `folder`.

    Raises FileExistsError for a `folder` that is not ours.
    """
    require_replaceable(folder)
    with replacing(folder) as new:
        write_weights(new, specs, params, version, max_shard_bytes)
        for file in side_files:
            shutil.copyfile(file, new / file.name)


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


class FileTransport(Transport):
    """Writes each version to `folder` and lets `load` (an engine's update from disk) read it.

    The folder stays when it is closed: it is the recovery copy.
    """

    def __init__(
        self, folder: Path, specs: Sequence[ParamSpec], load: Callable[[Path], WeightVersion]
    ) -> None:
        self._folder, self._specs, self._load = folder, specs, load
        self._step = 0
        self._params: Mapping[str, Tensor] = {}

    @classmethod
    def between(cls, source: WeightSource, engine: Any, folder: Path) -> Self:
        """Write what a trainer's one process holds, which is all; the engine may be anywhere."""
        return cls(folder, source.specs, engine.update_weights_from_disk)

    def begin(self, step: int) -> None:
        self._step = step

    def send(self, params: Mapping[str, Tensor]) -> None:
        """Remember what to write: the version file needs the digest, known at commit.

        Raises WeightSyncError if names or shapes are not the receiver's.
        """
        if names := unequal_shapes(self._specs, params):
            what = ", ".join(sorted(names)[:5])
            raise WeightSyncError(f"tensors do not fit the receiver: {what}")
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
        """Do nothing: nothing was handed over yet."""
