"""The report page: what it shows, what it leaves out, and that text cannot break it."""

import re
from html.parser import HTMLParser

import pytest

from samebit.recipes.run.metrics import LoggerConfig, MetricsLogger
from samebit.recipes.run.report import write_report

EVIL = "</td></table><script>alert('x')</script> & <b>"
VOID = {"meta"}


class Balance(HTMLParser):
    """Collects the tags, and fails on one that is closed out of order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def make_run(run_dir, steps=6):
    with MetricsLogger(run_dir, LoggerConfig(wandb="disabled"), "r", {}, None) as logger:
        for step in range(steps):
            metrics = {"rollout/reward_mean": step / 8, "rollout/response_len_mean": 7.0}
            metrics |= {"train/loss": -0.1, "train/grad_norm": 1.0, "train/entropy": 0.5}
            metrics |= {"perf/rollout_s": 1.0, "perf/train_s": 2.0, "perf/tokens_per_s": 1e9}
            logger.log(step, metrics | {"perf/step_s": 3.5})
            if step % 2 == 0:
                logger.log(step, {"eval/reward_mean": step / 8, "perf/eval_s": 0.5})
                sample = {"completion": f"{EVIL} {step}", "label": "l", "reward": 0.25}
                chat = [{"role": "user", "content": "asked"}]
                rows = [{"prompt": EVIL} | sample, {"prompt": chat} | sample]
                logger.log_samples(step, "eval", rows)


def report(run_dir, **settings):
    defaults = {"title": "a run", "summary": {}, "config_yaml": "seed: 1\n"}
    path = write_report(run_dir, **(defaults | settings))
    assert path == run_dir / "report.html"
    return path.read_text()


def test_page_is_complete_and_self_contained(tmp_path):
    make_run(tmp_path)
    page = report(tmp_path, summary={"tokens_compared": 1234567, "mismatches": 0})
    assert parse(page).seen.count("svg") == 6
    for title in ("Reward", "Response length", "Loss", "Gradient norm", "Entropy", "Time"):
        assert f"<h3>{title}</h3>" in page
    for label in ("rollout", "train", "eval", "whole step"):
        assert f">{label}</text>" in page
    assert "tokens_per" not in page
    assert "://" not in page
    assert "<link" not in page
    assert "@import" not in page
    assert "width=device-width" in page


def test_cards(tmp_path):
    make_run(tmp_path)
    summary = {"tokens_compared": 1234567, "mismatches": 0, "digest": "ab" * 32, "ok": True}
    page = report(tmp_path, summary=summary)
    assert ">0 &rarr; 0.625<" in page
    assert ">tokens compared<" in page
    assert ">1,234,567<" in page
    assert 'class="value good">0<' in page
    assert f'class="value long">{"ab" * 32}<' in page
    assert ">yes<" in page
    assert 'class="value bad">3<' in report(tmp_path, summary={"mismatches": 3})
    page = report(tmp_path, summary={"reward_first": 0.125, "reward_last": 0.75})
    assert ">0.125 &rarr; 0.75<" in page


def test_samples_of_the_first_and_last_evaluation(tmp_path):
    make_run(tmp_path)
    page = report(tmp_path)
    assert re.findall(r"<h3>Step (\d+)</h3>", page) == ["0", "4"]
    assert ">user: asked<" in page
    assert ">0.25<" in page


def test_text_is_escaped_everywhere(tmp_path):
    make_run(tmp_path)
    page = report(tmp_path, title=EVIL, summary={EVIL: EVIL, "b": [EVIL]}, config_yaml=EVIL)
    assert "script" not in parse(page).seen
    assert "b" not in parse(page).seen
    # Title twice, card name, two card values, config, and the samples: 2 tables of 2 rows.
    assert page.count("&lt;script&gt;") == 6 + 2 * 3


def test_ids_are_unique_and_resolve(tmp_path):
    make_run(tmp_path)
    page = report(tmp_path)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', page)) <= set(ids)


def test_missing_keys_leave_their_chart_out(tmp_path):
    page = report(tmp_path)
    assert "svg" not in parse(page).seen
    assert "<h2>Curves</h2>" not in page
    assert "<h2>Samples</h2>" not in page
    with MetricsLogger(tmp_path, LoggerConfig(wandb="disabled"), "r", {}, None) as logger:
        logger.log(0, {"eval/reward_mean": 0.5})
    assert parse(report(tmp_path)).seen.count("svg") == 1


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("rollout/reward_mean", "Reward"),
        ("eval/reward_mean", "Reward"),
        ("rollout/response_len_mean", "Response length"),
        ("eval/response_len_mean", "Response length"),
        ("rollout/prompts_drawn", "Prompts drawn"),
        ("rollout/spread_fraction", "Prompts kept"),
        ("rollout/kept_fraction", "Prompts kept"),
        ("train/loss", "Loss"),
        ("train/kl", "KL"),
        ("train/grad_norm", "Gradient norm"),
        ("train/entropy", "Entropy"),
        ("train/ratio", None),
    ],
)
def test_a_chart_is_of_its_metric(tmp_path, key, title):
    """A curve under another one's title would be believed."""
    with MetricsLogger(tmp_path, LoggerConfig(wandb="disabled"), "r", {}, None) as logger:
        logger.log(1, {key: 0.5})
    assert re.findall(r"<figure><h3>(.*?)</h3>", report(tmp_path)) == [title] * bool(title)


def test_long_runs_and_many_phases_stay_small(tmp_path):
    with MetricsLogger(tmp_path, LoggerConfig(wandb="disabled"), "r", {}, None) as logger:
        for step in range(1000):
            logger.log(step, {f"perf/p{i}_s": 10.0 - i for i in range(10)})
    page = report(tmp_path)
    assert "mean of 17 steps" in page
    assert ">other</text>" in page
    assert ">p9</text>" not in page
    assert len(page) < 500_000


def test_a_rollout_beside_the_training_is_a_bar_of_its_own(tmp_path):
    """In the trainer's bar it takes no time but what is waited for it."""
    times = {"train": 3.0, "rollout_wait": 0.5, "rollout": 2.5, "overlap": 2.0, "step": 3.6}
    with MetricsLogger(tmp_path, LoggerConfig(wandb="disabled"), "r", {}, None) as logger:
        for step in range(4):
            logger.log(step, {f"perf/{name}_s": value for name, value in times.items()})
    labels = re.findall(r">([a-z][a-z_, ]+)</text>", report(tmp_path))
    found = {"whole step", "train", "rollout_wait", "rollout, beside"}
    assert set(labels) == found | {"step"}  # the axis


def test_the_same_run_gives_the_same_bytes(tmp_path):
    make_run(tmp_path)
    assert report(tmp_path) == report(tmp_path)


def test_missing_run_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere", title="", summary={}, config_yaml="")
