"""samebit diff: the first place where two runs part.

In the order in which a step happens: its rollout, its training metrics, its row of the schedule
with the digest of the weights that came of it, its checkpoint, then the evaluation of the new
weights. Times (perf/*) and what guesses came to (rollout/spec_*) are left out, also of summaries.
What only one run has kept (checkpoints, rollouts, samples, schedules) is named and not compared;
other metrics that only one has are a difference.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from yaml import YAMLError

from samebit.recipes.config import ConfigError
from samebit.recipes.run.binding import binding_config
from samebit.recipes.run.folder import CONFIG_FILE
from samebit.recipes.run.input_files import flatten
from samebit.recipes.run.metrics import (
    METRICS_FILE,
    SAMPLES_FILE,
    SCHEDULE_FILE,
    is_repeated,
    read_rows,
)
from samebit.recipes.run.rollouts import SavedSample, list_rollouts, load_rollout
from samebit.recipes.tools_config import DiffRun
from samebit.recipes.verification.bits import distance
from samebit.trainer.checkpoint import Checkpoint, CheckpointError, list_checkpoints

Row = dict[str, Any]
_EVAL = "eval/"
_NEAR = 1 << 32  # ulps of fp64; of numbers further apart, the count says nothing


@dataclass(frozen=True)
class RunContents:
    """Holds what a run has left, by step; checkpoints and rollouts are read to be compared."""

    config: Row
    metrics: dict[int, Row]
    samples: dict[int, list[Row]]
    checkpoints: dict[int, Checkpoint]
    rollouts: dict[int, Path]
    schedules: dict[int, Row]
    summary: Row | None

    @property
    def numerics(self) -> Row:
        """Return what its newest checkpoint, if any, says of numerics, model and contents."""
        if not self.checkpoints:
            return {}
        manifest = self.checkpoints[max(self.checkpoints)].manifest
        parts = (manifest.get(name, {}) for name in ("model", "contents", "numerics"))
        return {key: value for part in parts for key, value in part.items()}


def open_run(path: Path) -> RunContents:
    """Read a run's folder. Raises ConfigError, OSError, ValueError or CheckpointError."""
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder")
    if not (path / METRICS_FILE).exists() or not (path / CONFIG_FILE).exists():
        inner = sorted(file.parent.name for file in path.glob(f"*/{METRICS_FILE}"))
        hint = f"; the runs in it: {', '.join(inner)}" if inner else ""
        raise ConfigError(f"{path} holds no {METRICS_FILE} and {CONFIG_FILE} of a run{hint}")
    metrics = {row["step"]: row for row in read_rows(path / METRICS_FILE)}
    if not metrics:
        raise ConfigError(f"{path / METRICS_FILE} holds no step yet")
    samples: dict[int, list[Row]] = {}
    for row in read_rows(path / SAMPLES_FILE):
        samples.setdefault(row["step"], []).append(row)
    return RunContents(
        _read_config(path / CONFIG_FILE),
        metrics,
        samples,
        {c.step: c for c in list_checkpoints(path / "checkpoints")},
        list_rollouts(path),
        {row["step"]: row for row in read_rows(path / SCHEDULE_FILE)},
        _read_summary(path / "summary.json"),
    )


def _read_config(file: Path) -> Row:
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
        return flatten(binding_config(config))
    except (YAMLError, OSError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} is no configuration of a training run") from error


def _read_summary(file: Path) -> Row | None:
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


def settings(a: RunContents, b: RunContents) -> Iterator[str]:
    """Yield what may explain a difference, and what cannot be compared."""
    yield from (f"config: {text}" for text in row_differences(a.config, b.config))
    if a.numerics and b.numerics:
        yield from (f"numerics: {text}" for text in row_differences(a.numerics, b.numerics))
    for name in ("checkpoints", "rollouts", "samples", "schedules"):
        x, y = getattr(a, name), getattr(b, name)
        for only, steps in (("A", _more(x, y)), ("B", _more(y, x))):
            if steps:
                yield f"not compared: {name} that only {only} has, of {_steps(steps)}"


def _more(a: Mapping[int, Any], b: Mapping[int, Any]) -> list[int]:
    """The steps of which a has something, or more rows, that b has not."""
    return [s for s, x in a.items() if s not in b or (isinstance(x, list) and len(x) > len(b[s]))]


