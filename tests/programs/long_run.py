"""Make the folder of a long run that never was, and time the page of `samebit report` of it.

    python tests/programs/long_run.py FOLDER OUT.json [steps=10000] [samples=100000] [tokens=128]

FOLDER/run gets metrics and samples of so many steps and completions, by the logger of every run,
unless it is there; FOLDER/page.html is its page. A headless Chromium opens it three times: seconds
from an empty window until everything is laid out.
"""

import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
from browser import document_of

from samebit.recipes.cli.main import main as samebit
from samebit.recipes.run.metrics import LoggerConfig, MetricsLogger
from samebit.recipes.run.pages import CHARTS
from samebit.recipes.run.provenance import write_result

OPTIONS = {"steps": 10_000, "samples": 100_000, "tokens": 128}
WORDS = [f" {a}{b}" for a in ("to", "re", "mi", "ka", "no", "su") for b in ("ra", "le", "do", "x")]
_FRAME = """<!doctype html><p id="found">nothing</p>
<iframe id="page" width="1280" height="900"></iframe>
<script>
const frame = document.getElementById("page"), start = performance.now();
frame.onload = () => {
  const height = frame.contentDocument.body.getBoundingClientRect().height;
  const seconds = (performance.now() - start) / 1000;
  document.getElementById("found").textContent = `seconds=${seconds} height=${height}`;
};
frame.src = "page.html";
</script>
"""


def write_run(folder: Path, steps: int, samples: int, tokens: int) -> None:
    """Write metrics of every step and samples evenly over them, the same for the same numbers."""
    drawn = random.Random(0)
    others = [f"train/other_{i}" for i in range(20)]
    config = LoggerConfig(wandb="disabled", num_samples=samples)
    with MetricsLogger(folder, config, "long", {}, None) as logger:
        for step in range(1, steps + 1):
            level = 1 - math.exp(-3 * step / steps)
            logger.log(step, {key: level + drawn.gauss(0, 0.1) for key in (*CHARTS, *others)})
            due = samples * step // steps - samples * (step - 1) // steps
            rows = [_sample(drawn, i, tokens) for i in range(due)]
            logger.log_samples(step, "eval" if step % 20 == 0 else "train", rows)


def _sample(drawn: random.Random, number: int, tokens: int) -> dict[str, object]:
    """As a GRPO run writes one."""
    pieces = drawn.choices(WORDS, k=drawn.randint(tokens // 2, tokens * 3 // 2))
    return {
        "prompt": f"What is {number} and {drawn.random()}?",
        "completion": "".join(pieces),
        "label": str(number),
        "reward": float(drawn.random() < 0.5),
        "finish_reason": "stop",
        "tokens": pieces,
        "logprobs": [-drawn.expovariate(2) for _ in pieces],
    }


def opened(folder: Path) -> list[float]:
    """Seconds until a browser has laid out folder/page.html, three times."""
    (folder / "frame.html").write_text(_FRAME)
    address, found = f"file://{folder.resolve()}/frame.html", []
    for _ in range(3):
        said = document_of(address, "--allow-file-access-from-files")
        [seconds] = re.findall(r"seconds=([\d.]+) height=\d", said)
        found.append(float(seconds))
    return found


def main(folder: str, out: str, *pairs: str) -> None:
    """See the module."""
    options = OPTIONS | {key: int(value) for key, _, value in (p.partition("=") for p in pairs)}
    run, page = Path(folder) / "run", Path(folder) / "page.html"
    if not (run / "metrics.jsonl").exists():
        write_run(run, **options)
    start = time.perf_counter()
    if code := samebit(["report", str(run), f"out={page}"]):
        sys.exit(code)
    found = {"report_s": round(time.perf_counter() - start, 1)}
    for path in (run / "metrics.jsonl", run / "samples.jsonl", page):
        found[f"{path.stem}_mb"] = round(path.stat().st_size / 1e6, 1)
    found["opened_s"] = [round(seconds, 2) for seconds in opened(Path(folder))]
    write_result(Path(out), torch.device("cpu"), options | found, ["python", *sys.argv])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
