"""samebit export: a training checkpoint as a Hugging Face folder."""

from pathlib import Path

import torch

from samebit.recipes.compose import ConfigError
from samebit.recipes.config import ExportRun
from samebit.recipes.side_files import side_files
from samebit.rollout.models.decoder import param_specs
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from samebit.trainer.megatron.resharding import WholeState
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.transports.file import VERSION_FILE, write_hf_folder
from samebit.weight_sync.types import WeightVersion


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, the newest of a checkpoints folder, or the newest of a run."""
    found = (
        read_checkpoint(path) or latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
    )
    if found is None:
        raise ConfigError(f"checkpoint={path}: no whole checkpoint there")
    return found


def write_model(checkpoint: Checkpoint, model_path: Path, out: Path) -> WeightVersion:
    """Put the shards of all ranks together and write them as a Hugging Face folder.

    model_path is the folder that the run started from. Raises ConfigError for another model.
    """
    model = load_model_config(model_path)
    specs = param_specs(model)
    try:
        saved = WholeState(model, checkpoint.load_all())
    except ValueError as error:
        raise ConfigError(f"{checkpoint.path}, model={model_path}: {error}") from error
    dtype = next(iter(saved.first["params"].values())).dtype
    params = {spec.name: torch.empty(spec.shape, dtype=dtype) for spec in specs}
    saved.fill("params", specs, params)
    version = WeightVersion(saved.first["step"], weights_digest(specs, params))
    write_hf_folder(out, specs, params, version, side_files(model_path))
    return version


def _require_replaceable(out: Path, model_path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise ConfigError(f"out={out} is not empty; give another folder or overwrite=true")
    if not (out / VERSION_FILE).exists():
        raise ConfigError(
            f"out={out} holds no {VERSION_FILE}: no export made it, so overwrite=true removes "
            "nothing"
        )
    if out.resolve() == model_path.resolve():
        raise ConfigError(f"out={out} is model={model_path}; give another folder")


def main(run: ExportRun) -> int:
    """The command `samebit export`."""
    checkpoint, model_path, out = (
        find_checkpoint(Path(run.checkpoint)),
        Path(run.model),
        Path(run.out),
    )
    if out.exists() and any(out.iterdir()):
        _require_replaceable(out, model_path, run.overwrite)
    version = write_model(checkpoint, model_path, out)
    print(f"{checkpoint.path} -> {out}: weights of step {version.step}, digest {version.digest}")
    return 0