def _steps(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) < 5:
        return f"steps {', '.join(map(str, steps))}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def differences(a: RunContents, b: RunContents) -> Iterator[str]:
    """Yield every place where the runs differ, the first one first, reading as it is asked for."""
    steps = a.metrics.keys() | b.metrics.keys() | (a.rollouts.keys() & b.rollouts.keys())
    for step in sorted(steps):
        yield from (f"step {step}, {text}" for text in step_differences(a, b, step))
        if (step in a.metrics) != (step in b.metrics):
            has, lacks = ("A", b) if step in a.metrics else ("B", a)
            other = "B" if has == "A" else "A"
            yield f"step {step}: only {has} has it; the last of {other} is {max(lacks.metrics)}"
            break
    if a.summary is not None and b.summary is not None:
        found = row_differences(a.summary, b.summary)
        yield from (f"summary: {text}" for text in found if is_repeated(text))
    elif a.summary is not b.summary:
        yield f"summary: only {'A' if b.summary is None else 'B'} is finished"


def step_differences(a: RunContents, b: RunContents, step: int) -> Iterator[str]:
    """Yield those of one step, in the order in which its parts come to be."""
    if step in a.rollouts and step in b.rollouts:
        found = rollout_differences(load_rollout(a.rollouts[step]), load_rollout(b.rollouts[step]))
        yield from (f"rollout, {text}" for text in found)
    texts: list[str] = []
    if step in a.metrics and step in b.metrics:
        found = row_differences(a.metrics[step], b.metrics[step])
        texts = [f"metrics, {text}" for text in found if is_repeated(text)]
    evaluated = [text for text in texts if text.startswith(f"metrics, {_EVAL}")]
    yield from (text for text in texts if text not in evaluated)
    if step in a.schedules and step in b.schedules:
        found = row_differences(a.schedules[step], b.schedules[step])
        yield from (f"schedule, {text}" for text in found)
    if step in a.checkpoints and step in b.checkpoints:
        yield from checkpoint_differences(a.checkpoints[step], b.checkpoints[step])
    kept = zip(a.samples.get(step, ()), b.samples.get(step, ()), strict=False)
    for i, (one, other) in enumerate(kept):
        yield from (f"samples, row {i}, {text}" for text in text_differences(one, other))
    yield from evaluated


def row_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Yield keys with other values; numbers are compared exactly."""
    for key in chain(a, (k for k in b if k not in a)):
        if key not in a or key not in b:
            here, value = ("A", a[key]) if key in a else ("B", b[key])
            yield f"{key}: {_show(value)}, only in {here}"
        else:
            text = leaf_difference(a[key], b[key])
            if text:
                yield f"{key}: {text}"


def leaf_difference(a: Any, b: Any) -> str | None:
    """Yield how two values differ, if they do."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return tensor_difference(a, b)
    if repr(a) == repr(b):
        return None
    text = f"{_show(a)} in A, {_show(b)} in B"
    if isinstance(a, float) and isinstance(b, float):
        found = distance(*(torch.tensor(x, dtype=torch.float64) for x in (a, b)))
        text += f", {_ulps(found.ulps)} of fp64" if found and found.ulps < _NEAR else ""
    return text


