"""report.html: one self-contained page with what a run reached, its curves and its completions."""

import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from samebit.recipes.run.dialogue import dialogue
from samebit.recipes.run.metrics import METRICS_FILE, OWNER_ONLY, SAMPLES_FILE, read_rows
from samebit.weight_sync.disk import write_atomically

COLORS = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#e87ba4", "#008300")
GREY = "#9aa0a6"
MAX_BARS = 60
# Whole steps, which contain the other phases: a line over the bars, not a part of them.
TOTALS = ("perf/step_s", "perf/total_s")
# With rollout.max_staleness: how long was drawn while nobody waited, and while somebody did. Both
# are a bar of their own beside that of the trainer, in which a draw takes no time but the wait.
OVERLAP, WAIT = "perf/overlap_s", "perf/rollout_wait_s"

Series = list[tuple[int, float]]


# Title, caption, and the metric of each curve by its label.
CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Reward",
        "mean over the completions of a step or an evaluation",
        {"train": "rollout/reward_mean", "eval": "eval/reward_mean"},
    ),
    (
        "Response length",
        "mean tokens per completion",
        {"train": "rollout/response_len_mean", "eval": "eval/response_len_mean"},
    ),
    (
        "Prompts drawn",
        "in a step, with dynamic sampling or partial rollouts",
        {"drawn": "rollout/prompts_drawn"},
    ),
    (
        "Prompts kept",
        "share of the drawn ones",
        {"rewards differ": "rollout/spread_fraction", "trained on": "rollout/kept_fraction"},
    ),
    (
        "Samples left",
        "to later steps, of partial rollouts",
        {"unfinished": "rollout/pending_samples", "finished": "rollout/waiting_samples"},
    ),
    (
        "Older tokens",
        "share of those trained on that earlier weights drew",
        {"train": "rollout/older_token_fraction"},
    ),
    (
        "Accept length",
        "tokens that a verification of guesses yields",
        {"train": "rollout/spec_accept_length"},
    ),
    (
        "Speed-up by guesses",
        "of steps in which anything was guessed, against steps of as many samples without",
        {"train": "rollout/spec_speedup"},
    ),
    (
        "Accepted guesses",
        "share of the guesses that were right, in all and by place",
        {"all": "rollout/spec_accept_rate"}
        | {f"{i + 1}": f"rollout/spec_accept_rate_{i}" for i in range(5)},
    ),
    ("Draft loss", "of a draft in training", {"train": "draft/loss"}),
    ("Loss", "training loss", {"train": "train/loss"}),
    ("Value loss", "of the critic", {"critic": "critic/vf_loss"}),
    (
        "Values",
        "means over tokens",
        {"critic": "critic/values/mean", "returns": "critic/returns/mean"},
    ),
    (
        "Explained variance",
        "of the returns, by the critic's values",
        {"critic": "critic/vf_explained_var"},
    ),
    ("KL", "divergence from the reference", {"train": "train/kl"}),
    ("Reverse KL", "to the teacher, mean over tokens", {"drawn": "distillation/reverse_kl"}),
    ("Gradient norm", "before clipping", {"train": "train/grad_norm"}),
    (
        "Memory",
        "GiB at the end of a phase; peaks are torch's",
        {
            "KV cache, drawing": "perf/rollout_kv_cache_gib",
            "KV cache, training": "perf/train_kv_cache_gib",
            "gradients, drawing": "perf/rollout_gradients_gib",
            "gradients, training": "perf/train_gradients_gib",
            "optimizer": "perf/train_optimizer_gib",
            "peak, drawing": "perf/rollout_peak_gib",
            "peak, training": "perf/train_peak_gib",
        },
    ),
    (
        "Memory of the device",
        "GiB at the end of a phase: the weights, what torch has reserved, and all that is in use",
        {
            "weights": "perf/train_weights_gib",
            "reserved, drawing": "perf/rollout_reserved_gib",
            "reserved, training": "perf/train_reserved_gib",
            "in use, drawing": "perf/rollout_device_gib",
            "in use, training": "perf/train_device_gib",
        },
    ),
    ("Entropy", "mean over tokens, in nats", {"train": "train/entropy"}),
)


def write_report(run_dir: Path, *, title: str, summary: dict[str, Any], config_yaml: str) -> Path:
    """Write `report.html` from the run's metrics.jsonl and samples.jsonl; returns its path.

    Every entry of `summary` becomes a card, in order; `reward_first` and `reward_last` share one,
    and are taken from the metrics where the summary lacks them. A chart without metrics is left
    out. Raises FileNotFoundError where the run folder is missing.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run folder {run_dir} does not exist; give the folder of a run")
    rows = read_rows(run_dir / METRICS_FILE)
    page = _filled_page(
        title=title,
        cards=_cards(summary, _series(rows, "rollout/reward_mean")),
        figures=_figures(rows),
        samples=_samples(read_rows(run_dir / SAMPLES_FILE)),
        config=config_yaml,
    )
    path = run_dir / "report.html"
    write_atomically(path, page, OWNER_ONLY)  # the configuration is in it
    return path


def _filled_page(**fields: Any) -> str:
    """Fill in report.html.jinja, which stands beside this file; every text is escaped there."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"shown": _shown, "dialogue": dialogue}
    return templates.get_template("report.html.jinja").render(fields)


