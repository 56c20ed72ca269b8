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

from samebit.rollout.types import Completion, Request

_BEGINNING = 64
"""Tokens of the shortest beginning by which a prompt is known; longer ones are longer by half,
so that a conversation is told from others that begin alike."""
_MOST_HOMES = 1 << 18


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
    num_samples: int = field(init=False)
    """What it takes of a replica's room: those that have not ended."""

    def __post_init__(self) -> None:
        self.num_samples = len(self.request.sample_ids)

    @property
    def num_tokens(self) -> int:
        """The most that is computed for it."""
        request = self.request
        drawn = 0 if request.score_only else request.params.max_new_tokens
        return len(request.prompt_ids) + drawn * self.num_samples


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
        for job in reversed(load.jobs.values()):
            job.num_samples = len(job.request.sample_ids)
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
            job.is_wanted = False
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
        known = beginnings(job.request.prompt_ids)
        homes = (self._loads.get(self._homes[x]) for x in reversed(known) if x in self._homes)
        home = next((home for home in homes if home and self._has_room(home, job)), load)
        if home.num_tokens <= load.num_tokens + job.num_tokens:
            load = home
        for beginning in known:
            self._homes[beginning] = load.replica
            self._homes.move_to_end(beginning)
        while len(self._homes) > _MOST_HOMES:
            self._homes.popitem(last=False)
        self._count(load, job.num_samples, job.num_tokens)
        load.jobs[job.number] = job
        return load.replica, job

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
