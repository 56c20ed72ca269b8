"""The metrics logger: exact rows, resume after a kill, and the mirrors in wandb and TensorBoard."""

import json
import math

import numpy as np
import pytest
import wandb
from helpers import file_size_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samebit.recipes.run.metrics import LoggerConfig, MetricsLogger, read_rows
from samebit.weight_sync.disk import write_atomically


def make(run_dir, resume_step=None, **config):
    config = LoggerConfig(**({"wandb": "disabled"} | config))
    return MetricsLogger(run_dir, config, "a run", {"seed": 1}, resume_step)


def test_rows_hold_floats_exactly_and_step_first(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 5e-324, "train/c": np.float32(0.1), "d": np.int64(2**53 + 1)}
    with make(tmp_path) as logger:
        logger.log(3, values | {"digest": "ab"})
        # Readable while the run goes on.
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 3, "a": ')
    assert text.endswith("}\n")
    row = json.loads(text)
    assert list(row) == ["step", "a", "b", "train/c", "d", "digest"]
    assert all(row[key] == value for key, value in values.items())


@pytest.mark.parametrize("value", [math.nan, -math.inf, None, [1.0]])
def test_a_value_that_is_no_finite_number_is_refused(tmp_path, value):
    with make(tmp_path) as logger:
        with pytest.raises(ValueError, match="metric 'train/loss' is"):
            logger.log(1, {"ok": 1.0, "train/loss": value})
        with pytest.raises(ValueError, match="'step' is taken"):
            logger.log(1, {"step": 1})
        if isinstance(value, float):
            with pytest.raises(ValueError, match="'reward'"):
                logger.log_samples(1, "eval", [{"reward": value}])
        with pytest.raises(ValueError, match=r"\['kind'\] are taken"):
            logger.log_samples(1, "eval", [{"kind": "x"}])
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert read_rows(tmp_path / "samples.jsonl") == []


def test_samples_are_limited(tmp_path):
    with make(tmp_path, num_samples=2) as logger:
        logger.log_samples(4, "eval", [{"completion": f"\u00e9\n{i}"} for i in range(5)])
    assert read_rows(tmp_path / "samples.jsonl") == [
        {"step": 4, "kind": "eval", "completion": f"\u00e9\n{i}"} for i in range(2)
    ]


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
    with make(tmp_path) as logger:
        for step in range(5):
            logger.log(step, {"x": step / 7})
            logger.log_samples(step, "eval", [{"completion": "c"}])
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_bytes()
    for torn in (b"", b'{"step": 5, "x": 0.7', b"\0\0\0\0", b'{"step": 5, "x": 0.7}'):
        metrics.write_bytes(whole + torn)
        make(tmp_path, resume_step=2).close()
        assert metrics.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    assert [row["step"] for row in read_rows(tmp_path / "samples.jsonl")] == [0, 1, 2]
    with make(tmp_path, resume_step=2) as logger:
        logger.log(3, {"x": 1.0})
    assert [row["step"] for row in read_rows(metrics)] == [0, 1, 2, 3]
    assert not list(tmp_path.glob(".*"))


def test_resumed_files_equal_those_of_a_run_without_a_stop(tmp_path):
    def run(logger, steps):
        with logger:
            for step in steps:
                logger.log(step, {"x": math.sin(step)})
                logger.log_samples(step, "eval", [{"completion": str(step), "reward": 1 / 3}])

    run(make(tmp_path / "straight"), range(6))
    run(make(tmp_path / "stopped"), range(5))
    with (tmp_path / "stopped/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "x"')
    run(make(tmp_path / "stopped", resume_step=2), range(3, 6))
    for name in ("metrics.jsonl", "samples.jsonl"):
        straight = (tmp_path / "straight" / name).read_bytes()
        assert (tmp_path / "stopped" / name).read_bytes() == straight


def test_without_resume_the_files_start_empty(tmp_path):
    with make(tmp_path) as logger:
        logger.log(1, {"x": 1.0})
    make(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    # Resuming a run that has no files yet is no error.
    make(tmp_path / "new", resume_step=3).close()


@pytest.mark.parametrize("damaged", ['{"step": 1, "x"', "[1]", '{"x": 1}'])
def test_damage_that_is_not_at_the_end_is_an_error(tmp_path, damaged):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{damaged}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged"):
        make(tmp_path, resume_step=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"wandb": "of"}, "logger.wandb is 'of'; give one of"), ({"num_samples": -1}, "is -1; give")],
)
def test_bad_configs(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", **config)
    assert not (tmp_path / "run").exists()


def test_write_atomically_replaces(tmp_path):
    for text in ("a long text\n", "b\n"):
        write_atomically(tmp_path / "x", text)
        assert (tmp_path / "x").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_wandb_offline_stays_in_the_run_folder(tmp_path, capfd, monkeypatch):
    """It gets every row as it is written to the file."""
    given, log = [], wandb.Run.log

    def logged(run, row, step):
        given.append(row)
        assert step == row["step"]
        return log(run, row, step=step)

    monkeypatch.setattr(wandb.Run, "log", logged)
    for resume_step in (None, 0):
        with make(tmp_path, resume_step, wandb="offline") as logger:
            logger.log(0 if resume_step is None else 1, {"x": 1.5})
            logger.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    # The same id both times, so that a sync joins them.
    assert len(runs) == 2
    assert len({path.name for path in runs}) == 1
    assert runs[0].name.startswith("run-a-run-")
    assert given == read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1]
    assert capfd.readouterr().out == ""


def scalars(folder):
    """What TensorBoard shows of a folder, as rows by step."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rows = {}
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            assert key not in rows.setdefault(event.step, {})
            rows[event.step][key] = event.value
    return rows


def in_fp32(rows):
    """Numbers of metrics.jsonl as TensorBoard's files hold them."""
    numbers = ({k: x for k, x in row.items() if not isinstance(x, str)} for row in rows)
    return {row.pop("step"): {k: float(np.float32(x)) for k, x in row.items()} for row in numbers}


def test_tensorboard_has_the_rows_of_the_file(tmp_path):
    """Once each, under the same names; also after a kill, whose later steps are drawn again."""

    def run(resume_step, steps, scale):
        logger = make(tmp_path, resume_step, tensorboard=True)
        for step in steps:
            row = {
                "train/loss": scale * math.sin(step),
                "rollout/a b": 2**24 + step,
                "digest": "ab",
            }
            logger.log(step, row | ({"eval/x": 0.1} if step % 2 == 0 else {}))
            found = scalars(tmp_path / "tensorboard")  # readable while the run goes on
            assert found == in_fp32(read_rows(tmp_path / "metrics.jsonl"))
        return logger  # left open, as by a kill

    left = [run(None, range(2), 1.0)]  # killed before its first checkpoint
    left.append(run(None, range(5), 2.0))
    left.append(run(2, range(3, 7), 3.0))
    run(6, [7], 4.0).close()
    assert set(scalars(tmp_path / "tensorboard")) == set(range(8))
    for logger in left:
        logger.close()


def test_a_full_disk_is_named(tmp_path):
    """An error without the file would leave the user guessing; whole rows stay readable."""
    logger = MetricsLogger(tmp_path, LoggerConfig(wandb="disabled"), "run", {}, None)
    logger.log(0, {"loss": 0.5})
    with file_size_limit(30), pytest.raises(OSError, match=r"File too large: .*metrics.jsonl"):
        logger.log(1, {"loss": 0.5})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0]
