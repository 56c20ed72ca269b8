"""Suffix: what is found in the texts of a prompt's samples, in those before, and what is kept."""

import itertools
import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pytest

from samebit.rollout.runtime.running_sample import RunningSample, Status
from samebit.rollout.speculative import prompt_library, prompt_texts, suffix, suffix_automaton
from samebit.rollout.speculative.proposer import Context
from samebit.rollout.speculative.suffix import Suffix
from samebit.rollout.speculative.suffix_automaton import SHORTEST, SuffixAutomaton
from samebit.rollout.types import Request, SamplingParams


def group(prompt, n=1, name="0"):
    request = Request(
        request_id=name,
        prompt_ids=tuple(prompt),
        params=SamplingParams(n=n),
        sample_ids=tuple(range(n)),
    )
    return RunningSample.of(request, iter(range(n)))


def context(sample, drawn=(), room=4):
    return Context(sample, 0, np.array([*sample.request.prompt_ids, *drawn], dtype=np.int32), room)


def guesses(proposer, *contexts):
    return [list(proposal.token_ids) for proposal in proposer.propose(contexts)]


def end(proposer, *samples):
    """They are finished, and the next step shows it."""
    for sample in samples:
        sample.status = Status.FINISHED
    proposer.propose([])


@pytest.mark.parametrize("hops", [1000, None])
@pytest.mark.parametrize("seed", range(4))
def test_the_longest_match_is_found_as_the_texts_grow(monkeypatch, seed, hops):
    """As by a search through all texts, of which some begin amid another; of equal ones the newest,
    where all suffixes are told of it."""
    if hops:
        monkeypatch.setattr(suffix_automaton, "_HOPS", hops)
    draw, automaton = random.Random(seed), SuffixAutomaton()
    texts, states, followed = [[]], [0], []
    for _ in range(250):
        which = draw.randrange(len(texts))
        if draw.random() < 0.02:
            texts.append([*texts[which]])
            states.append(states[which])
            continue
        text, token = texts[which], draw.randrange(2 + seed % 3)
        if draw.random() < 0.4 and len(text) > 9:
            token = text[-7]  # it repeats itself
        followed.append((tuple(text), token))
        states[which] = automaton.read(states[which], [token], len(followed) - 1)
        text.append(token)
        length, place = automaton.longest(states[which])
        most = max(common(text, before) for before, _ in followed)
        if most < SHORTEST:
            assert (length, place) == (0, -1)
            continue
        found = [i for i, (before, _) in enumerate(followed) if common(text, before) >= length]
        assert place in found
        if hops:
            assert (length, place) == (most, found[-1])


