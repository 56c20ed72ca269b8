"""samebit export: a training checkpoint as a Hugging Face folder."""

from pathlib import Path

import torch

from samebit.recipes.compose import ConfigError
from samebit.recipes.config import ExportRun
from samebit.recipes.side_files import side_files
from samebit.rollout.models.decoder import param_specs
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from samebit.trainer.megatron.resharding import WholeState
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.transports.file import write_hf_folder
from samebit.weight_sync.types import WeightVersion


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, the newest of a checkpoints folder, or the newest of a run."""
    exact = [c for c in list_checkpoints(path.parent) if c.path == path]
    found = (
        exact[0] if exact else latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
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


def main(run: ExportRun) -> int:
    """The command `samebit export`."""
    checkpoint, model_path, out = (
        find_checkpoint(Path(run.checkpoint)),
        Path(run.model),
        Path(run.out),
    )
    if out.exists() and any(out.iterdir()) and not run.overwrite:
        raise ConfigError(f"out={out} is not empty; give another folder or overwrite=true")
    version = write_model(checkpoint, model_path, out)
    print(f"{checkpoint.path} -> {out}: weights of step {version.step}, digest {version.digest}")
    return 0
