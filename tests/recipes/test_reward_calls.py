"""Rewards as users write them: async or not, one sample or several, one function or several."""

import json
import os

import pytest

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.data.reward_config import RewardConfig, RewardTerm
from samebit.recipes.data.reward_pool import load_reward
from samebit.recipes.data.rewards import RewardError, score
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.run.binding import bound_keys
from samebit.trainer.checkpoint import latest_checkpoint

FUNCTIONS = """
import asyncio, functools, math, os, signal, time

async def waits_for_the_next(text, problem):
    '''The last one ends first.'''
    if problem.index in done:
        await done[problem.index].wait()
    done[problem.index - 1].set()
    order.append(problem.index)
    return float(order.index(problem.index))

done, order = {i: asyncio.Event() for i in range(-1, 6)}, []

running = most = 0

async def counts(text, problem, *, keep=0):
    '''How many have run at the same time so far.'''
    global running, most
    running, most = running + 1, max(most, running + 1)
    for _ in range(5):
        await asyncio.sleep(0)
    running -= 1
    return most

async def acts(text, problem):
    if text == "hang":
        await asyncio.Event().wait()
    if text == "stubborn":
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass
    if text == "block":
        signal.pause()
    if text == "own":
        raise TimeoutError("the judge's")
    if text == "exit":
        raise SystemExit(3)
    if text == "_exit":
        os._exit(4)
    if text == "cancel":
        raise asyncio.CancelledError
    return float("nan") if text == "nan" else 1.0

def together(texts, problems, *, what="lengths"):
    if what == "nan":
        return [math.nan if text == "nan" else 0.0 for text in texts]
    if what == "few":
        return [0.0] * (len(texts) - 1)
    if what == "one":
        return 0.5
    if what == "set":
        return {1.0, 2.0}
    if what == "raise":
        raise KeyError("judge")
    return [len(texts) + len(text) / 100 + problem.index for text, problem in zip(texts, problems)]

async def together_later(texts, problems):
    await asyncio.sleep(0)
    return tuple(together(texts, problems))

loop = None

async def loops(text, problem):
    global loop
    loop = loop or asyncio.get_running_loop()
    return loop is asyncio.get_running_loop()

class Judge:
    async def __call__(self, text, problem):
        return 2

judge = Judge()
later = functools.partial(counts, keep=1)
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    """A module of a user."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "calls.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def scored(texts, **settings):
    pool = load_reward(RewardConfig(**settings))
    try:
        return score(pool, texts, [problem(i) for i in range(len(texts))])
    finally:
        pool.close()


def problem(index):
    return Problem(index=index, prompt="?", label="1", metadata={}, where=f"d.jsonl, line {index}")


def test_calls_of_an_async_function_end_in_any_order():
    found = scored(["x"] * 7, name="calls:waits_for_the_next", concurrency=7)
    assert found == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


@pytest.mark.parametrize(("concurrency", "most"), [(3, 3), (None, 20)])
def test_concurrency_is_bounded(concurrency, most):
    found = scored(["x"] * 20, name="calls:later", concurrency=concurrency)
    assert max(found) == most


def test_an_object_may_be_an_async_function():
    assert scored(["a", "b"], name="calls:judge") == [2.0, 2.0]


LATE = r"took longer than 0.5 s \(reward.timeout_s\) and was killed"
ASYNC = {
    "hang": LATE,
    "stubborn": LATE,
    "block": LATE,
    "own": "raised TimeoutError: the judge's",
    "exit": "raised SystemExit: 3",
    "_exit": "ended its process with exit code 4",
    "cancel": "raised CancelledError",
    "nan": "returned nan; return a finite number",
}