def common(text, other):
    """How many tokens at their ends are the same."""
    pairs = zip(reversed(text), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_it_goes_on_as_the_text_did():
    """From the longest match, the newest of equal ones; a loop is gone on with."""
    own = Suffix(None)
    [a] = group([9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 6, 7])
    assert guesses(own, context(a)) == [[]]
    assert guesses(own, context(a, [1, 2, 3])) == [[6, 7, 1, 2]], "the newest"
    [b] = group([9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 6, 7], name="1")
    end(own, a)
    assert guesses(own, context(b, [9, 1, 2, 3], room=2)) == [[4, 5]], "the longest"
    [c] = group([5, 6, 7], name="2")
    assert guesses(own, context(c, [6, 7, 6, 7, 6], room=5)) == [[7, 6, 7, 6, 7]], "a loop"
    assert guesses(own, context(c, [6, 7, 6, 7, 6], room=0)) == [[]]
    [d] = group([5, 6, 7, 5, 6], name="3")
    assert guesses(own, context(d, [7], room=5)) == [[5, 6, 7, 5, 6]], "from the prompt on"


def test_all_samples_of_a_prompt_are_read():
    """Of whatever request, as far as they are; those of another prompt are not."""
    own = Suffix(None)
    a, b = group([1, 2, 3], n=2)
    [same], [other] = group([1, 2, 3], name="1"), group([1, 2, 4], name="2")
    first = context(a, [4, 5, 6, 7, 8]), context(b), context(same), context(other)
    assert guesses(own, *first) == [[], [4, 5, 6, 7], [4, 5, 6, 7], []]
    assert guesses(own, context(b, [9, 4, 5, 6])) == [[7, 8]], "amid another continuation"
    assert guesses(own, context(other, [9, 4, 5, 6])) == [[]]
    a.token_ids += [4, 5, 6, 7, 8]  # it was preempted
    assert guesses(own, context(a, [4, 5, 6, 7, 8, 9, 4, 5])) == [[6]], "the longest"


def test_what_earlier_samples_drew_is_kept():
    """Once they are finished, also when nobody refers to them."""
    own = Suffix(None)
    [a], [b] = group([1, 2, 3]), group([1, 2, 3], name="1")
    own.propose([context(a, [4, 5, 6, 7, 8]), context(b, [7, 7, 4])])
    del b
    end(own, a)
    [later] = group([1, 2, 3], name="7")
    own.propose([context(later, [9])])  # reads what is kept
    assert own.matches([context(later, [9, 4, 5, 6])]) == [([7, 8], 3)]
    assert [len(kept) for kept in own._library.open(np.array([1, 2, 3], np.int32)).kept] == [5, 3]


def test_a_sample_that_goes_on_as_a_prompt_has_its_siblings():
    """As one that is drawn in parts; what it drew before is not kept twice."""
    own = Suffix(None)
    a, b = group([1, 2, 3], n=2)
    own.propose([context(a, [4, 5, 6, 7]), context(b, [8, 8, 8, 8, 9, 9])])
    end(own, a, b)
    [more] = group([1, 2, 3, 4, 5, 6, 7, 5], name="1")
    own.propose([context(more)])
    assert guesses(own, context(more, [6, 8, 8, 8])) == [[9, 9]]
    end(own, more)
    texts = own._library.open(np.array([1, 2, 3], np.int32))
    assert [kept.tolist() for kept in texts.kept] == [
        [8, 8, 8, 8, 9, 9],
        [4, 5, 6, 7, 5, 6, 8, 8, 8],
    ]
    [stranger] = group([1, 2, 3, 4, 9], name="2")
    own.propose([context(stranger)])
    assert len(own._library) == 2


def test_what_is_kept_is_bounded(monkeypatch):
    """Completions of a prompt: the newest; tokens of all: prompts that were not used for longest
    go, and none whose samples run."""
    monkeypatch.setattr(prompt_texts, "MOST_COMPLETIONS", 2)
    monkeypatch.setattr(prompt_library, "MOST_TOKENS", 40)
    own = Suffix(None)
    for i in range(9):
        [a] = group([1, 2, 3], name=str(i))
        own.propose([context(a, [i] * 4)])
        end(own, a)
    texts = own._library.open(np.array([1, 2, 3], np.int32))
    assert [kept.tolist() for kept in texts.kept] == [[7] * 4, [8] * 4]
    assert (own._library.num_tokens, texts.is_live) == (11, False)
    [live] = group([2, 2, 2], name="live")
    own.propose([context(live)])
    for i in range(9):
        [a] = group([1, 9, i], name=str(i))
        own.propose([context(a, [i] * 4), context(live)])
        end(own, a)
        assert own._library.num_tokens <= 40
    assert len(own._readers) == 1
    kept = [texts.prompt.tolist() for texts in own._library._known.values()]
    assert kept == [[2, 2, 2], [1, 9, 4], [1, 9, 5], [1, 9, 6], [1, 9, 7], [1, 9, 8]]
    assert own._library._lengths == {3: 6}


def test_a_prompt_that_is_never_idle_is_bounded(monkeypatch):
    """Its automaton is made anew, and its samples go on being guessed for."""
    monkeypatch.setattr(prompt_texts, "MOST_COMPLETIONS", 2)
    monkeypatch.setattr(prompt_texts, "_MOST_GONE", 6)
    own, stays = Suffix(None), group([1, 2, 3], name="stays")[0]
    most = 0
    for i in range(40):
        [a] = group([1, 2, 3], name=str(i))
        own.propose([context(a, [4, 5, 6, i, i]), context(stays, [9, 9])])
        a.status = Status.FINISHED
        own.propose([context(stays, [9, 9])])
        [(texts, _, _)] = own._readers.values()
        most = max(most, len(texts._texts))
    assert most <= 9
    own.propose([context(stays, [9, 9])])
    assert guesses(own, context(stays, [9, 9, 4, 5, 6])) == [[39, 39]]


def test_long_texts_are_read_in_parts(monkeypatch):
    """A step reads so much and no more, prompts first; nothing is guessed for a text before."""
    monkeypatch.setattr(suffix, "_BEHIND", 30)
    monkeypatch.setattr(suffix, "_DRAWN", 2)
    own, read = Suffix(None), []
    whole = SuffixAutomaton.read

    def counting(self, state, token_ids, place):
        read[-1] += len(token_ids)
        return whole(self, state, token_ids, place)

    monkeypatch.setattr(SuffixAutomaton, "read", counting)
    loop = [1, 2, 3, 4] * 25
    [a], [b] = group(loop), group([9, *loop], name="1")
    found = []
    for _ in range(12):
        read.append(0)
        found.append(guesses(own, context(a, [1, 2]), context(b, [1, 2])))
    assert max(read) <= 30 + 2 * 2
    assert sum(read) == 100 + 101 + 2 * 2
    assert found[0] == [[], []]
    assert found[-1] == [[3, 4, 1, 2]] * 2
    assert [[3, 4, 1, 2], []] in found
    end(own, a)
    read.append(0)
    [c] = group(loop, name="2")
    for _ in range(12):
        read.append(0)
        found = guesses(own, context(c, [5, 1, 2, 3]))
    assert found == [[4, 1, 2, 3]]


def test_prompts_of_one_hash_are_two(monkeypatch):
    """Tokens decide; the second one is not kept."""
    monkeypatch.setattr(prompt_library, "_BASE", np.uint64(1))
    own = Suffix(None)
    [a], [b] = group([1, 2, 3]), group([3, 2, 1], name="1")
    assert guesses(own, context(a, [4, 5]), context(b)) == [[], []]
    end(own, a, b)
    assert [texts.prompt for texts in own._library._known.values()] == [array("i", [1, 2, 3])]


def guess_much():
    """Guesses for samples that come and go, some of which their caller still refers to."""
    draw, own, found = random.Random(3), Suffix(None), []
    for turn in range(6):
        groups = [group([g, g + 1, 7], n=3, name=str((turn, g))) for g in range(4)]
        drawn = {sample: [] for samples in groups for sample in samples}
        for _ in range(30):
            shown = [context(s, ids) for s, ids in drawn.items() if draw.random() < 0.9]
            found.append(guesses(own, *shown))
            for ids in drawn.values():
                ids += [draw.randrange(3) for _ in range(draw.randrange(4))]
        kept = [sample for sample in drawn if draw.random() < 0.5]
        end(own, *drawn)
        del kept, drawn
    return found


def test_guesses_are_a_function_of_what_was_drawn():
    """In another process, too, whatever its hashes."""
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path += [{tests!r}, {tests + '/rollout'!r}]; import test_suffix as t; "
    told = subprocess.run(
        [sys.executable, "-c", code + "print(t.guess_much())"],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    found = guess_much()
    assert told.stdout.strip() == str(found)
    assert sum(map(bool, itertools.chain(*found))) > 999


def test_a_prompt_of_one_token_keeps_its_samples():
    """Whatever longer prompts came in between."""
    own = Suffix(None)
    [a] = group([7], name="a")
    own.propose([context(a, [1, 2, 3, 4])])
    own.propose([context(group([3, 4, 5], name="b")[0])])
    end(own, a)
    assert guesses(own, context(group([7], name="c")[0], [1, 2, 3])) == [[4]]


def test_a_prompt_that_is_not_read_says_nothing(monkeypatch):
    """That it has no guess for such a sample is no reason to ask it less often."""
    monkeypatch.setattr(suffix, "_BEHIND", 40)
    own, [sample] = Suffix(None), group(range(100))
    told = []
    for _ in range(4):
        own.propose([context(sample)])
        told.append(own.is_preparing)
    assert told == [True, False, False, False]


def test_nothing_is_held_at_rest():
    """Of finished samples; of others it is."""
    own, (a, b) = Suffix(None), group([1, 2], n=2)
    own.propose([context(a, [3, 4, 5]), context(b, [3])])
    a.status = Status.FINISHED
    own.rest()
    assert len(own._readers) == 1
    b.status = Status.FINISHED
    own.rest()
    assert not own._readers
    assert not own._library._known[next(iter(own._library._known))]._texts
