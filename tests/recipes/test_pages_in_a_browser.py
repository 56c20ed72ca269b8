"""Pages as a headless Chromium lays them out, wide and narrow, light and dark: no text overlaps
another or leaves the page, numbers are those of the files, samples are found and sorted."""

import html
import json
import re
import shutil
import threading

import pytest
from programs.browser import BROWSER, document_of

from samebit.recipes.cli.main import main
from samebit.recipes.run.metrics import LoggerConfig, MetricsLogger, read_rows
from samebit.recipes.run.pages import open_runs
from samebit.recipes.run.report import write_report
from samebit.recipes.watch import WatchServer

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]

WIDTHS = (1280, 390)
PAGES = ("page.html", "a_run_with_a_long_name/report.html")
KEYS = ("eval/reward_mean", "rollout/reward_mean", "train/kl", "train/entropy", "perf/train_s")
KEYS += ("rollout/response_len_mean", "train/clip_fraction", "perf/step_s", "critic/vf_loss")
MEASURE = """
function texts(doc) {
  const walk = doc.createTreeWalker(doc.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const parent = node.parentElement, range = doc.createRange();
    if (!node.data.trim() || parent.closest("script, style, option, details:not([open])")) continue;
    range.selectNode(node);
    const boxes = parent.closest("svg") ? [parent.getBoundingClientRect()] : range.getClientRects();
    for (const b of boxes) found.push({ node, b });
  }
  return found;
}
function overlaps(doc) {
  const all = texts(doc), found = [];
  const common = (a, b, from, to) => Math.min(a[to], b[to]) - Math.max(a[from], b[from]);
  all.forEach((x, i) => all.slice(i + 1).forEach((y) => {
    const across = common(x.b, y.b, "left", "right"), down = common(x.b, y.b, "top", "bottom");
    if (x.node !== y.node && across > 1 && down > 2) found.push([x.node.data, y.node.data]);
  }));
  return found;
}
function cards(doc) {
  return [...doc.querySelectorAll("#samples article")].map((x) => x.innerText);
}
function measure(frame) {
  const doc = frame.contentDocument, style = frame.contentWindow.getComputedStyle(doc.body);
  const found = { overlaps: overlaps(doc), texts: texts(doc).length };
  found.colors = [style.color, style.backgroundColor];
  found.beyond = doc.documentElement.scrollWidth - frame.contentWindow.innerWidth;
  if (!doc.getElementById("samples")) return found;
  const change = (id, value, name) => {
    doc.getElementById(id).value = value;
    doc.getElementById(id).dispatchEvent(new Event(name));
  };
  found.table = [...doc.querySelectorAll("tbody tr")].map((row) => [
    row.cells[0].textContent, ...[...row.cells].slice(1).map((cell) => cell.title)]);
  const points = (path) => path.getAttribute("d").match(/[ML]/g).length;
  found.curves = [...doc.querySelectorAll("figure")].map((x) => [
    x.querySelector("h3").textContent, ...[...x.querySelectorAll("path")].map(points)]);
  change("order", "lowest reward", "change");
  found.lowest = cards(doc);
  change("order", "longest", "change");
  found.longest = cards(doc);
  change("search", "prompt 7", "input");
  found.searched = cards(doc);
  const token = (x) => doc.querySelector(x)?.title;
  found.tokens = [token(".token"), token(".masked")];
  return found;
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, one page of both, and the page of one."""
    folder = tmp_path_factory.mktemp("pages")
    names = [PAGES[1].partition("/")[0], "other"]
    for number, name in enumerate(names):
        with MetricsLogger(folder / name, LoggerConfig(wandb="disabled"), name, {}, None) as logger:
            for step in range(1, 10):
                logger.log(step, {key: (step * 37 + i) % 11 / 7e3 for i, key in enumerate(KEYS)})
                logger.log_samples(step, "eval" if step % 4 else "train", [_sample(number, step)])
        summary = {"reward_last": 0.5, "weights_digest": "0123456789abcdef"}
        (folder / name / "summary.json").write_text(json.dumps(summary))
    write_report(folder / names[0], title=names[0], summary=summary, config_yaml="seed: 1\n")
    assert (
        main(["report", *(str(folder / name) for name in names), f"out={folder / PAGES[0]}"]) == 0
    )
    return folder


