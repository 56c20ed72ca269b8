"""report.html: one self-contained page with what a run reached, its curves and its completions."""

import html
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samebit.recipes.run.metrics import METRICS_FILE, OWNER_ONLY, SAMPLES_FILE, read_rows
from samebit.weight_sync.disk import write_atomically

COLORS = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#e87ba4", "#008300")
GREY = "#9aa0a6"
MAX_BARS = 60
# Whole steps, which contain the other phases: a line over the bars, not a part of them.
TOTALS = ("perf/step_s", "perf/total_s")

Series = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of curves over steps."""

    title: str
    caption: str
    keys: dict[str, str]
    """Legend label -> metric key."""


CHARTS = (
    Chart(
        title="Reward",
        caption="mean over the completions of a step or an evaluation",
        keys={"train": "rollout/reward_mean", "eval": "eval/reward_mean"},
    ),
    Chart(
        title="Response length",
        caption="mean tokens per completion",
        keys={"train": "rollout/response_len_mean", "eval": "eval/response_len_mean"},
    ),
    Chart(title="Loss", caption="training loss", keys={"train": "train/loss"}),
    Chart(title="KL", caption="divergence from the reference", keys={"train": "train/kl"}),
    Chart(title="Gradient norm", caption="before clipping", keys={"train": "train/grad_norm"}),
    Chart(title="Entropy", caption="mean over tokens, in nats", keys={"train": "train/entropy"}),
)

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1d2129; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 16px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 20px; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
h3 { font-size: 0.95rem; margin: 0; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.cards { grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); }
.card, figure, details, .table { background: #fff; border: 1px solid #e3e6ea;
  border-radius: 10px; padding: 14px 16px; margin: 0; min-width: 0; }
.name, figcaption, th { color: #5b6470; font-size: 0.8rem; font-weight: 500; }
.value { font-size: 1.4rem; font-weight: 600; overflow-wrap: anywhere; }
.long { font-size: 0.8rem; font-weight: 400; font-family: ui-monospace, monospace; }
.good { color: #067647; } .bad { color: #b42318; }
svg { width: 100%; height: auto; display: block; margin-top: 8px; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
.table { padding: 0; margin-bottom: 14px; }
table { width: 100%; border-collapse: collapse; font-size: 0.85rem; }
th, td { text-align: left; vertical-align: top; padding: 8px 12px; }
tr + tr td { border-top: 1px solid #eef0f2; } thead th { border-bottom: 1px solid #e3e6ea; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
td.text { font-family: ui-monospace, monospace; font-size: 0.8rem; }
pre { margin: 12px 0 0; overflow-x: auto; font-size: 0.8rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 640px) {
  .grid { grid-template-columns: 1fr; } .cards { grid-template-columns: 1fr 1fr; }
  thead { display: none; } tr { display: block; padding: 8px 0; }
  tr + tr { border-top: 1px solid #e3e6ea; }
  td, tr + tr td { display: block; border: 0; padding: 3px 14px; }
  td::before { content: attr(data-name) ": "; color: #5b6470; font-family: system-ui, sans-serif; }
}
"""


