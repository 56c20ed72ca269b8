"""What a checkpoint is bound to: its run's configuration and the contents of what the run reads.

All of it stands readable in the manifest, so that a refused resume names each key with both values.
Paths are not among it: a file that was moved or renamed is no difference, one that was edited is.
"""

import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from samebit.kernels.profile import NumericsProfile
from samebit.recipes.config import GrpoRun, RunSection
from samebit.recipes.data.tasks.base import DataConfig, Dataset, Problem
from samebit.recipes.eagle3_config import Eagle3Run, TrainingRun
from samebit.recipes.models.side_files import tokenizer_files
from samebit.recipes.run.input_files import flatten, other_models, own_sources
from samebit.recipes.run.provenance import device_name
from samebit.recipes.run.secrets import to_dict
from samebit.rollout.device import resolve_device
from samebit.rollout.models.registry import load_model_config
from samebit.trainer.checkpoint import Checkpoint, CheckpointError
from samebit.trainer.config import GrpoConfig, ParallelConfig
from samebit.trainer.critic.config import CriticLayout

FORMAT = 2
"""Of the manifests that runs write. In format 1 digests of paths stood for contents."""

# Keys that a resumed run may change: none of them can change a result but reshard, which asks to.
# The attention of numerics is bound as a part of the profile.
_FREE_KEYS = {
    "resume", "reshard", "overwrite", "dry_run", "max_restarts", "run_name", "output_dir", "device",
    "placement", "engine", "distillation.engine", "logger", "numerics.attention",
    "rollout.generate_timeout_s",
    *(f"reward.{terms}{key}" for terms in ("", "terms.")
      for key in ("timeout_s", "num_workers", "concurrency")),
    "trainer.checkpoint_every", "trainer.keep_checkpoints", "trainer.background_checkpoints",
    *(f"{section}.parallel.{key}" for section in ("trainer", "critic")
      for key in ("recompute", "offload_optimizer", "offload_segment_sums", "offload_reference")),
}  # fmt: skip
_PATHS = re.compile(
    r"(model|draft|data(\.sources\.\d+)?)\.path|data\.(sources\.\d+\.)?eval_path"
    r"|critic\.model|distillation\.teacher"
)
_LAYOUTS = "trainer.parallel.", "critic.parallel."
_ELASTIC = ("data",)  # what moves no bit with numerics.grad_segments
_SAMPLED = 16  # problems of a generated task: with its arguments they stand for all
_SPREAD = 1024  # about so many, evenly, of a user's own dataset that makes them on demand
_ABSENT = "absent"
_EARLIER = {
    "model_family": None,
    "trainer.loss_mean_tokens": None,
    "numerics.grad_segments": 0,
    "reward.batch_size": None,
    "reward.normalize": "none",
    "reward.clip": 0.0,
    "data.tools_key": None,
    "data.filter": None,
    "data.few_shot": 0,
    "rollout.dynamic_sampling": False,
    "rollout.refill_prompts": None,
    "rollout.generate": None,
    "rollout.too_few_groups": "error",
    "rollout.max_staleness": 0,
    "rollout.check_stale": True,
    "rollout.weight_sync_steps": 1,
    "rollout.partial_tokens": None,
    "rollout.logprobs": "full",
    "algorithm.loss_top_k": 0,
    **{f"algorithm.{f.name}": f.default for f in fields(GrpoConfig)},
}
"""Keys that manifests of version 0.1 may lack, and what runs did then."""


def binding_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every key of a resolved configuration that a result depends on; a critic's layout with
    what it takes from its policy's."""
    kept = _without_free_keys(config)
    if "critic" in kept:
        own = {k: v for k, v in kept["critic"].get("parallel", {}).items() if v is not None}
        kept["critic"]["parallel"] = kept["trainer"]["parallel"] | own
    train = kept.get("draft", {}).get("train")
    if train == "off":  # nothing reads them
        del kept["draft"], kept["ttt"]
    elif train == "online":
        kept["ttt"].pop("eval_passes", None)  # no held-out answers are looked at
        kept["engine"] = {"draft_norm_output": config["engine"]["draft_norm_output"]}
    schedules = [kept["trainer"]["optimizer"]["lr_schedule"]]
    learners = ["critic", *(["draft"] if train == "online" else [])]
    schedules += [kept[key]["optimizer"]["lr_schedule"] for key in learners if key in kept]
    ahead = kept.get("rollout", {}).get("max_staleness")
    if set(schedules) == {"constant"} and not ahead:
        del kept["trainer"]["num_steps"]  # a run may be made longer
    # Where it is reached nothing is trained; of a generated task it says what is prepared.
    if kept.get("rollout", {}).get("too_few_groups") == "error" and kept["data"]["task"] == "file":
        del kept["rollout"]["max_refills"]
    return kept


