"""Runs in a browser: pages whose numbers are those of metrics.jsonl, also while a run goes on."""

import http.client
import json
import re
import shutil
import threading

import pytest

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.run.kept_samples import MOST_SAMPLES, evenly
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.pages import CARDS, CHARTS, open_runs
from samebit.recipes.run.run_data import MOST_POINTS, thinned
from samebit.recipes.watch import WatchServer


def write(folder, steps=5, samples=3, **more):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": i, "train/loss": (i * 7919 % 1009) / 1000, "note": "x"} for i in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"kind": "eval", "prompt": "2+2", "completion": "4", "label": "4", "reward": 1.0} | more
    rest = json.dumps(given | {"reward": 0.25})[1:] + "\n"
    (folder / "samples.jsonl").write_text("".join(f'{{"step": {i}, {rest}' for i in range(samples)))
    return rows


def data_of(page):
    """What stands in a page for its script."""
    [text] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    return json.loads(text)


@pytest.fixture
def runs_of(tmp_path):
    for name in ("one", "other"):
        write(tmp_path / name)
    (tmp_path / "one" / "summary.json").write_text('{"reward_last": 0.5}')
    return tmp_path


def test_a_page_needs_nothing_else_and_has_every_number(runs_of, capsys):
    out = runs_of / "page.html"
    folders = [str(runs_of / name) for name in ("one", "other")]
    assert main(["report", *folders, f"out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = out.read_text()
    assert not re.search(r'(src|href)="|https?://(?!www.w3.org/2000/svg)|@import|url\(', page)
    assert "prefers-color-scheme: dark" in page
    data = data_of(page)
    assert [run["name"] for run in data["runs"]] == ["one", "other"]
    assert (data["charts"], data["cards"], data["live"]) == ([*CHARTS], [*CARDS], False)
    rows = read_rows(runs_of / "one" / "metrics.jsonl")
    one, other = data["runs"]
    assert one["series"] == {"train/loss": [[r["step"], r["train/loss"]] for r in rows]}
    assert one["samples"] == read_rows(runs_of / "one" / "samples.jsonl")
    assert (one["summary"], other["summary"]) == ({"reward_last": 0.5}, {})
    assert main(["report", *folders, f"out={out}"]) == 0  # over an earlier page
    assert out.stat().st_mode & 0o077 == 0


def test_texts_of_samples_end_no_script(tmp_path):
    evil = "</script><script>alert(1)</script><!--"
    write(tmp_path / "run", completion=evil)
    assert main(["report", str(tmp_path / "run"), f"out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "alert" in page
    assert page.count("</script>") == 2
    assert data_of(page)["runs"][0]["samples"][0]["completion"] == evil


def test_a_long_run_is_thinned_and_no_number_is_made(tmp_path):
    """10,000 steps and 100,000 samples: what is shown is of the files, with every extreme."""
    write(tmp_path / "long", steps=10_000, samples=100_000)
    [run] = open_runs([str(tmp_path / "long")], "runs")
    shown = run.shown()
    line, whole = shown["series"]["train/loss"], run._series["train/loss"]
    assert len(whole) == 10_000
    assert MOST_POINTS // 2 < len(line) <= MOST_POINTS
    assert set(line) <= set(whole)
    assert line == sorted(line)
    assert (line[0], line[-1], shown["last"]["train/loss"]) == (whole[0], whole[-1], whole[-1])
    values = [value for _, value in whole]
    assert {max(values), min(values)} <= {value for _, value in line}
    assert MOST_SAMPLES * 0.9 < len(shown["samples"]) <= MOST_SAMPLES
    assert shown["num_samples"] == 100_000
    assert (shown["samples"][0]["step"], shown["samples"][-1]["step"]) == (0, 99_999)
    assert len(json.dumps(shown)) < 1_000_000


def test_of_long_samples_fewer_are_shown(tmp_path):
    """As many as the page may hold, evenly over all, whatever their number and size."""
    for length, samples in ((20_000, 50), (200, 3000), (20_000, 1)):
        write(tmp_path / "run", samples=samples, completion="x" * length)
        [run] = open_runs([str(tmp_path / "run")], "runs")
        for most_bytes in (1, 100_000, 10_000_000):
            shown = run.shown(most_bytes)["samples"]
            steps, size = [s["step"] for s in shown], sum(len(json.dumps(s)) for s in shown)
            assert (steps[0], steps[-1]) == (0, samples - 1)
            assert steps == sorted(set(steps))
            if most_bytes > 1:
                assert size <= most_bytes
                assert size > most_bytes / 2 or len(steps) == samples
            else:
                assert len(steps) == min(samples, 2)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 12, 25, 1000])
def test_thinning_keeps_ends_and_order(count):
    line = [(i, float(i * 37 % 101)) for i in range(count)]
    found = thinned(line, 10)
    assert len(found) <= 10
    assert found == (line if count <= 10 else sorted(set(found)))
    assert (found[:1], found[-1:]) == (line[:1], line[-1:])
    items = evenly(line, 10)
    assert len(items) == min(count, 10)
    assert (items[:1], items[-1:]) == (line[:1], line[-1:])


def test_what_a_run_writes_is_followed(tmp_path):
    """A torn line waits; rows that a resume has cut back are gone."""
    write(tmp_path / "run", steps=3)
    [run] = open_runs([str(tmp_path / "run")], "runs")
    file = tmp_path / "run" / "metrics.jsonl"
    assert run.refresh() is False
    with file.open("a") as more:
        more.write('{"step": 3, "train/loss": 0.5}\n{"step": 4, "tra')
        more.flush()
        assert run.refresh() is True
        assert [step for step, _ in run.shown()["series"]["train/loss"]] == [0, 1, 2, 3]
        assert run.refresh() is False
        more.write('in/loss": 0.25}\n')
    assert run.refresh() is True
    assert run.shown()["last"]["train/loss"] == (4, 0.25)
    write(tmp_path / "run", steps=2)
    assert run.refresh() is True
    assert [step for step, _ in run.shown()["series"]["train/loss"]] == [0, 1]
    with file.open("a") as more:
        more.write("{}\n")
    for _ in range(2):  # as long as it is there, whatever comes behind it
        with pytest.raises(ValueError, match="metrics.jsonl, line 3 is damaged: no whole number"):
            run.refresh()
        with file.open("a") as more:
            more.write('{"step": 7, "train/loss": 1.5}\n')
    assert run.shown()["last"]["train/loss"][0] == 1
    file.write_text(file.read_text().replace("{}\n", '{"step": 6, "train/loss": 2.5}\n'))
    assert run.refresh() is True
    assert [step for step, _ in run.shown()["series"]["train/loss"]] == [0, 1, 6, 7, 7]
    written = write(tmp_path / "other", steps=30)
    file.write_text((tmp_path / "other" / "metrics.jsonl").read_text())  # another's, and longer
    assert run.refresh() is True
    assert len(run.shown()["series"]["train/loss"]) == len(written)
    file.unlink()
    write(tmp_path / "run", steps=40)
    assert run.refresh() is True
    assert len(run.shown()["series"]["train/loss"]) == 40
    shutil.rmtree(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="metrics.jsonl is gone"):
            run.refresh()


def test_a_page_follows_a_run_at_the_loopback(tmp_path):
    """Whole; then only what is new; then the run's end. Another site's page gets nothing."""
    folder = tmp_path / "run"
    write(folder)
    with WatchServer(open_runs([str(folder)], "runs"), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def get(path, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.getheader("ETag")

        assert server.address == f"http://127.0.0.1:{server.server_port}/"
        status, page, _ = get("/")
        assert (status, data_of(page)["live"]) == (200, True)
        status, text, tag = get("/data")
        assert json.loads(text) == data_of(page)
        assert get("/data", **{"If-None-Match": tag})[:2] == (304, "")
        with (folder / "metrics.jsonl").open("a") as more:
            more.write('{"step": 9, "train/loss": 0.125}\n')
        status, text, new = get("/data", **{"If-None-Match": tag})
        assert (status, json.loads(text)["runs"][0]["last"]) == (200, {"train/loss": [9, 0.125]})
        (folder / "summary.json").write_text('{"reward_last": 0.75}')
        status, text, _ = get("/data", **{"If-None-Match": new})
        assert (status, json.loads(text)["runs"][0]["summary"]) == (200, {"reward_last": 0.75})
        status, text, _ = get("/samples?runs=0&order=newest+first&page=0&words=2%2B2&kind=eval")
        assert (status, [s["sample"]["step"] for s in json.loads(text)["samples"]]) == (
            200,
            [2, 1, 0],
        )
        assert json.loads(get("/samples?runs=&page=3")[1]) == {
            "num_found": 0, "page": 0, "pages": 1, "samples": [],
        }  # fmt: skip
        status, text, _ = get("/samples?runs=0&order=best")
        assert (status, text[:34]) == (400, "order is 'best'; give one of newes")
        assert get("/samples?runs=x")[:2] == (400, "runs is 'x'; give whole numbers, by commas")
        assert get("/samples?a=1")[:2] == (400, "samples are not asked for by ['a']")
        assert get("/data", Host="evil.example:80")[0] == 403
        assert get("/metrics.jsonl")[0] == 404
        (folder / "metrics.jsonl").write_text("{}\n")
        status, text, _ = get("/data")
        assert status == 500
        assert "metrics.jsonl, line 1 is damaged" in text
        server.shutdown()


def test_samples_of_a_run_have_their_tokens(base):
    """Each with the log-prob that it was drawn with."""
    rows = read_rows(base.folder / "base" / "samples.jsonl")
    for row in rows:
        assert "".join(row["tokens"]).startswith(row["completion"])
        assert len(row["tokens"]) == len(row["logprobs"])
        assert all(logprob <= 0 for logprob in row["logprobs"])


WRONG = {
    "": "runs is []; it must be the folder of a run",
    "nowhere": "nowhere holds no metrics.jsonl of a run",
    ".": "holds no metrics.jsonl of a run; the runs in it: one, other",
    "one one": "runs has 'one' twice; give every run once",
    "one out=one/metrics.jsonl": "out is one/metrics.jsonl, which is there and is no page of",
    "one out=one": "out is one, which is there and is no page of",
    "one out=no/page.html": "No such file or directory: 'no/page.html'",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_run_is_named(runs_of, capsys, monkeypatch, words):
    monkeypatch.chdir(runs_of)
    before = (runs_of / "one" / "metrics.jsonl").read_bytes()
    assert main(["report", *words.split()]) in (1, 2)
    assert WRONG[words] in capsys.readouterr().err
    assert (runs_of / "one" / "metrics.jsonl").read_bytes() == before


def test_a_port_is_a_port():
    with pytest.raises(ConfigError, match="port is 65536; it must be 0 to 65535"):
        resolve("watch", ["runs=[a]", "port=65536"])
