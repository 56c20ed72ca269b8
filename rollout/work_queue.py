"""WorkQueue: which replica of an engine draws which request. No torch here.

A request's samples stay together. A replica has at most so many samples at a time, enough to be
busy; the others wait here, so whoever has room takes them, and a replica that ends early is never
idle while another has a queue. Room goes to the replica that has the fewest tokens yet to compute,
but to the one that had the longest beginning of the prompt before, where that is hardly busier: its
prefix cache holds it. Nothing of this can change what is drawn.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from samebit.rollout.runtime.call import uncancelled
from samebit.rollout.types import Completion, Request

_BEGINNING = 64
"""Tokens of the shortest beginning by which a prompt is known; longer ones are longer by half,
so that a conversation is told from others that begin alike."""
_MOST_HOMES = 1 << 18


@dataclass(eq=False, slots=True)
class Job:
    """A request that waits, or that a replica draws."""

    request: Request
    result: Future[list[Completion]] = field(default_factory=uncancelled)
    """Its samples; those who wait for it cannot cancel it."""
    abandon: Callable[[], Any] | None = None
    """Has the replica that draws it leave off."""

    @property
    def num_samples(self) -> int:
        """What it takes of a replica's room."""
        return len(self.request.sample_ids)

    @property
    def num_tokens(self) -> int:
        """The most that is computed for it."""
        request = self.request
        drawn = 0 if request.score_only else request.params.max_new_tokens * self.num_samples
        return len(request.prompt_ids) + drawn


@dataclass(eq=False, slots=True)
class _Load:
    """What a replica has to do."""

    jobs: dict[Job, None] = field(default_factory=dict)  # in the order in which they were given
    num_samples: int = 0
    num_tokens: int = 0


def beginnings(prompt_ids: Sequence[int]) -> list[bytes]:
    """Digests of a prompt's beginnings, the shortest first; of a short prompt it is the whole."""
    words = memoryview(array("q", prompt_ids)).cast("B")
    digest, done, found, length = blake2b(digest_size=16), 0, [], min(_BEGINNING, len(prompt_ids))
    while length <= len(prompt_ids):
        digest.update(words[8 * done : 8 * length])
        found.append(digest.digest())
        done, length = length, length + max(_BEGINNING, length) // 2
    return found


class WorkQueue[R: Hashable]:
    """Jobs that wait, and those that replicas have. Not for several threads at once."""

    def __init__(self, room: int) -> None:
        """room: samples that a replica has at a time; a job of more is given to an idle one."""
        self._room = room
        self._waiting: deque[Job] = deque()
        self._loads: dict[R, _Load] = {}
        self._homes: OrderedDict[bytes, R] = OrderedDict()  # by digests of prompts' beginnings

    @property
    def replicas(self) -> list[R]:
        """Those that take jobs."""
        return list(self._loads)

    def add(self, replica: R) -> None:
        """Let one take jobs from here on."""
        self._loads.setdefault(replica, _Load())

    def remove(self, replica: R) -> bool:
        """Give none to it any more; what it had waits again, before all others. False: unknown."""
        if (load := self._loads.pop(replica, None)) is None:
            return False
        for job in load.jobs:
            job.abandon = None
        self._waiting.extendleft(reversed(load.jobs))
        return True

    def put(self, jobs: Iterable[Job]) -> None:
        """Queue jobs behind what waits."""
        self._waiting.extend(jobs)

    def drop(self, jobs: Iterable[Job]) -> list[Job]:
        """Forget those that wait; the others."""
        unwanted = set(jobs)
        kept = [job for job in self._waiting if job not in unwanted]
        unwanted.difference_update(self._waiting)
        self._waiting = deque(kept)
        return [job for load in self._loads.values() for job in load.jobs if job in unwanted]

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
        job, loads = self._waiting[0], self._loads
        most = self._room - job.num_samples
        free = {r: load for r, load in loads.items() if load.num_samples <= most or not load.jobs}
        if not free:
            return None
        self._waiting.popleft()
        chosen = min(free, key=lambda replica: free[replica].num_tokens)
        known = beginnings(job.request.prompt_ids)
        home = next((h for x in reversed(known) if (h := self._homes.get(x)) in free), chosen)
        if free[home].num_tokens <= free[chosen].num_tokens + job.num_tokens:
            chosen = home
        for beginning in known:
            self._homes[beginning] = chosen
            self._homes.move_to_end(beginning)
        while len(self._homes) > _MOST_HOMES:
            self._homes.popitem(last=False)
        self._count(chosen, job, 1)
        self._loads[chosen].jobs[job] = None
        return chosen, job

    def end(self, replica: R, job: Job) -> bool:
        """Note that a replica is done with a job; False if it was taken from it."""
        load = self._loads.get(replica)
        if load is None or job not in load.jobs:
            return False
        del load.jobs[job]
        self._count(replica, job, -1)
        return True

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
            for job in load.jobs:
                if job.request.request_id == request_id:
                    return replica, job
        return None

    def _count(self, replica: R, job: Job, sign: int) -> None:
        load = self._loads[replica]
        load.num_samples += sign * job.num_samples
        load.num_tokens += sign * job.num_tokens