def _without_free_keys(values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    def bound(value: Any, key: str) -> Any:
        if isinstance(value, list) and all(isinstance(x, Mapping) for x in value):
            return [_without_free_keys(x, f"{key}.") for x in value]
        return _without_free_keys(value, f"{key}.") if isinstance(value, Mapping) else value

    return {
        k: bound(v, f"{section}{k}") for k, v in values.items() if f"{section}{k}" not in _FREE_KEYS
    }


def binding_layout(run: TrainingRun) -> dict[str, Any]:
    """Return every key of trainer.parallel that bits or a checkpoint's files depend on, and those
    of a critic's layout, which begin with critic.parallel."""
    config = binding_config(to_dict(run))
    layout: dict[str, Any] = config["trainer"]["parallel"]
    return layout | _of_critic(config["critic"]["parallel"] if "critic" in config else {})


def saved_layout(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `binding_layout` gave when a checkpoint was written: in manifests of version 0.1
    that do not say it a critic's layout was its policy's."""
    layout = checkpoint.manifest["parallel"]
    own = {key: value for key, value in layout.items() if not key.startswith(CriticLayout.key)}
    return _of_critic(own) | layout


def _of_critic(layout: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{CriticLayout.key}.{key}": value for key, value in layout.items()}


def bound_keys(run: RunSection) -> dict[str, Any]:
    """Return, by dotted name, every key that a result depends on, but layout and paths.

    A value from the environment stands as its reference and a digest.
    """
    shown, real = (flatten(binding_config(to_dict(run, shown=x))) for x in (True, False))
    return {
        key: value if value == real[key] else f"{value} ({digest(str(real[key]).encode())})"
        for key, value in shown.items()
        if not _PATHS.fullmatch(key) and not key.startswith(_LAYOUTS)
    }


def bindings(run: TrainingRun, command: str, records: Mapping[str, Dataset]) -> dict[str, Any]:
    """Return what a run's checkpoints are bound to, as manifests say it; records by their name."""
    found = {
        "format": FORMAT,
        "command": command,
        "config": bound_keys(run),
        "model": flatten(asdict(load_model_config(run.model.path))),
        "contents": dict(_contents(run, records)),
        **_sources(run),
        "card": card_of(run),
    }
    return json.loads(json.dumps(found, default=str))


def _contents(run: TrainingRun, records: Mapping[str, Dataset]) -> Iterator[tuple[str, str]]:
    """Digests of the tokenizer's files and of the problems, by what they are."""
    for name, file in tokenizer_files(Path(run.model.path)).items():
        yield f"model.path/{name}", digest(file.read_bytes())
    if isinstance(run, Eagle3Run) and run.draft.path is not None:  # its weights are the state's
        yield "draft.path/config.json", digest((Path(run.draft.path) / "config.json").read_bytes())
    if isinstance(run, GrpoRun) and run.draft.is_online and run.engine.draft_model is not None:
        config = Path(run.engine.draft_model) / "config.json"
        yield "engine.draft_model/config.json", digest(config.read_bytes())
    for key, folder in other_models(run).items():
        yield f"{key}/config.json", digest((folder / "config.json").read_bytes())
    for name, problems in records.items():
        yield name, records_digest(problems, run.data)
    if run.data.task.startswith("reasoning_gym/"):
        yield "package reasoning_gym", importlib.metadata.version("reasoning_gym")


def _sources(run: TrainingRun) -> dict[str, str | None]:
    """Digests of the files of what is the user's own."""
    return {
        _source_name(key): digest(file.read_bytes()) if file and file.is_file() else None
        for key, file in own_sources(run).items()
    }


def _source_name(key: str) -> str:
    """What manifests call the source of a key's function."""
    section = key.rpartition(".")[0] if key.startswith("reward.terms") else key.partition(".")[0]
    return f"{section.replace('.', '_')}_source"


def card_of(run: TrainingRun) -> str | None:
    """Return the GPU's name, by which cuBLAS chooses the backward's products; None on a CPU."""
    device = resolve_device(run.device)
    return device_name(device) if device.type == "cuda" else None


def digest(*parts: bytes) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def records_digest(problems: Dataset, config: DataConfig) -> str:
    """Return the number and a digest of prompts, answers, metadata and tools, in order.

    Of generated problems the first ones: the configuration and those say what the others are. Not
    so of a user's list, nor of a user's dataset, of which some are taken from all over it.
    """
    count, own = len(problems), ":" in config.task
    listed = own and isinstance(getattr(problems, "dataset", problems), list)
    read = range(count if listed or config.task == "file" else min(count, _SAMPLED))
    if own and not listed:
        read = range(0, count, max(1, count // _SPREAD))
    rows = (problems[i] for i in read)
    encode = json.JSONEncoder(sort_keys=True, default=repr).encode
    texts = (encode([p.prompt, p.label, p.metadata, *_told_besides(p)]) for p in rows)
    return f"{count} x {digest('\n'.join(texts).encode())}"


def _told_besides(problem: Problem) -> list[str]:
    """The rejected answer, if there is one; tools and calls, if there are any, in one text:
    templates write their keys in order."""
    rejected = [f"rejected {problem.rejected}"] if problem.rejected else []
    prompt = [] if isinstance(problem.prompt, str) else problem.prompt
    calls = [message["tool_calls"] for message in prompt if "tool_calls" in message]
    told = [json.dumps([problem.tools, calls], default=repr)] if problem.tools or calls else []
    return rejected + told


def require_same(
    checkpoint: Checkpoint, run: TrainingRun, here: Mapping[str, Any], profile: NumericsProfile
) -> None:
    """Raise CheckpointError, naming all keys with both values, unless the run may go on there.

    here: the run's `bindings`. A user's reward or another source may have been edited and the card
    may be another of its profile, which is said.
    """
    there = checkpoint.manifest
    if there.get("format", 1) != FORMAT:
        raise CheckpointError(
            f"{checkpoint.path} has the format {there.get('format', 1)} of another version, which "
            f"does not say what data it was trained on; this one resumes format {FORMAT} (samebit "
            "export reads either)"
        )
    checkpoint.require("command", here["command"], "command")
    # Manifests of version 0.1 before families were types say what the architecture implies.
    model = {key: value for key, value in there["model"].items() if key != "qk_norm"}
    config = {k: v for k, v in _EARLIER.items() if k in here["config"]} | there["config"]
    sections = {
        "configuration": differences(config, here["config"]),
        "model configuration": differences(model, here["model"], "config.json: "),
        "data or tokenizer": differences(there["contents"], here["contents"], "content of "),
    }
    if found := [f"{name}: {', '.join(texts)}" for name, texts in sections.items() if texts]:
        raise CheckpointError(f"{checkpoint.path} was written under another {'; '.join(found)}")
    done, total = there["progress"]["step"], run.trainer.num_steps
    if total < done:
        raise CheckpointError(
            f"{checkpoint.path} was written after step {done}; trainer.num_steps is {total}: give "
            f"at least {done}"
        )
    _require_same_layout(checkpoint, run, profile)
    for key in own_sources(run):
        source = _source_name(key)
        if there.get(source) != here[source]:
            print(
                f"samebit: the source of {key} has changed since {checkpoint.path} was written: "
                f"{there.get(source)} there, {here[source]} here; the run goes on with the "
                "present one",
                file=sys.stderr,
            )
    if there.get("card", here["card"]) != here["card"]:
        print(
            f"samebit: {checkpoint.path} was written on an {there['card']}; this is an "
            f"{here['card']}: log-probs have the same bits, gradients may have others",
            file=sys.stderr,
        )


def _require_same_layout(
    checkpoint: Checkpoint, run: TrainingRun, profile: NumericsProfile
) -> None:
    there, here = saved_layout(checkpoint), binding_layout(run)
    if (moved := bits_changed(run, there, here)) and not run.reshard:
        key = CriticLayout.key if moved.startswith(CriticLayout.key) else ParallelConfig.key
        raise CheckpointError(
            f"{checkpoint.path} was written under another {key} ({moved}); with reshard=true the "
            "run goes on, with other bits"
        )
    resharded = {"tp_size": profile.tp_size} if run.reshard else {}
    there, here = checkpoint.manifest["numerics"] | resharded, asdict(profile)
    if changed := changes(there, here):
        raise CheckpointError(
            f"{checkpoint.path} was written under another numerics profile, so bits would differ: "
            f"{changed}"
        )


def bits_changed(run: TrainingRun, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return the keys of a layout by whose change a run gets other bits, as `changes`."""
    moves_none = _ELASTIC if run.numerics.grad_segments else ()
    return changes(there, {key: value for key, value in here.items() if key not in moves_none})


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return the keys whose values differ, as text."""
    return ", ".join(f"{k} {there.get(k)} -> {v}" for k, v in here.items() if there.get(k) != v)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return keys with other values: "trainer.optimizer.lr 0.01 there, 0.02 here"."""

    def shown(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key]).strip('"') if key in values else _ABSENT

    keys: Iterable[str] = dict.fromkeys([*there, *here])
    pairs = ((key, shown(there, key), shown(here, key)) for key in keys)
    return [f"{prefix}{key} {old} there, {new} here" for key, old, new in pairs if old != new]
