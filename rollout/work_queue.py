"""WorkQueue: which replica of an engine draws which request. No torch here.

A request's samples stay together. A replica has at most so many unfinished samples, enough to be
busy; the others wait here, so whoever has room takes them, and a replica that ends early is never
idle while another has a queue. Room goes to the replica that has the fewest tokens yet to compute,
but to the one that had the longest beginning of the prompt before, where that is hardly busier: its
prefix cache holds it. Nothing of this can change what is drawn.
"""

import itertools
from array import array
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import cast

from samebit.rollout.parts import put_together, what_is_left
from samebit.rollout.types import Completion, Request

_BEGINNING = 64
"""Tokens of the shortest beginning by which a prompt is known; longer ones are longer by half,
so that a conversation is told from others that begin alike."""
_MOST_HOMES = 1 << 18
_FEWEST_SPARE = 8
"""So many more samples must one have than another for any to move: the other computes all that
stands before, and a step of few samples takes hardly less with half of them
(tests/programs/moving.py)."""


@dataclass(eq=False, slots=True)
class Job:
    """A request that waits, or that a replica draws."""

    request: Request
    number: int
    """Its own, by which a replica is asked to draw it."""
    answer: Callable[[list[Completion] | BaseException], object]
    """Is told of its samples, or why there are none."""
    is_wanted: bool = True
    """Whether anybody waits for it."""
    has_begun: bool = False
    """Whether a replica was asked to draw it."""
    next_home: Hashable = None
    """The replica that is to go on with it, where the one that draws it leaves off, or has."""
    outcome: list[Completion] | BaseException | None = None
    """What `answer` was told."""
    requests: tuple[Request, ...] = field(init=False)
    """What a replica is asked for: its request, or what others have left of that."""
    num_samples: int = field(init=False)
    """What it takes of a replica's room: those that have not ended."""
    _drawn: dict[int, Completion] = field(default_factory=dict)
    """What others have drawn, by sample ids."""

    def __post_init__(self) -> None:
        self.requests = (self.request,)
        self.wait()

    def wait(self) -> None:
        """Nobody draws it."""
        self.has_begun = False
        self.num_samples = len(self.unfinished)

    def settle(self, outcome: list[Completion] | BaseException) -> None:
        """Tell who waits for it."""
        self.outcome = outcome
        self.answer(outcome)

    def take(self, found: Sequence[Completion]) -> list[Completion] | None:
        """Its samples, with what a replica has made of `requests`; None: that one was to leave off,
        and another is to go on with what is left."""
        drawn, group = self._drawn, list(found)
        if drawn:
            ends = drawn | {c.sample_id: put_together(drawn[c.sample_id], c) for c in found}
            group = [ends[sample_id] for sample_id in self.request.sample_ids]
        if self.next_home is None or not (left := what_is_left(self.request, group)):
            return group
        self._drawn, self.requests = {c.sample_id: c for c in group}, tuple(left)
        return None

    def left_as_it_is(self) -> list[Completion]:
        """Its samples, whose rest nobody draws."""
        rest = [_nothing(self.request.request_id, sample_id) for sample_id in self.unfinished]
        group = self.take(rest)
        assert group is not None, "somebody is to go on with it"
        return group

    @property
    def unfinished(self) -> list[int]:
        """The ids of the samples that a replica is asked for."""
        return [sample_id for request in self.requests for sample_id in request.sample_ids]

    @property
    def can_move(self) -> bool:
        """Whether one can leave it off and another go on: what is drawn is in its completions."""
        request = self.request
        is_drawn = not request.score_only and not request.hidden_state_layers
        return self.has_begun and self.is_wanted and is_drawn

    @property
    def num_tokens(self) -> int:
        """The most that is computed for it."""
        request = self.request
        drawn = 0 if request.score_only else request.params.max_new_tokens
        return len(request.prompt_ids) + drawn * self.num_samples


def _nothing(request_id: str, sample_id: int) -> Completion:
    return Completion(
        request_id=request_id,
        sample_id=sample_id,
        token_ids=(),
        logprobs=(),
        finish_reason="abort",
        version_spans=(),
    )


@dataclass(eq=False, slots=True)
class _Load[R]:
    """What a replica has to do."""

    replica: R
    order: int
    """Of two that have as many tokens the earlier one goes first."""
    jobs: dict[int, Job] = field(default_factory=dict)  # by number, in the order of their giving
    num_samples: int = 0
    num_tokens: int = 0


def beginnings(prompt_ids: Sequence[int]) -> list[bytes]:
    """Digests of a prompt's beginnings, the shortest first; of a short prompt it is the whole."""
    words = memoryview(array("I", prompt_ids)).cast("B")
    digest, done, found, length = blake2b(digest_size=16), 0, [], min(_BEGINNING, len(prompt_ids))
    while length <= len(prompt_ids):
        digest.update(words[4 * done : 4 * length])
        found.append(digest.digest())
        done, length = length, length + max(_BEGINNING, length) // 2
    return found


