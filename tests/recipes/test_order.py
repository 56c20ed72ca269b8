"""Order of problems and sample ids: functions of indices alone."""

import itertools

import pytest

from samebit.recipes.data.order import SampleIds, problem_index, turn_id


def epoch(number, size, seed):
    return [problem_index(number * size + i, size, seed) for i in range(size)]


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_every_epoch_is_a_permutation(size):
    """A problem left out or drawn twice in an epoch would bias the training set."""
    for number in (0, 1, 5, 1000):
        assert sorted(epoch(number, size, seed=3)) == list(range(size))


def test_epochs_and_seeds_differ():
    """The same order every epoch would show each batch again together."""
    orders = [tuple(epoch(number, 50, seed)) for number in range(4) for seed in range(4)]
    assert len(set(orders)) == len(orders)


def test_seeds_do_not_share_epochs():
    """Seed s at epoch e must not be seed s - 1 at a later epoch."""
    orders = {tuple(epoch(number, 50, seed)) for seed in (0, 1) for number in range(200)}
    assert len(orders) == 400


def test_a_place_does_not_depend_on_the_places_asked_before():
    """A resumed run starts in the middle; the cache of permutations must not matter."""
    positions = [950, 3, 101, 99, 100, 3, 950, 0, 555]
    forward = {p: problem_index(p, 100, 7) for p in sorted(positions)}
    assert [problem_index(p, 100, 7) for p in positions] == [forward[p] for p in positions]


def test_the_order_is_pinned():
    """A changed shuffle would make every old run unrepeatable without a word."""
    assert epoch(0, 8, seed=0) == [4, 0, 7, 3, 2, 5, 1, 6]
    assert epoch(2, 8, seed=5) == [6, 2, 3, 5, 1, 0, 7, 4]
    three_epochs = [3, 4, 0, 1, 2, 1, 0, 2, 4, 3, 1, 0, 4, 2, 3]
    assert [problem_index(p, 5, seed=3) for p in range(15)] == three_epochs
    assert [problem_index(p, 5, seed=4) for p in range(10)] == [2, 3, 1, 4, 0, 2, 3, 4, 0, 1]


def test_ids_are_pinned():
    """1 bit for evaluation, 31 bits step, 20 bits prompt, 12 bits sample: other noise otherwise."""
    ids = SampleIds()
    assert ids.of_step(3, 2, 2) == [[3 << 32, (3 << 32) + 1], [(3 << 32) + 4096, (3 << 32) + 4097]]
    assert ids.of_step(0, 1, 2, evaluation=True) == [[1 << 63, (1 << 63) + 1]]
    of_step = ids.of_step(5, 2, 3)
    assert of_step == [[0x500000000 + i for i in range(3)], [0x500001000 + i for i in range(3)]]
    evaluation = ids.of_step(5, 1, 2, evaluation=True)
    assert evaluation == [[0x8000000500000000, 0x8000000500000001]]


def test_ids_are_unique_over_steps_prompts_samples_and_evaluation():
    """Two samples of one id would share their noise."""
    ids = SampleIds()
    groups = [
        ids.of_step(step, 5, 7, evaluation=evaluation)
        for step in (0, 1, 2, 1000, (1 << 31) - 1)
        for evaluation in (False, True)
    ]
    flat = [i for rows in groups for row in rows for i in row]
    assert len(flat) == len(set(flat)) == 5 * 2 * 5 * 7
    assert all(0 <= i < 1 << 64 for i in flat)
    assert [(len(rows), len(rows[0])) for rows in groups] == [(5, 7)] * 10


def test_an_id_is_a_function_of_its_indices():
    """A resumed run makes a new object and must give the same ids; more samples change none."""
    long, short = SampleIds(), SampleIds()
    for step in range(3):
        long.of_step(step, 5, 7)
    a, b = long.of_step(3, 5, 7), short.of_step(3, 2, 4)
    assert [row[:4] for row in a[:2]] == b


def test_the_largest_indices_do_not_run_over():
    """An overflow of one field into the next would repeat an id silently."""
    most = SampleIds()
    rows = most.of_step((1 << 31) - 1, 1 << 20, 1, evaluation=True)
    assert rows[-1][0] == (1 << 64) - (1 << 12)
    assert most.of_step(0, 1, 1 << 12)[0][-1] == (1 << 12) - 1
    for step, prompts, samples, name in (
        (1 << 31, 1, 1, "step = 2147483649"),
        (1, (1 << 20) + 1, 1, "prompts per step = 1048577"),
        (1, 1, (1 << 12) + 1, "samples per prompt = 4097"),
    ):
        with pytest.raises(ValueError, match=f"{name} exceed"):
            SampleIds().of_step(step, prompts, samples)


@pytest.mark.parametrize("evaluation", [False, True])
def test_ids_are_never_given_twice(evaluation):
    """Asking again for a step of this run, or for an earlier one, is a bug in a recipe."""
    ids = SampleIds()
    ids.of_step(4, 1, 1, evaluation=evaluation)
    for step in (4, 3, 0):
        with pytest.raises(ValueError, match=rf"step {step} \(evaluation={evaluation}\) were used"):
            ids.of_step(step, 1, 1, evaluation=evaluation)
    ids.of_step(4, 1, 1, evaluation=not evaluation)
    ids.of_step(5, 1, 1, evaluation=evaluation)


def test_ids_of_a_step_go_on_where_they_ended():
    """A refill's are those of a larger step, never those that a step has had."""
    whole, ids = SampleIds(), SampleIds()
    parts = ids.of_step(4, 3, 2) + ids.of_step(4, 2, 2, first_prompt=3)
    assert parts == whole.of_step(4, 5, 2)
    for first in (0, 4):
        with pytest.raises(ValueError, match="step 4"):
            ids.of_step(4, 1, 1, first_prompt=first)
    with pytest.raises(ValueError, match="prompts per step = 1048577 exceed"):
        ids.of_step(4, 1, 1, first_prompt=1 << 20)
    assert ids.of_step(5, 1, 1) == [[5 << 32]]


def test_a_refused_step_does_not_use_up_its_ids():
    """After an error about sizes the step can still be run."""
    ids = SampleIds()
    with pytest.raises(ValueError):
        ids.of_step(0, 1, 1 << 13)
    assert list(itertools.chain(*ids.of_step(0, 2, 1))) == [0, 1 << 12]


def test_ids_of_turns_are_all_different():
    """Of the last step that turns have room for, too."""
    last = (1 << 24) - 1
    bases = [0, 1, last << 32, 1 << 63 | last << 32 | 5]
    ids = {turn_id(base, turn) for base in bases for turn in range(128)}
    assert len(ids) == 4 * 128
    assert max(ids) < 1 << 64
    assert turn_id(77, 0) == 77
    for base, turn in ((1 << 56, 1), (0, 128), (0, -1)):
        with pytest.raises(ValueError, match=f"turn {turn} of sample 0x"):
            turn_id(base, turn)