def tensor_difference(a: Tensor, b: Tensor) -> str | None:
    """Say how many elements differ, the first of them, how far, and a digest of either tensor."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{_show(a)} in A, {_show(b)} in B"
    found = distance(a, b)
    if found is None:
        return None
    first, most = (
        _ulps(n) if a.is_floating_point() else f"{n} apart" for n in (found.ulps, found.max_ulps)
    )
    where = f" at {list(found.index)}" if found.index else ""
    x, y = (_show(t[found.index].item(), t.dtype) for t in (a, b))
    return (
        f"{found.num_differing} of {a.numel()} elements differ; the first{where} is {x} in A, {y} "
        f"in B, {first}; at most {most}; SHA-256 {_digest(a)} and {_digest(b)}"
    )


def rollout_differences(a: list[SavedSample], b: list[SavedSample]) -> Iterator[str]:
    """Yield the first token of every sample that was drawn otherwise, with both log-probs."""
    if len(a) != len(b):
        yield f"{len(a)} samples in A, {len(b)} in B"
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        text = _sample_difference(x, y)
        if text:
            yield f"sample {i} (id {x.sample_id:#x}), {text}"


def _sample_difference(a: SavedSample, b: SavedSample) -> str | None:
    if a.sample_id != b.sample_id:
        return f"sample_id: {b.sample_id:#x} in B"
    if not torch.equal(a.prompt_ids, b.prompt_ids):
        one, other = (_show(s.prompt_ids.tolist()) for s in (a, b))
        return f"prompt_ids: {one} in A, {other} in B"
    common = min(len(a.token_ids), len(b.token_ids))
    tokens, logprobs = (
        distance(x[:common], y[:common])
        for x, y in ((a.token_ids, b.token_ids), (a.logprobs, b.logprobs))
    )
    places = [found.index[0] for found in (tokens, logprobs) if found]
    if places:
        at = min(places)
        one, other = (
            f"{int(s.token_ids[at])} with log-prob {_show(s.logprobs[at].item(), torch.float32)}"
            for s in (a, b)
        )
        apart = distance(a.logprobs[at], b.logprobs[at])
        return f"token {at}: {one} in A, {other} in B, {_ulps(apart.ulps if apart else 0)}"
    if len(a.token_ids) != len(b.token_ids):
        return f"ends after {len(a.token_ids)} tokens in A, {len(b.token_ids)} in B"
    text = leaf_difference(a.reward, b.reward)
    return f"reward: {text}" if text else None


def checkpoint_differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Yield differences of parameters, then of optimizer, schedule and the rest, by tensor."""
    for name in sorted(a.manifest["files"].keys() | b.manifest["files"].keys()):
        if name not in a.manifest["files"] or name not in b.manifest["files"]:
            yield f"checkpoint, {name} only in {'A' if name in a.manifest['files'] else 'B'}"
            continue
        found = row_differences(_load(a, name), _load(b, name))
        first = next(found, None)
        if first is not None:
            yield f"checkpoint, {first}{_damage(a, 'A')}{_damage(b, 'B')}"
        yield from (f"checkpoint, {text}" for text in found)


def _load(checkpoint: Checkpoint, name: str) -> Row:
    try:
        state = torch.load(checkpoint.path / name, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        checkpoint.verify()  # says what is wrong with it
        raise CheckpointError(f"{checkpoint.path / name} cannot be read: {error}") from error
    return flatten({"params": state["params"], **state})


def _damage(checkpoint: Checkpoint, run: str) -> str:
    try:
        checkpoint.verify()
    except CheckpointError as error:
        return f" (the file of {run} is not what was written: {error})"
    return ""


def text_differences(a: Row, b: Row) -> Iterator[str]:
    """Yield as row_differences does; of texts the first character that differs and what follows."""
    for key in a:
        x, y = a[key], b.get(key)
        if isinstance(x, str) and isinstance(y, str) and x != y:
            at = len(os.path.commonprefix([x, y]))
            yield f"{key}, character {at}: {x[at : at + 20]!r} in A, {y[at : at + 20]!r} in B"
            return
    yield from row_differences(a, b)


def _show(value: Any, dtype: torch.dtype = torch.float64) -> str:
    """A value in few characters; floats exactly."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    if isinstance(value, float) and dtype != torch.float64:
        return f"{value:.9g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _ulps(count: int) -> str:
    return "1 ulp" if count == 1 else f"{count} ulps"


def _digest(x: Tensor) -> str:
    raw = x.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy()).hexdigest()[:16]


def _compared(a: RunContents, b: RunContents) -> str:
    counts = {
        name: len(getattr(a, name).keys() & getattr(b, name).keys())
        for name in ("metrics", "rollouts", "schedules", "checkpoints", "samples")
    }
    return ", ".join(f"{name} of {count} steps" for name, count in counts.items() if count)


def report(a: RunContents, b: RunContents, limit: int) -> int:
    """Print what differs, at most `limit` places, and say whether anything does."""
    for text in settings(a, b):
        print(text)
    found = differences(a, b)
    first = next(found, None)
    if first is None:
        print(f"no difference: {_compared(a, b)}")
        return 0
    print(f"first difference: {first}", flush=True)
    if "rollout.temperature" in a.config and not a.rollouts.keys() & b.rollouts.keys():
        print("with logger.save_rollouts=true in both runs, the first token would be named")
    for text in islice(found, limit - 1):
        print(f"then: {text}")
    if limit > 1 and next(found, None):
        print("and more: a higher limit=... shows them")
    return 1


def main(run: DiffRun) -> int:
    """Run the command `samebit diff`; returns 1 on any difference, 2 for what is no run."""
    try:
        a, b = open_run(Path(run.a)), open_run(Path(run.b))
        print(f"A is {run.a}, B is {run.b}")
        return report(a, b, (run.limit or 20) if run.all else 1)
    except (CheckpointError, OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