def _shown(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _series(rows: Iterable[dict[str, Any]], key: str) -> Series:
    return [(row["step"], row[key]) for row in rows if key in row]


def _cards(summary: dict[str, Any], rewards: Series) -> dict[str, Sequence[Any]]:
    """Return what each card shows: one value, or several that follow each other."""
    entries = dict(summary)
    first, last = entries.pop("reward_first", None), entries.pop("reward_last", None)
    if rewards:
        first = rewards[0][1] if first is None else first
        last = rewards[-1][1] if last is None else last
    if first is not None and last is not None:
        entries = {"reward": (first, last)} | entries
    return {name: v if isinstance(v, list | tuple) else [v] for name, v in entries.items()}


def _figures(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the heading, the caption and the <svg> of each figure that has metrics."""
    figures: list[tuple[str, str, str]] = []
    for title, caption, keys in CHARTS:
        lines = {label: _series(rows, key) for label, key in keys.items()}
        lines = {label: line for label, line in lines.items() if line}
        if lines:
            figures.append((title, caption, _line_svg(lines, f"c{len(figures)}")))
    timed = _times(rows)
    if timed:
        width = math.ceil(len(timed) / MAX_BARS)
        caption = "seconds per step" + (f", mean of {width} steps" if width > 1 else "")
        figures.append(("Time", caption, _time_svg(timed, width, f"c{len(figures)}")))
    return figures


def _line_svg(lines: dict[str, Series], prefix: str) -> str:
    figure, axes = _axes()
    for (label, line), color in zip(lines.items(), COLORS, strict=False):
        # Few points stay visible as such: one evaluation alone would be no line at all.
        marker = "o" if len(line) <= 30 else None
        axes.plot(*zip(*line, strict=True), color=color, label=label, marker=marker, markersize=3)
    if len(lines) > 1:
        _name_lines(axes)
    return _svg(figure, prefix)


def _is_time(key: str) -> bool:
    return key.startswith("perf/") and key.endswith("_s") and not key.endswith("_per_s")


def _times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step with its times: training and evaluation may log the same step apart."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        times = {key: value for key, value in row.items() if _is_time(key)}
        if times:
            merged.setdefault(row["step"], {"step": row["step"]}).update(times)
    return list(merged.values())


def _time_svg(rows: list[dict[str, Any]], width: int, prefix: str) -> str:
    """Stacked bars of the phases, the longest first; each bar is the mean of `width` steps."""
    bins = [rows[start : start + width] for start in range(0, len(rows), width)]
    keys = {key for row in rows for key in row if _is_time(key)}
    means = {key: [sum(row.get(key, 0.0) for row in b) / len(b) for b in bins] for key in keys}
    beside = OVERLAP in keys
    hidden = {*TOTALS, *({OVERLAP, "perf/rollout_s"} if beside else ())}
    phases = sorted(keys - hidden, key=lambda key: (-sum(means[key]), key))
    stacks = {key.removeprefix("perf/").removesuffix("_s"): means[key] for key in phases}
    if len(phases) > len(COLORS):
        small = [means[key] for key in phases[len(COLORS) :]]
        stacks = dict(list(stacks.items())[: len(COLORS)])
        stacks["other"] = [sum(column) for column in zip(*small, strict=True)]
    figure, axes = _axes()
    steps = [b[0]["step"] for b in bins]
    gap = min((b - a for a, b in zip(steps, steps[1:], strict=False)), default=1)
    bar, bottom = (0.42 if beside else 0.85) * gap, [0.0] * len(bins)
    left = [step - bar / 2 for step in steps] if beside else steps
    for (label, heights), color in zip(stacks.items(), (*COLORS, GREY), strict=False):
        axes.bar(left, heights, bar, bottom=bottom, color=color, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if beside:
        drawing = [a + b for a, b in zip(means[OVERLAP], means[WAIT], strict=True)]
        right = [step + bar / 2 for step in steps]
        axes.bar(right, drawing, bar, color=GREY, hatch="//", label="rollout, beside")
    for key in sorted(keys & set(TOTALS)):
        label = f"whole {key.removeprefix('perf/').removesuffix('_s')}"
        axes.plot(steps, means[key], color="#1d2129", linewidth=1, marker="_", label=label)
    _name_lines(axes)
    return _svg(figure, prefix)


def _name_lines(axes: Any) -> None:
    """Above them, where no line runs through a name."""
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c4c9d0")
    axes.grid(axis="y", color="#eef0f2")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0, labelcolor="#5b6470")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step", fontsize=8, color="#5b6470")
    return figure, axes


def _svg(figure: Any, prefix: str) -> str:
    """The figure as an inline <svg> that scales with the page and shares no id with others."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt and no date: the same run gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "samebit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    text = re.sub(r"<svg[^>]*>", f'<svg role="img" {view[0] if view else ""}>', text, count=1)
    text = text.replace("xlink:href", "href")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)


def _samples(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of the first and the last evaluation, or of all kinds if there was none."""
    rows = [row for row in rows if row.get("kind") == "eval"] or rows
    steps = sorted({row["step"] for row in rows})
    return {step: [r for r in rows if r["step"] == step] for step in (*steps[:1], *steps[-1:])}
