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
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import cast

from samebit.rollout.job import Job
from samebit.rollout.types import Completion

_BEGINNING = 64
"""Tokens of the shortest beginning by which a prompt is known; longer ones are longer by half,
so that a conversation is told from others that begin alike."""
_MOST_HOMES = 1 << 18
_FEWEST_SPARE = 8
"""So many more samples must one have than another for any to move: a step of few samples takes
hardly less with half of them."""
_LEAST_SPREAD = 0.25
"""Nothing moves unless longer samples are longer than half of all by so much of what another has to
compute again, in the mean; else what is left of them is not worth it (tests/programs/moving.py)."""
_NUM_LENGTHS = 1024
_LENGTHS_UNSEEN = 32  # so many more have to come before they are looked at anew


@dataclass(eq=False, slots=True)
class _Load[R]:
    """What a replica has to do."""

    replica: R
    order: int
    """Of two that have as many tokens the earlier one goes first."""
    jobs: dict[int, Job] = field(default_factory=dict)  # by number, in the order of their giving
    num_samples: int = 0
    num_tokens: int = 0


class _Lengths:
    """How long the last samples were that have ended."""

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=_NUM_LENGTHS)
        self._unseen = 0
        self._typical, self._excess = 0, 0.0

    def add(self, lengths: Iterable[int]) -> None:
        """Note more of them."""
        more = list(lengths)
        self._last.extend(more)
        self._unseen += len(more)
        if self._unseen >= min(_LENGTHS_UNSEEN, len(self._last)):
            self._unseen = 0
            self._look()

    def pay_for(self, num_prompt: int) -> bool:
        """Whether they differ enough for one to move that has so long a prompt."""
        return self._excess > 0 and self._excess >= _LEAST_SPREAD * (num_prompt + self._typical)

    def _look(self) -> None:
        """Find the length that half of them exceed, and by how much they do in the mean."""
        ordered = sorted(self._last)
        if longer := ordered[(len(ordered) + 1) // 2 :]:
            self._typical = ordered[(len(ordered) - 1) // 2]
            self._excess = sum(longer) / len(longer) - self._typical


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
        self._lengths = _Lengths()

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
        self.stay(load.jobs.values())
        for job in reversed(load.jobs.values()):
            job.num_samples = len(job.unfinished)
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
        job.next_home, job.has_begun = None, False
        self._count(load, job.num_samples, job.num_tokens)
        load.jobs[job.number] = job
        return load.replica, job

    def begun(self, replica: R, jobs: Iterable[Job]) -> None:
        """Note that a replica was asked to draw what it was given, unless it was taken from it."""
        if (load := self._loads.get(replica)) is not None:
            for job in jobs:
                job.has_begun |= load.jobs.get(job.number) is job

    def leave(self) -> tuple[R, list[Job]] | None:
        """Jobs that whoever draws them is to leave off, for another to go on with: nothing waits,
        and that one has at most half as many samples. Each is asked for once.

        Those that were given last come first, since least is computed again for them, and those
        that have moved not at all. The caller asks the replica, and calls `end` and `put_back` for
        each job that it leaves off, `stay` for the others. Meanwhile nothing else is to be left.
        """
        if self._waiting or self._leaving or len(self._loads) < 2 or not self._lengths.pay_for(0):
            return None
        least, *others = sorted(self._loads.values(), key=lambda load: load.num_samples)
        for most in reversed(others):
            if found := self._to_leave(most, least):
                self._leaving.update(found)
                return most.replica, found
        return None

    def stay(self, jobs: Iterable[Job]) -> None:
        """Have what was to be left off, and was not, stay where it is."""
        for job in self._leaving.intersection(jobs):
            self._leaving.discard(job)
            job.next_home = None

    def put_back(self, job: Job, number: int) -> None:
        """Have what is left of a job drawn before all that waits, by the one that it left for; by
        another number, since late messages may tell of the one before."""
        job.number = number
        self._waiting.appendleft(job)

    def free(self, replica: R, number: int, num_samples: int) -> None:
        """Note that so many more samples of a job have ended, not all: they take no room."""
        load = self._loads.get(replica)
        if load is not None and (job := load.jobs.get(number)) is not None:
            num_tokens = job.num_tokens
            job.num_samples -= num_samples
            self._count(load, -num_samples, job.num_tokens - num_tokens)

    def learn(self, group: Iterable[Completion]) -> None:
        """Note how long samples are that have ended."""
        self._lengths.add(c.num_tokens for c in group if c.finish_reason != "abort")

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

    def _to_leave(self, most: _Load[R], least: _Load[R]) -> list[Job]:
        """What one replica is to leave off for another."""
        spare = most.num_samples - least.num_samples
        found, left = list[Job](), min(spare // 2, self._room - least.num_samples)
        if spare < max(_FEWEST_SPARE, least.num_samples):
            return found
        for job in reversed(most.jobs.values()):
            pays = self._lengths.pay_for(len(job.request.prompt_ids))
            if job.can_move and job.num_samples <= left and pays:
                job.next_home, job.may_move = least.replica, False
                left -= job.num_samples
                found.append(job)
        return found

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