class WorkQueue[R: Hashable]:
    """Jobs that wait, and those that replicas have. Not for several threads at once."""

    def __init__(self, room: int) -> None:
        """room: unfinished samples of a replica; a job of more is given to an idle one."""
        self._room = room
        self._waiting: deque[Job] = deque()
        self._loads: dict[R, _Load[R]] = {}
        self._orders = itertools.count()
        self._by_tokens: list[tuple[int, int, _Load[R]]] = []  # sorted: tokens, order
        self._homes: OrderedDict[bytes, R] = OrderedDict()  # by digests of prompts' beginnings
        self._leaving: set[Job] = set()

    @property
    def replicas(self) -> list[R]:
        """Those that take jobs."""
        return list(self._loads)

    def add(self, replica: R) -> None:
        """Let one take jobs from here on."""
        if replica not in self._loads:
            self._loads[replica] = load = _Load(replica, next(self._orders))
            self._by_tokens.append((0, load.order, load))
            self._by_tokens.sort()

    def remove(self, replica: R) -> bool:
        """Give none to it any more; what is wanted of what it had waits again, before all others.
        False: unknown."""
        if (load := self._loads.pop(replica, None)) is None:
            return False
        del self._by_tokens[self._place(load)]
        self._leaving.difference_update(load.jobs.values())
        for job in reversed(load.jobs.values()):
            job.next_home = None
            job.wait()
            if job.is_wanted:
                self._waiting.appendleft(job)
        return True

    def put(self, jobs: Iterable[Job]) -> None:
        """Queue jobs behind what waits."""
        self._waiting.extend(jobs)

    def drop(self, jobs: Iterable[Job]) -> list[tuple[R, Job]]:
        """Forget those that wait; the others, each behind who draws it."""
        unwanted = set(jobs)
        for job in unwanted:
            job.is_wanted, job.next_home = False, None
        kept = [job for job in self._waiting if job not in unwanted]
        unwanted.difference_update(self._waiting)
        self._waiting = deque(kept)
        loads = self._loads.items()
        return [(r, job) for r, load in loads for job in load.jobs.values() if job in unwanted]

    def drop_all(self) -> list[Job]:
        """Forget all that waits, which is returned."""
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def give(self) -> tuple[R, Job] | None:
        """The job whose turn it is and who is to draw it; None: nothing waits, or nobody has room.

        The caller has it drawn, and calls `end`.
        """
        if not self._waiting:
            return None
        job = self._waiting[0]
        load = next((load for *_, load in self._by_tokens if self._has_room(load, job)), None)
        if load is None:
            return None
        self._waiting.popleft()
        load = self._home_of(job, load)
        job.next_home = None
        self._count(load, job.num_samples, job.num_tokens)
        load.jobs[job.number] = job
        return load.replica, job

    def leave(self) -> list[tuple[R, Job]]:
        """Jobs that whoever draws them is to leave off, for another to go on with: nothing waits,
        and that one has at most half as many samples.

        Those that were given last come first, since least is computed again for them. The caller
        has them left off, calls `end`, and puts back what is left.
        """
        if self._waiting or self._leaving or len(self._by_tokens) < 2:
            return []
        least, most = self._by_tokens[0][-1], self._by_tokens[-1][-1]
        spare = most.num_samples - least.num_samples
        if spare < max(_FEWEST_SPARE, least.num_samples):
            return []
        found, left = [], min(spare // 2, self._room - least.num_samples)
        for job in reversed(most.jobs.values()):
            if job.can_move and job.num_samples <= left:
                job.next_home, left = least.replica, left - job.num_samples
                found.append((most.replica, job))
        self._leaving.update(job for _, job in found)
        return found

    def put_back(self, job: Job) -> None:
        """Have what is left of a job drawn before all that waits, by the one that it left for."""
        job.wait()
        self._waiting.appendleft(job)

    def free(self, replica: R, number: int, num_samples: int) -> None:
        """Note that so many more samples of a job have ended, not all: they take no room."""
        load = self._loads.get(replica)
        if load is not None and (job := load.jobs.get(number)) is not None:
            num_tokens = job.num_tokens
            job.num_samples -= num_samples
            self._count(load, -num_samples, job.num_tokens - num_tokens)

    def end(self, replica: R, number: int) -> Job | None:
        """Note that a replica is done with a job: that job, or None if it was taken from it."""
        load = self._loads.get(replica)
        job = None if load is None else load.jobs.pop(number, None)
        if load is not None and job is not None:
            self._count(load, -job.num_samples, -job.num_tokens)
            self._leaving.discard(job)
        return job

    def is_busy(self, replica: R) -> bool:
        """Whether it has jobs."""
        load = self._loads.get(replica)
        return load is not None and bool(load.jobs)

    def find(self, request_id: str) -> tuple[R | None, Job] | None:
        """The unfinished job of a request, and who draws it, if anybody."""
        for job in self._waiting:
            if job.request.request_id == request_id:
                return None, job
        for replica, load in self._loads.items():
            for job in load.jobs.values():
                if job.request.request_id == request_id:
                    return replica, job
        return None

    def _home_of(self, job: Job, load: _Load[R]) -> _Load[R]:
        """Who gets a job for which this one has room and the least to do; it is its home then."""
        known = beginnings(job.request.prompt_ids)
        homes = (self._loads.get(self._homes[x]) for x in reversed(known) if x in self._homes)
        home = next((home for home in homes if home and self._has_room(home, job)), load)
        chosen = self._loads.get(cast(R, job.next_home))
        if chosen is not None and self._has_room(chosen, job):
            load = chosen
        elif home.num_tokens <= load.num_tokens + job.num_tokens:
            load = home
        for beginning in known:
            self._homes[beginning] = load.replica
            self._homes.move_to_end(beginning)
        while len(self._homes) > _MOST_HOMES:
            self._homes.popitem(last=False)
        return load

    def _has_room(self, load: _Load[R], job: Job) -> bool:
        return load.num_samples + job.num_samples <= self._room or not load.jobs

    def _place(self, load: _Load[R]) -> int:
        """Of what it has in the order by tokens."""
        return bisect_left(self._by_tokens, (load.num_tokens, load.order))

    def _count(self, load: _Load[R], num_samples: int, num_tokens: int) -> None:
        """It has so many more."""
        del self._by_tokens[self._place(load)]
        load.num_samples += num_samples
        load.num_tokens += num_tokens
        insort(self._by_tokens, (load.num_tokens, load.order, load))