def write_report(run_dir: Path, *, title: str, summary: dict[str, Any], config_yaml: str) -> Path:
    """Write `report.html` from the run's metrics.jsonl and samples.jsonl; returns its path.

    Every entry of `summary` becomes a card, in order; `reward_first` and `reward_last` share one,
    and are taken from the metrics where the summary lacks them. A chart without metrics is left
    out. Raises FileNotFoundError where the run folder is missing.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run folder {run_dir} does not exist; give the folder of a run")
    rows = read_rows(run_dir / METRICS_FILE)
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        _cards(summary, _series(rows, "rollout/reward_mean")),
        _section("Curves", _grid(_charts(rows))),
        _section("Samples", _samples(read_rows(run_dir / SAMPLES_FILE))),
        f"<h2>Config</h2><details><summary>Resolved config</summary>"
        f"<pre>{html.escape(config_yaml)}</pre></details>",
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        "<body><main>" + "\n".join(section for section in sections if section) + "</main></body>"
        "</html>\n"
    )
    path = run_dir / "report.html"
    write_atomically(path, page, OWNER_ONLY)  # the configuration is in it
    return path


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}" if body else ""


def _grid(figures: list[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _series(rows: Iterable[dict[str, Any]], key: str) -> Series:
    return [(row["step"], row[key]) for row in rows if key in row]


def _cards(summary: dict[str, Any], rewards: Series) -> str:
    entries = dict(summary)
    first, last = entries.pop("reward_first", None), entries.pop("reward_last", None)
    if rewards:
        first = rewards[0][1] if first is None else first
        last = rewards[-1][1] if last is None else last
    if first is not None and last is not None:
        entries = {"reward": (first, last)} | entries
    cards = "".join(_card(name, value) for name, value in entries.items())
    return f'<div class="grid cards">{cards}</div>' if cards else ""


def _card(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        shown = " &rarr; ".join(html.escape(_format(part)) for part in value)
    else:
        shown = html.escape(_format(value))
    style = "value"
    if isinstance(value, str) and len(value) > 20:
        style += " long"
    if "mismatch" in name and isinstance(value, int):
        style += " bad" if value else " good"
    label = html.escape(name.replace("_", " "))
    return (
        f'<div class="card"><div class="name">{label}</div><div class="{style}">{shown}</div></div>'
    )


def _format(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _charts(rows: list[dict[str, Any]]) -> list[str]:
    figures: list[str] = []
    for chart in CHARTS:
        lines = {label: _series(rows, key) for label, key in chart.keys.items()}
        lines = {label: line for label, line in lines.items() if line}
        if lines:
            svg = _line_svg(lines, f"c{len(figures)}")
            figures.append(_figure(chart.title, chart.caption, svg))
    timed = _times(rows)
    if timed:
        width = math.ceil(len(timed) / MAX_BARS)
        caption = "seconds per step" + (f", mean of {width} steps" if width > 1 else "")
        figures.append(_figure("Time", caption, _time_svg(timed, width, f"c{len(figures)}")))
    return figures


def _figure(title: str, caption: str, svg: str) -> str:
    return f"<figure><h3>{title}</h3><figcaption>{caption}</figcaption>{svg}</figure>"


def _line_svg(lines: dict[str, Series], prefix: str) -> str:
    figure, axes = _axes()
    for (label, line), color in zip(lines.items(), COLORS, strict=False):
        # Few points stay visible as such: one evaluation alone would be no line at all.
        marker = "o" if len(line) <= 30 else None
        axes.plot(*zip(*line, strict=True), color=color, label=label, marker=marker, markersize=3)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
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
    phases = sorted(keys - set(TOTALS), key=lambda key: (-sum(means[key]), key))
    stacks = {key.removeprefix("perf/").removesuffix("_s"): means[key] for key in phases}
    if len(phases) > len(COLORS):
        small = [means[key] for key in phases[len(COLORS) :]]
        stacks = dict(list(stacks.items())[: len(COLORS)])
        stacks["other"] = [sum(column) for column in zip(*small, strict=True)]
    figure, axes = _axes()
    steps = [b[0]["step"] for b in bins]
    gap = min((b - a for a, b in zip(steps, steps[1:], strict=False)), default=1)
    bottom = [0.0] * len(bins)
    for (label, heights), color in zip(stacks.items(), (*COLORS, GREY), strict=False):
        axes.bar(steps, heights, 0.85 * gap, bottom=bottom, color=color, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for key in sorted(keys & set(TOTALS)):
        label = f"whole {key.removeprefix('perf/').removesuffix('_s')}"
        axes.plot(steps, means[key], color="#1d2129", linewidth=1, marker="_", label=label)
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return _svg(figure, prefix)


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


def _samples(rows: list[dict[str, Any]]) -> str:
    """Tables of the first and the last evaluation, or of all kinds where none was evaluated."""
    rows = [row for row in rows if row.get("kind") == "eval"] or rows
    steps = sorted({row["step"] for row in rows})
    tables = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        body = "".join(_sample(row) for row in rows if row["step"] == step)
        tables.append(
            f'<h3>Step {step}</h3><div class="table"><table><thead><tr><th>prompt</th>'
            f"<th>completion</th><th>label</th><th>reward</th></tr></thead>{body}</table></div>"
        )
    return "".join(tables)


def _sample(row: dict[str, Any]) -> str:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    values = {name: row.get(name) for name in ("completion", "label", "reward")}
    cells = "".join(
        f'<td class="{"text" if name != "reward" else ""}" data-name="{name}">'
        f"{html.escape(_format(value))}</td>"
        for name, value in ({"prompt": prompt} | values).items()
    )
    return f"<tr>{cells}</tr>"