def test_what_an_async_function_does_wrong_is_told_of_its_sample():
    pool = load_reward(RewardConfig(name="calls:acts", timeout_s=0.5))
    for text, message in ASYNC.items():
        # What ends the process ends all calls in it: the first that has no answer is named.
        where = "problem . .*" if text in ("_exit", "block") else f"problem 1 .*completion '{text}'"
        with pytest.raises(RewardError, match=f"^the reward 'calls:acts' on {where}.*{message}"):
            score(pool, ["a", text, "b"], [problem(i) for i in range(3)])
    assert score(pool, ["a"], [problem(0)]) == [1.0]
    pool.close()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["calls:together", "calls:together_later"])
def test_batches_are_cut_by_place_alone(name, workers):
    """However many processes there are, a sample is judged with the same neighbours."""
    texts = ["x" * (i % 5) for i in range(11)]
    sizes = [4] * 8 + [3] * 3
    expected = [sizes[i] + len(t) / 100 + i for i, t in enumerate(texts)]
    assert scored(texts, name=name, batch_size=4, num_workers=workers) == expected


WRONG = {
    "nan": "on problem 3 .d.jsonl, line 3., completion 'nan' returned nan; return a finite number",
    "few": "on 2 completions, of d.jsonl, line 0: problem 0 to d.jsonl, line 1: problem 1, "
    "returned 1 rewards; return 2, one for each, in order",
    "one": "on 2 completions, .* returned 0.5; return a list of 2 numbers, one for each, in order",
    "set": "on 2 completions, .* returned {.*}; return a list of 2 numbers",
    "raise": "on 2 completions, .* raised KeyError: 'judge'",
}


def test_a_batch_that_is_scored_wrongly_is_named():
    texts = ["a", "b", "c", "nan"]
    for what, message in WRONG.items():
        settings = {"name": "calls:together", "batch_size": 2, "num_workers": 1}
        with pytest.raises(RewardError, match=message):
            scored(texts, args={"what": what}, **settings)


def test_terms_are_added_in_their_order():
    """0.1 + 0.7 + 0.2 in fp64 is another number than 0.7 + 0.2 + 0.1."""
    weights = {"exact_match": 0.1, "number_match": 0.7, "calls:together": 0.2}
    terms = [RewardTerm(name=name, weight=weight) for name, weight in weights.items()]
    terms[2].batch_size = 2
    terms[2].args = {"what": "lengths"}
    reward = load_reward(RewardConfig(terms=terms))
    texts, problems = ["1", "1.0", "2"], [problem(i) for i in range(3)]
    judged = [2.01, 2 + 3 / 100 + 1, 1 + 1 / 100 + 2]
    assert reward.labels == ("exact_match", "number_match", "together")
    assert reward.score_terms(texts, problems, lambda: None) == [[1, 0, 0], [1, 1, 0], judged]
    assert score(reward, texts, problems) == [
        0.1 + 0.7 + 0.2 * judged[0],
        0.0 + 0.7 + 0.2 * judged[1],
        0.2 * judged[2],
    ]
    with pytest.raises(RewardError, match="exact_match . number_match . together' on problem 0 .*"):
        reward.sums([[0.0], [0.0], [float("inf")]], ["x"], problems[:1])
    reward.close()


def test_terms_of_which_one_cannot_be_loaded_leave_no_process():
    import psutil

    before = set(psutil.Process().children(recursive=True))
    terms = [RewardTerm(name="calls:judge"), RewardTerm(name="calls:no_such")]
    with pytest.raises(ValueError, match="^reward.terms.1.name is 'calls:no_such', which cannot"):
        load_reward(RewardConfig(terms=terms))
    assert set(psutil.Process().children(recursive=True)) <= before