def _sample(run, step):
    pieces = [f"w{i}" for i in range(step)] + ["x" * 90]
    drawn = [i != 1 for i in range(len(pieces))]
    return {
        "prompt": [{"role": "user", "content": f"prompt {step}"}],
        "completion": "".join(pieces),
        "label": f"{step}",
        "reward": (step * 3 + run) % 7 / 4,
        "rewards": {"judge": 0.25, "length": -1.0},
        "finish_reason": "stop",
        "tokens": pieces,
        "logprobs": [-0.5 * i * is_drawn for i, is_drawn in enumerate(drawn)],
        "loss_mask": drawn,
    }


def laid_out(folder, *words):
    """What is measured of each page at each width, by both."""
    frames = [(page, width) for page in PAGES for width in WIDTHS]
    inner = (
        f'<iframe src="{page}" width="{width}" height="900"></iframe>' for page, width in frames
    )
    text = f'<!doctype html><pre id="found"></pre>{"".join(inner)}<script>{MEASURE}</script>'
    (folder / "frame.html").write_text(text)
    words += ("--allow-file-access-from-files",)
    said = document_of(f"file://{folder}/frame.html", *words)
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', said, re.DOTALL)
    return dict(zip(frames, json.loads(html.unescape(found)), strict=True))


@pytest.mark.parametrize("words", [[], ["--force-dark-mode"]], ids=["light", "dark"])
def test_pages(folder, words):
    """Of two runs beside each other, and of one."""
    found = laid_out(folder, *words)
    for place, page in found.items():
        assert page["texts"] > 50, place
        assert page["overlaps"] == [], place
        assert page["beyond"] <= 0, place
        ink, paper = (int(re.findall(r"\d+", color)[0]) for color in page["colors"])
        assert (ink - paper > 128) if words else (paper - ink > 128), place
    names = [PAGES[1].partition("/")[0], "other"]
    rows = [read_rows(folder / name / "metrics.jsonl") for name in names]
    for width in WIDTHS:
        page = found[PAGES[0], width]
        table = {name: cells for name, *cells in page["table"]}
        told = [key for key in KEYS if key in table]
        assert len(told) > 5
        for key in told:
            assert [float(cell) for cell in table[key]] == [run[-1][key] for run in rows]
        assert table["weights digest"] == ["0123456789abcdef"] * 2
        assert {name: counts for name, *counts in page["curves"]} == {key: [9, 9] for key in KEYS}
        samples = [read_rows(folder / name / "samples.jsonl") for name in names]
        rewards = sorted(round(s["reward"], 4) for run in samples for s in run)
        shown = [float(re.search(r"reward (\S+)", card)[1]) for card in page["lowest"]]
        assert shown == rewards
        lengths = [int(re.search(r"(\d+) tokens", card)[1]) for card in page["longest"]]
        assert lengths == sorted((len(s["tokens"]) for run in samples for s in run), reverse=True)
        assert [card.count("prompt 7") for card in page["searched"]] == [1, 1]
        assert all("judge 0.25" in card for card in page["searched"])
        assert page["tokens"] == ["log-prob 0", "not drawn: no loss"]


def test_a_watched_page_follows(folder, tmp_path):
    """What a run writes after the page has come is on it."""
    run = tmp_path / "run"
    shutil.copytree(folder / "other", run)
    asked = []

    class Goes(WatchServer):
        def data(self):
            if asked:  # the first time for the page itself
                with (run / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 41, "train/kl": 0.75}\n')
            asked.append(1)
            return super().data()

    with Goes(open_runs([str(run)], "runs"), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = document_of(server.address, "--virtual-time-budget=1000")
        server.shutdown()
    assert '<p id="live">live</p>' in said
    assert '<tr><th>last step<wbr></th><td class="number" title="41">41</td></tr>' in said
