"""samebit export: a training checkpoint as a Hugging Face folder."""

from pathlib import Path

from samebit.recipes.config import ConfigError, ExportRun
from samebit.recipes.side_files import side_files
from samebit.rollout.models.decoder import param_specs
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
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


def main(run: ExportRun) -> int:
    """The command `samebit export`."""
    checkpoint, model_path, out = (
        find_checkpoint(Path(run.checkpoint)),
        Path(run.model),
        Path(run.out),
    )
    if out.exists() and any(out.iterdir()) and not run.overwrite:
        raise ConfigError(f"out={out} is not empty; give another folder or overwrite=true")
    specs = param_specs(load_model_config(model_path))
    state = checkpoint.load()
    found = {name: tuple(p.shape) for name, p in state["params"].items()}
    if found != {spec.name: spec.shape for spec in specs}:
        raise ConfigError(f"{checkpoint.path} holds another model than model={model_path}")
    version = WeightVersion(state["step"], weights_digest(specs, state["params"]))
    write_hf_folder(out, specs, state["params"], version, side_files(model_path))
    print(f"{checkpoint.path} -> {out}: weights of step {version.step}, digest {version.digest}")
    return 0
