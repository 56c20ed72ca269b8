"""One self-contained page of several runs beside each other: compare.html.jinja and compare.js."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from samebit.recipes.run.kept_samples import MOST_SAMPLE_BYTES, ORDERS, PER_PAGE
from samebit.recipes.run.run_data import RunData

CHARTS = (
    "eval/reward_mean", "rollout/reward_mean", "eval/loss", "eval/accuracy", "train/accuracy",
    "train/margin", "rollout/kl", "train/kl", "distillation/reverse_kl", "train/reverse_kl",
    "train/entropy", "rollout/response_len_mean", "eval/response_len_mean",
    "rollout/truncated_fraction", "rollout/turns_mean", "train/clip_fraction", "train/loss",
    "train/grad_norm", "critic/vf_loss", "critic/vf_explained_var",
    "rollout/spec_speedup", "rollout/spec_accept_length", "rollout/spec_accept_rate", "draft/loss",
    "draft/acceptance_0",
    "train/logprob_mismatches", "perf/step_s", "perf/rollout_s", "perf/train_s", "perf/sync_s",
    "perf/eval_s", "perf/rollout_tokens_per_s", "perf/train_tokens_per_s", "perf/train_mfu",
    "perf/rollout_kv_cache_gib", "perf/train_kv_cache_gib", "perf/rollout_gradients_gib",
    "perf/train_gradients_gib", "perf/train_optimizer_gib", "perf/train_weights_gib",
    "perf/rollout_peak_gib", "perf/train_peak_gib", "perf/rollout_device_gib",
    "perf/train_device_gib",
)  # fmt: skip
"""Metrics that are shown first, in this order; a button shows all others."""
CARDS = (
    "eval/reward_mean", "rollout/reward_mean", "eval/loss", "train/kl", "train/entropy",
    "rollout/response_len_mean", "train/clip_fraction", "perf/step_s",
)  # fmt: skip
"""Metrics whose last value stands in the table."""
MOST_NAMES = 4
"""In a title."""
MARK = "<!-- samebit: runs beside each other -->"
"""In the first lines of every such page."""


def open_runs(folders: Sequence[str], key: str) -> list[RunData]:
    """Read runs by their folders, each under a name that no other has.

    Raises ValueError, naming the key of the configuration, for a folder that is given twice, and
    FileNotFoundError for one that holds no run.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if twice := [folder for i, folder in enumerate(folders) if paths[i] in paths[:i]]:
        raise ValueError(f"{key} has {twice[0]!r} twice; give every run once")
    names = [path.name for path in paths]
    unique = len(set(names)) == len(names)
    return [
        RunData(path, name if unique else str(path))
        for path, name in zip(paths, names, strict=True)
    ]


def page_data(runs: Sequence[RunData], *, live: bool = False) -> str:
    """Return what a page shows, as JSON. live: it asks for what is new, and for samples, see
    watch.py; else it holds those that it can."""
    shown = [run.shown(0 if live else MOST_SAMPLE_BYTES // len(runs)) for run in runs]
    data = {"runs": shown, "charts": CHARTS, "cards": CARDS, "live": live}
    return json.dumps(data | {"orders": [*ORDERS], "per_page": PER_PAGE}, allow_nan=False)


def title_of(runs: Sequence[RunData]) -> str:
    """Return what a page of runs is called: by their names, if they are few."""
    few = len(runs) <= MOST_NAMES
    return " and ".join(run.name for run in runs) if few else f"{len(runs)} runs"


def page(title: str, data: str) -> str:
    """Return the page that shows such data; texts in it cannot end its script."""
    here = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined
    )
    fields: dict[str, Any] = {
        "title": title,
        "mark": MARK,
        "data": data.replace("<", "\\u003c"),
        "script": (here / "compare.js").read_text(encoding="utf-8"),
    }
    return templates.get_template("compare.html.jinja").render(fields)
