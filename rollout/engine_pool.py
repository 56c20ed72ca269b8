"""EnginePool: several engines, each in a process of its own, as one client.

Requests wait in one queue (work_queue.py), which every replica takes from. A sample is a function
of its request and the weights. So one that has little left to do goes on with what another was to
leave off, and a replica that has died, or was silent for too long while somebody waited for it and
is killed, has its unfinished requests drawn by the others. It is replaced at once, and its
successor takes part from the next update on, which brings it the weights.
"""

import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

from samebit.kernels.memory import TagBytes
from samebit.rollout.client import Begun, Progress, Tell, awaited, result_of, stream_of
from samebit.rollout.engine_replicas import EngineReplicas
from samebit.rollout.job import Job
from samebit.rollout.messages import Done, Ended, Failed
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import RemoteEngineError, new_number
from samebit.rollout.request_client import RequestClient
from samebit.rollout.runtime.call import uncancelled
from samebit.rollout.runtime.requests import RequestFactory
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion, Increment, Request, SamplingParams
from samebit.rollout.work_queue import WorkQueue
from samebit.weight_sync.types import WeightVersion


class EnginePool(RequestClient):
    """An EngineClient; any thread may call it. Close it when done.

    Progress knows of a request's tokens when all are drawn. Raises RemoteEngineError where no
    replica is left, or more have died than may.
    """

    def __init__(
        self,
        start: Callable[[int], RemoteEngine],
        num_replicas: int,
        room: int,
        timeout_s: float = 600.0,
        max_restarts: int = 3,
        start_timeout_s: float = 1800.0,
    ) -> None:
        """start: launches the replica of a place, below num_replicas; it need not have started.
        room: unfinished samples that one has at a time. timeout_s: a replica that draws or is asked
        something and has no step to show for so long is killed; a step that compiles kernels takes
        long. max_restarts: replicas that may die. start_timeout_s: one that is launched and has not
        started in so long is killed.

        Raises what `start` and the start of an engine do.
        """
        self._queue = WorkQueue[RemoteEngine](room)
        limits = timeout_s, max_restarts, start_timeout_s
        self._replicas = EngineReplicas(start, num_replicas, self._queue, *limits)
        self._lock = self._replicas.lock  # of the queue
        self._num_moves = 0
        try:
            told = self._replicas.ask_started(RemoteEngine.limits)
        except BaseException:
            self.close()
            raise
        kv_capacity = min(limit["kv_capacity"] for limit in told)
        self._factory = RequestFactory(**told[0] | {"kv_capacity": kv_capacity})

    @property
    def replicas(self) -> tuple[RemoteEngine, ...]:
        """Those that an update is for, and that draw behind it; who updates them asks.

        It waits for the successors of the dead; one that dies as it starts has a successor too.
        Raises what else the start of one raised, or RemoteEngineError if more have died than may.
        """
        return self._replicas.all_started()

    @property
    def living(self) -> tuple[RemoteEngine, ...]:
        """Those that draw."""
        return self._replicas.living

    @property
    def num_restarts(self) -> int:
        """How many replicas have died so far."""
        return self._replicas.num_restarts

    @property
    def num_moves(self) -> int:
        """How many requests a replica has left off for another to go on with, so far."""
        return self._num_moves

    # -- what is drawn ---------------------------------------------------------------------------

    @property
    def _requests(self) -> RequestFactory:
        return self._factory

    def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Increment, None]:
        """See Engine.stream; an increment is a whole sample, once its request's are drawn."""

        def begin(tell: Tell) -> Begun[list[list[Completion]]]:
            requests = self._requests.generation(
                prompt_ids, sampling_params, sample_ids, (), fresh_ids=True
            )
            return self._begin(requests, lambda group: tell([c.as_increment() for c in group]))

        return stream_of(begin)

    def abort_request(self, request_id: str) -> list[Completion]:
        """See Engine.abort_request. One that no replica has begun has drawn nothing."""
        # Until there is one, who drew it has died, or is yet to be asked: it is looked for anew.
        while (job := self._aborted(request_id)).outcome is None:
            time.sleep(0.001)
        if isinstance(job.outcome, BaseException):
            raise job.outcome
        if all(completion.finish_reason != "abort" for completion in job.outcome):
            raise KeyError(request_id)  # it has ended by itself
        return job.outcome

    def _aborted(self, request_id: str) -> Job:
        """The job of a request, which whoever draws it was asked to abort. KeyError: unknown."""
        with self._lock:
            if (found := self._queue.find(request_id)) is None:
                raise KeyError(request_id)
            engine, job = found
            job.may_move, job.next_home = False, None
            if engine is None:
                self._queue.drop([job])
        if engine is None:
            job.settle(job.left_as_it_is())
            return job
        with suppress(RemoteEngineError):
            self._replicas.ask(engine, lambda e: e.abandon(job.number).result())
        return job  # what it has drawn came before that answer

    # -- what is served --------------------------------------------------------------------------

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return self._replicas.ask_first(lambda engine: engine.weight_version)

    @property
    def draft_version(self) -> WeightVersion | None:
        """See Engine.draft_version; of the first replica."""
        return self._replicas.ask_first(lambda engine: engine.draft_version)

    @property
    def accept_lengths(self) -> AcceptLengths | None:
        """Those of the replicas that live; see Engine.accept_lengths."""
        told = self._replicas.ask_each(self.living, lambda engine: engine.accept_lengths)
        lengths = [found for found in told if found is not None]
        return sum(lengths[1:], lengths[0]) if lengths else None

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """See Engine.update_weights_from_disk."""
        return self._replicas.ask_started(
            lambda engine: engine.update_weights_from_disk(model_path, step)
        )[0]

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self._replicas.ask_each(self.living, RemoteEngine.flush_cache)

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """See Engine.release_memory_occupation; the bytes are those of all replicas."""
        return self._total(lambda engine: engine.release_memory_occupation(tags))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """See Engine.resume_memory_occupation; the bytes are those of all replicas."""
        return self._total(lambda engine: engine.resume_memory_occupation(tags))

    def _total(self, question: Callable[[RemoteEngine], dict[str, int]]) -> dict[str, int]:
        """The sums of what the replicas answer."""
        if parts := self._replicas.ask_each(self.living, question):
            return {tag: sum(part[tag] for part in parts) for tag in parts[0]}
        raise self._replicas.exhausted()

    def memory_occupation(self) -> dict[str, TagBytes]:
        """See Engine.memory_occupation; of the first replica."""
        return self._replicas.ask_first(RemoteEngine.memory_occupation)

    def close(self) -> None:
        """End all processes, and with them what is unfinished."""
        self._replicas.close()

    # -- who draws it ----------------------------------------------------------------------------

    def _drawn(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        num_done, num_tokens = 0, 0

        def count(group: list[Completion]) -> None:
            nonlocal num_done, num_tokens
            num_done += len(group)
            num_tokens += sum(c.num_tokens for c in group)

        tell = None if progress is None else lambda: progress(num_done, num_tokens)
        groups = awaited(self._begin(requests, count), tell)
        if tell is not None:
            tell()
        return groups

    async def _adrawn(self, requests: Sequence[Request]) -> list[list[Completion]]:
        return await result_of(*self._begin(requests))

    def _begin(
        self, requests: Sequence[Request], tell: Callable[[list[Completion]], object] | None = None
    ) -> Begun[list[list[Completion]]]:
        """Queue requests; their groups to come, and what abandons them. tell: called with each."""
        call = _Call(requests, tell, self._abandon)
        with self._lock:
            self._replicas.admit()
            self._queue.put(call.jobs)
        self._give_out()
        return call.result, partial(self._abandon, call.jobs)

    def _abandon(self, jobs: Sequence[Job]) -> Future[None]:
        with self._lock:
            begun = self._queue.drop(jobs)
        self._have_aborted(begun)
        ended: Future[None] = uncancelled()
        ended.set_result(None)
        return ended

    def _give_out(self) -> None:
        """Have what waits drawn, as far as there is room."""
        while True:
            given: dict[RemoteEngine, list[Job]] = {}
            with self._lock:
                while (pair := self._queue.give()) is not None:
                    given.setdefault(pair[0], []).append(pair[1])
                lost = [] if given or self._queue.replicas else self._queue.drop_all()
            if not given:
                break
            for engine, jobs in given.items():
                self._have_drawn(engine, jobs)
        for job in lost:
            job.settle(self._replicas.exhausted())
        self._move()

    def _have_drawn(self, engine: RemoteEngine, jobs: Sequence[Job]) -> None:
        try:
            engine.draw({job.number: job.requests for job in jobs}, partial(self._take, engine))
        except RemoteEngineError as error:
            self._replicas.bury(engine, error)
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            for job in jobs:
                self._take(engine, job.number, Failed(error))
        with self._lock:
            self._queue.begun(engine, jobs)
            abandoned = [job for job in jobs if not job.is_wanted]
        self._have_aborted([(engine, job) for job in abandoned])  # before it was asked, maybe

    def _have_aborted(self, begun: Sequence[tuple[RemoteEngine, Job]]) -> None:
        """Have jobs aborted that nobody waits for."""
        for engine, job in begun:
            with suppress(RemoteEngineError):  # nobody draws it any more
                engine.abandon(job.number)

    def _move(self) -> None:
        """Have a replica leave off what another is to go on with, if there is anything."""
        with self._lock:
            leaving = self._queue.leave()
        if leaving is None:
            return
        engine, jobs = leaving

        def stay(_answer: object) -> None:  # it comes behind those of the jobs that are left off
            with self._lock:
                self._queue.stay(jobs)

        try:
            engine.leave_off([job.number for job in jobs]).add_done_callback(stay)
        except RemoteEngineError as error:
            self._replicas.bury(engine, error)

    def _take(self, engine: RemoteEngine, number: int, answer: Done | Failed | Ended) -> None:
        """What a replica has made of the job of a number, or what has ended of several."""
        match answer:
            case Ended(ended):
                with self._lock:
                    for each, num_samples in ended.items():
                        self._queue.free(engine, each, num_samples)
            case Failed(RemoteEngineError() as error):
                self._replicas.bury(engine, error)
            case Done() | Failed():
                self._end(engine, number, answer)
        self._give_out()

    def _end(self, engine: RemoteEngine, number: int, answer: Done | Failed) -> None:
        """A replica is done with a job, or was to leave it off and has."""
        with self._lock:
            if (job := self._queue.end(engine, number)) is None:
                return
            found = answer.error if isinstance(answer, Failed) else job.take(answer.value)
            if found is None:
                self._queue.put_back(job, new_number())
                self._num_moves += 1
            elif not isinstance(found, BaseException) and not job.request.score_only:
                self._queue.learn(found)
        if found is not None:
            job.settle(found)


class _Call:
    """Requests of one caller, and where it gets the groups of all."""

    def __init__(
        self,
        requests: Sequence[Request],
        tell: Callable[[list[Completion]], object] | None,
        abandon: Callable[[Sequence[Job]], object],
    ) -> None:
        """tell: called with each group. abandon: with all jobs, when one has failed."""
        self.result: Future[list[list[Completion]]] = uncancelled()
        self.jobs = [
            Job(request, new_number(), partial(self._take, place))
            for place, request in enumerate(requests)
        ]
        self._groups: list[list[Completion]] = [[] for _ in requests]
        self._tell, self._abandon = tell, abandon
        self._left, self._lock = len(requests), threading.Lock()
        if not requests:
            self.result.set_result([])

    def _take(self, place: int, found: list[Completion] | BaseException) -> None:
        with self._lock:  # one of them at a time, and none after the first error
            if self.result.done():
                return
            if not isinstance(found, BaseException):
                try:
                    self._groups[place], self._left = found, self._left - 1
                    if self._tell is not None:
                        self._tell(found)
                    if not self._left:
                        self.result.set_result(self._groups)
                    return
                except Exception as error:  # noqa: BLE001 - of who is told
                    found = error
            self.result.set_exception(found)
        self._abandon(self.jobs)