MINE = {"name": "calls:together"}
REFUSED = {
    "reward.batch_size is 0; give at least 1": {**MINE, "batch_size": 0},
    "reward.batch_size is 99999; it must be at most 16384": {**MINE, "batch_size": 99999},
    "reward.concurrency is -1; give at least 1": {**MINE, "concurrency": -1},
    "reward.batch_size is 2; it must be None": {"batch_size": 2},
    "reward.concurrency is 2; it must be None": {"name": "math_verify", "concurrency": 2},
    "reward.name is 'number_match'; .*reward.terms is given": {
        "name": "number_match",
        "terms": [RewardTerm()],
    },
    "reward.terms.1.label is 'exact_match'; .* not that of reward.terms.0": {
        "terms": [RewardTerm(), RewardTerm(weight=2.0)]
    },
    "reward.terms.0.weight is nan; it must be a number": {
        "terms": [RewardTerm(weight=float("nan"))]
    },
    "reward.terms.0.num_workers is 0": {"terms": [RewardTerm(name="a:b", num_workers=0)]},
    "reward.terms.0.timeout_s is 5.0": {"terms": [RewardTerm(timeout_s=5.0)]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_cannot_be_meant(message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**REFUSED[message])


def test_concurrency_is_for_async_functions():
    message = "reward.concurrency is 4, but 'calls:together' is no `async def`"
    with pytest.raises(ValueError, match=message):
        load_reward(RewardConfig(**MINE, batch_size=2, concurrency=4))


TERMS = "reward.terms=[{name: %s, concurrency: 4, batch_size: 5, args: {seed: %d}},"
TERMS += "{name: exact_match, weight: 0.0}]"


def later(runs, run_name, seed, *words, function="run_children:score_later"):
    """A run's words, whose reward's delays are drawn by the seed."""
    given = [w for w in runs.words if not w.startswith("reward.")]
    return [
        *("grpo", f"model.path={runs.model}", f"output_dir={runs.folder}", f"run_name={run_name}"),
        *("device=cpu", "logger=disabled", "data=reverse_digits", "data.args.length=2", *given),
        *(TERMS % (function, seed), *words),
    ]


def test_delays_of_a_users_reward_are_not_to_be_seen(runs, base):
    """Nor that it takes lists, is one of two terms, or fails in between."""
    for seed in (1, 2):
        assert main(later(runs, f"of_{seed}", seed)) == 0
    control = runs.folder / "fails"
    os.environ["SCORE_LATER_FAILS"] = str(control)
    try:
        control.touch()
        assert main(later(runs, "broken", 1, "trainer.checkpoint_every=1")) == 1
        control.unlink()
        done = latest_checkpoint(runs.folder / "broken" / "checkpoints").step
        assert main(later(runs, "broken", 1, "trainer.checkpoint_every=1", "resume=true")) == 0
    finally:
        del os.environ["SCORE_LATER_FAILS"]
    assert 0 < done < 6
    for name in ("of_1", "of_2", "broken"):
        summary = json.loads((runs.folder / name / "summary.json").read_text())
        assert summary == base.result[0]
        rows = runs.rows(name)
        for row, expected in zip(rows, base.result[1], strict=True):
            assert row.items() >= expected.items()
        assert rows[1]["rollout/reward_mean/score_later"] == rows[1]["rollout/reward_mean"]
        assert rows[1]["rollout/reward_mean/exact_match"] < 1


def test_how_terms_are_called_is_not_bound_and_what_they_are_is(runs):
    run = resolve("grpo", later(runs, "bound", 1)[1:])
    bound = {k: v for k, v in bound_keys(run).items() if k.startswith("reward.terms.")}
    assert set(bound) == {
        *(f"reward.terms.{i}.{key}" for i in (0, 1) for key in ("name", "weight", "label")),
        *(f"reward.terms.{i}.batch_size" for i in (0, 1)),
        "reward.terms.0.args.seed",
    }
    with pytest.raises(ConfigError, match="reward.terms"):
        resolve("grpo", [*later(runs, "bound", 1)[1:], "reward.terms=[{nam: exact_match}]"])


def test_the_event_loop_of_a_process_lives_as_long_as_it():
    """So that what a function keeps between calls, such as a session, stays usable."""
    pool = load_reward(RewardConfig(name="calls:loops"))
    for _ in range(2):
        assert score(pool, ["x"] * 3, [problem(i) for i in range(3)]) == [1.0] * 3
    pool.close()
