"""A user's reward or generate function that does wrong ends a run with a precise error; the run
goes on from its last checkpoint to the bytes that it would always have had."""

import re

import pytest

from samebit.recipes.data.conversation import GenerateError
from samebit.recipes.data.order import SampleIds
from samebit.recipes.data.rewards import RewardError

FUNCTIONS = """
import math, os, signal
from pathlib import Path
from run_children import score_digits, two_turns

calls = []

def score(texts, problems, *, control):
    '''Does wrong in its fifth call in a process, as the file says.'''
    calls.append(1)
    found = [score_digits(t, p, control="/no") for t, p in zip(texts, problems)]
    fault = Path(control).read_text() if len(calls) == 5 else ""
    if fault == "raises":
        raise KeyError("no such unit")
    while fault == "hangs":
        signal.pause()
    if fault == "exits":
        os._exit(4)
    if fault == "nan":
        return [*found[:-1], math.nan]
    return found[:-1] if fault == "few" else found

async def turns(engine, request, params, *, control):
    '''Does wrong with one sample, as the file says.'''
    fault, sample_id = Path(control).read_text().split()
    sample = await two_turns(engine, request, params)
    if int(sample_id) == request.sample_id and fault == "invents":
        begin = len(request.prompt_ids)  # then the first turn, and the label's token, masked
        sample.loss_mask[begin + sample.loss_mask[begin:].tolist().index(False)] = True
    if int(sample_id) == request.sample_id and fault == "full":
        await engine.draw([*request.prompt_ids, *[1] * request.max_new_tokens], params)
    return sample
"""
REWARDS = {
    "raises": "on 4 completions, of problem .* raised KeyError: 'no such unit'",
    "hangs": r"took longer than 1 s \(reward.timeout_s\) and was killed",
    "exits": "ended its process with exit code 4",
    "nan": "returned nan; return a finite number",
    "few": "returned 3 rewards; return 4, one for each, in order",
}
MASK = "with its loss mask set, but the engine did not draw it there after these tokens: mask it"
FULL = "draws turn 3 after the context is full: it has 6 tokens after the prompt, and rollout.max"
TURNS = {"invents": MASK, "full": FULL}


@pytest.fixture
def control(tmp_path, monkeypatch):
    """A file that says which fault there is; and a module of a user."""
    (tmp_path / "own_faults.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "fault"


@pytest.mark.long
def test_a_run_survives_every_fault_of_a_reward(runs, base, control):
    """One in each of five steps: it is told, and the next process goes on a step further."""
    words = ["reward.name=own_faults:score", f"reward.args.control={control}"]
    words += ["reward.batch_size=4", "reward.timeout_s=1", "trainer.checkpoint_every=1"]
    for step, (fault, message) in enumerate(REWARDS.items(), 1):
        control.write_text(fault)
        with pytest.raises(RewardError, match=f"^the reward 'own_faults:score' .*{message}"):
            runs.train("run", *words, "resume=true")
        assert runs.rows("run")[-1]["step"] == step
    control.write_text("none")
    assert runs.train("run", *words, "resume=true") == base.result


@pytest.mark.parametrize("fault", ["full", pytest.param("invents", marks=pytest.mark.long)])
def test_a_run_survives_the_faults_of_a_generate_function(runs, control, fault):
    """Of one sample of its second step."""
    words = ["trainer.num_steps=2", "trainer.checkpoint_every=1"]
    whole = runs.train("whole", *words, "rollout.generate=run_children:two_turns")
    words += ["rollout.generate=own_faults:turns", f"rollout.generate_args.control={control}"]
    sample_id = SampleIds().of_step(1, 3, 4)[1][2]
    control.write_text(f"{fault} {sample_id}")
    where = f"^rollout.generate 'own_faults:turns' on problem .*, sample {sample_id:#x}, "
    with pytest.raises(GenerateError, match=f"{where}.*{re.escape(TURNS[fault])}"):
        runs.train("run", *words, "resume=true")
    assert runs.rows("run")[-1]["step"] == 1
    control.write_text("none 0")
    assert runs.train("run", *words, "resume=true") == whole
