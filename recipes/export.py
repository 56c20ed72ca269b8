"""samebit export: a training checkpoint as a Hugging Face folder."""

import json
from pathlib import Path

import torch
from torch import Tensor

from samebit.recipes.config import ConfigError
from samebit.recipes.models.side_files import side_files, write_side_files
from samebit.recipes.run.folder import is_overwritten, require_outside
from samebit.recipes.tools_config import ExportRun
from samebit.rollout.models.config import GENERATES, RATES, ModelConfig
from samebit.rollout.models.registry import has_value_head, load_model_config
from samebit.trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    read_checkpoint,
)
from samebit.trainer.critic.value_model import value_model_of
from samebit.trainer.megatron.resharding import WholeState
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.folders import MARKER, replacing
from samebit.weight_sync.session import non_finite
from samebit.weight_sync.transports.file import (
    VERSION_FILE,
    is_export,
    require_replaceable,
    write_weights,
)
from samebit.weight_sync.types import WeightVersion


def find_checkpoint(path: Path) -> Checkpoint:
    """Find a checkpoint, the newest of a checkpoints folder, or the newest of a run."""
    found = (
        read_checkpoint(path) or latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
    )
    if found is None:
        raise ConfigError(f"checkpoint={path}: no whole checkpoint there")
    if found.manifest.get("command") == "eagle3":
        raise ConfigError(
            f"checkpoint={path} is a draft's, of samebit eagle3, which writes its own draft/ at "
            "the end of the run"
        )
    return found


def read_model(
    checkpoint: Checkpoint,
    model: ModelConfig,
    dtype: torch.dtype | None = None,
    part: str | None = None,
) -> tuple[WeightVersion, dict[str, Tensor], str]:
    """Put the shards of all ranks together; returns (version, parameters, where they come from).

    dtype: unset, that of the weights trained with. fp32 is read from AdamW's master weights, if
    there are any. part: "critic", of which `model` is one. Raises ValueError for another model, a
    part that the run did not have, and weights that the dtype cannot hold.
    """
    specs, states = model.param_specs(), list(checkpoint.load_all())
    if part is not None:
        if part not in states[0]:
            raise ValueError(f"the run has no {part}; give {part}=false")
        states = [state[part] for state in states]
    saved = WholeState(model, states)
    own = next(iter(saved.first["params"].values())).dtype
    dtype, source = dtype or own, "params"
    masters = any("master" in state for state in saved.first["optimizer"].values())
    if dtype == torch.float32 != own and masters:
        source = "master"
    params = {spec.name: torch.empty(spec.shape, dtype=dtype) for spec in specs}
    saved.fill(source, specs, params)
    if bad := non_finite(params):
        raise ValueError(f"dtype={_name(dtype)} cannot hold the numbers of {', '.join(bad[:5])}")
    origin = "the master weights" if source == "master" else f"{_name(own)} weights"
    version = WeightVersion(saved.first["step"], weights_digest(specs, params))
    return version, params, f"{_name(dtype)}, from {origin}"


def write_model(
    checkpoint: Checkpoint,
    model_path: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    critic: bool = False,
) -> tuple[WeightVersion, str]:
    """Write a checkpoint as a Hugging Face folder; returns its version and what its weights are.

    model_path is the folder that the run, or its critic, started from. Raises ConfigError for
    another model, FileExistsError for an `out` that is not ours.
    """
    require_replaceable(out)
    model = load_model_config(model_path, rates=critic and has_value_head(model_path))
    model = value_model_of(model) if critic else model
    try:
        part = "critic" if critic else None
        version, params, described = read_model(checkpoint, model, dtype, part)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.path}, model={model_path}: {error}") from error
    with replacing(out) as new:
        write_weights(new, model.param_specs(), params, version)
        write_side_files(model_path, new, next(iter(params.values())).dtype)
        if critic:
            _name_value_head(new / "config.json", model)
    return version, described


def _name_value_head(file: Path, model: ModelConfig) -> None:
    """Have a config.json say that the output layer beside it gives one label."""
    name = model.architecture.replace(GENERATES, RATES[0])
    head = {"architectures": [name], "id2label": {"0": "value"}, "label2id": {"value": 0}}
    config = json.loads(file.read_bytes()) | head
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_free(run: ExportRun, checkpoint: Checkpoint) -> None:
    """ConfigError if `out` holds what nothing says may be replaced, or what is to be read."""
    out, model_path = Path(run.out), Path(run.model)
    if not is_overwritten(out, run.overwrite):
        return
    if not is_export(out):
        raise ConfigError(
            f"out={out} holds no {MARKER} of an export and no {VERSION_FILE}: no export made it, "
            "so overwrite=true removes nothing"
        )
    if out.resolve() == model_path.resolve():
        raise ConfigError(f"out={out} is model={model_path}; give another folder")
    inputs = [("model", file) for file in side_files(model_path)]
    inputs += [("checkpoint", checkpoint.path / name) for name in checkpoint.manifest["files"]]
    require_outside(out, inputs, "which overwrite=true removes; give another out")


def main(run: ExportRun) -> int:
    """Run the command `samebit export`."""
    checkpoint, out = find_checkpoint(Path(run.checkpoint)), Path(run.out)
    rates = run.critic and has_value_head(run.model)
    load_model_config(run.model, run.model_family, rates)  # it is there
    _require_free(run, checkpoint)
    dtype = None if run.dtype == "auto" else getattr(torch, run.dtype)
    try:
        version, described = write_model(checkpoint, Path(run.model), out, dtype, run.critic)
    except (CheckpointError, OSError):
        gone = checkpoint
        checkpoint = find_checkpoint(Path(run.checkpoint))
        if checkpoint.step <= gone.step:
            raise
        # A run that works there has removed it meanwhile, after a newer one.
        version, described = write_model(checkpoint, Path(run.model), out, dtype, run.critic)
    print(
        f"{checkpoint.path} -> {out}: weights of step {version.step}, digest {version.digest}, "
        f"{described}"
    )
    return 0
