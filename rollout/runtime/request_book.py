"""RequestBook: the requests that are unfinished, and who waits for them.

One thread at a time uses it, between steps: the one that drives (engine_loop.py).
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch

from samebit.kernels.reduce import RankGroup
from samebit.rollout.messages import (
    AbortRequest,
    Admit,
    Asked,
    Continue,
    Drain,
    FlushCache,
    Leave,
    Pause,
    RankMessage,
    Step,
)
from samebit.rollout.runtime.call import Call
from samebit.rollout.runtime.lockstep import Lockstep
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.runtime.step_loop import StepLoop
from samebit.rollout.runtime.weight_control import WeightControl
from samebit.rollout.types import Completion, Request

LEAST_LEFT = 0.25
"""What may be left of a sample that another engine goes on with, over what that computes again: a
token takes so much less in a prompt than as a step's."""


@dataclass
class LiveRequest:
    """A request that is not reported yet. Without a call, `step_and_report` reports it."""

    samples: list[RunningSample]
    call: Call | None


class RequestBook:
    """Takes requests in, and gives callers what steps draw for them.

    What a step raises is raised to every caller, whose requests end with it. Requests without a
    caller are kept: their next step begins again from what has arrived.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step_loop: StepLoop,
        slots: Slots,
        weights: WeightControl,
        device: torch.device,
        ranks: RankGroup,
    ) -> None:
        self._scheduler = scheduler
        self._step_loop = step_loop
        self._slots = slots
        self._weights = weights
        self.device = device
        self.lockstep = Lockstep(ranks)
        self.live: dict[str, LiveRequest] = {}
        self.calls: dict[Call, None] = {}  # those without a result, in order
        self._streams: dict[Call, None] = {}  # of them, those that are told every step
        self._reports: list[list[Completion]] = []  # the next step's
        self._arrivals = itertools.count()
        self.is_paused = False  # no step runs; what comes is queued
        self._paused_at = weights.version

    @property
    def has_unfinished(self) -> bool:
        """Whether `step_and_report` has anything to do or to report."""
        return self._scheduler.has_unfinished or bool(self._reports)

    @property
    def num_drawn(self) -> int:
        return self._step_loop.num_drawn

    def admit(self, call: Call, alone: bool = False) -> None:
        """Queue a call's requests; `alone`: the other ranks get no such call of their own.

        Raises WeightSyncError while the weights are not one whole version, unless it is paused, and
        RuntimeError for a call alone that the other ranks would not hear of.
        """
        try:
            if alone:
                self.lockstep.require_one_order()
            self._require_ready()
        except RuntimeError as error:
            call.result.set_exception(error)
            raise
        self.lockstep.say(Admit(tuple(call.requests), waits=True))
        self.calls[call] = None
        for request in call.requests:
            call.samples += self._queue(request, call)
        if call.tell is not None:
            self._streams[call] = None
            call.num_told = dict.fromkeys(call.samples, 0)
        self._settle(call)

    def admit_for_step(self, request: Request) -> None:
        """Queue a request that `step_and_report` reports. Raises as `admit` does."""
        self._require_ready()
        self.lockstep.say(Admit((request,), waits=False))
        self._queue(request, None)

    def step(self) -> None:
        self._take(self._step)

    def step_and_report(self) -> list[list[Completion]]:
        """Run one step; the groups of the requests without a caller that are newly finished.

        Raises RuntimeError while it is paused and there is none.
        """
        if not self.is_paused:
            self.step()
        elif not self._reports:
            raise RuntimeError("generation is paused; continue_generation lets it go on")
        reports, self._reports = self._reports, []
        return reports

    def abort_request(self, request_id: str) -> list[Completion]:
        """End a request; its samples as far as they are. KeyError if it is not unfinished."""
        if request_id in self.live:
            self._drain()
        if request_id not in self.live:
            raise KeyError(f"no unfinished request '{request_id}'")
        return self._abort(request_id)

    def abandon(self, call: Call) -> None:
        """Its caller has gone: abort what is unfinished of its requests."""
        if call not in self.calls:
            return
        try:
            self._drain()  # some may end by themselves
        finally:
            for request in call.requests:
                if request.request_id in self.live:
                    self._abort(request.request_id)

    def leave_off(self, calls: Iterable[Call]) -> None:
        """Abort those calls of which enough may be left that another engine had better go on with
        them: so much that it is worth computing what stands before once more."""
        self._drain()  # some may end by themselves
        for call in calls:
            if call in self.calls and any(map(self._is_worth_leaving, call.samples)):
                self.abandon(call)

    def _is_worth_leaving(self, sample: RunningSample) -> bool:
        count = self._slots.num_drawn(sample)
        left = sample.request.params.max_new_tokens - count
        return sample.finish_reason is None and left >= LEAST_LEFT * (sample.prompt_len + count)

    def abandon_all(self) -> None:
        """Abort everything that callers wait for."""
        for call in list(self.calls):
            self.abandon(call)

    def fail_all(self, error: BaseException) -> None:
        """Raise what a step raised to all callers, and end their requests."""
        with suppress(Exception):  # what else is in flight may fail too, and then is forgotten
            self._report(self._step_loop.drain())
        for call in list(self.calls):
            for request in call.requests:
                if self.live.pop(request.request_id, None) is not None:
                    self._scheduler.abort(request.request_id)
            self._forget(call)
            call.result.set_exception(error)

    def pause(self, mode: str, alone: bool = False) -> None:
        """Take no steps. What is unfinished: "abort" ends it, "retract" has it computed anew later,
        "keep" leaves it as it is.

        Raises RuntimeError if the other ranks pause, alone, at another step.
        """
        if alone:
            self.lockstep.require_one_order()
        self._drain()
        if mode == "abort":
            for request_id, live in list(self.live.items()):
                group = self._abort(request_id)
                if live.call is None:
                    self._reports.append(group)
        self.lockstep.say(Pause(mode))
        self._pause(mode)

    def go_on(self) -> None:
        """Take steps again. Raises WeightSyncError, and stays paused, without whole weights."""
        if not self.is_paused:
            return
        self._weights.require_ready()
        self.lockstep.say(Continue())
        if self._weights.version != self._paused_at:
            self._scheduler.keep_all()
        self.is_paused = self._weights.gate.is_paused = False

    def flush_cache(self) -> None:
        self.lockstep.say(FlushCache())
        self._weights.flush_cache()

    def stop_leading(self, marks: Callable[[], tuple[int, int]]) -> None:
        """Abort everything and let the other ranks go; see Leave."""
        try:
            with suppress(Exception):  # if a step in flight fails, those who wait are told
                self.abandon_all()
            self.lockstep.say(Leave(*marks()))
            self.lockstep.meet()
        finally:
            self.lockstep.leads = False

    def ask[T](self, number: int, call: Callable[[], T]) -> T:
        """The result of a call that every rank makes, which all were sent by this number."""
        with self.lockstep.alike(Asked(number)):
            return call()

    def follow(self, take_asked: Callable[[int], None]) -> Leave:
        """Do what rank 0 does, until it leads no longer; what it says then.

        take_asked: does what was asked by a number, see Asked.
        """
        while True:
            for message in self.lockstep.exchange():
                if isinstance(message, Leave):
                    self._reports.clear()  # rank 0 has them
                    return message
                if isinstance(message, Asked):
                    take_asked(message.number)
                else:
                    self._repeat(message)

    # -- internals -------------------------------------------------------------------------------

    def _require_ready(self) -> None:
        if not self.is_paused:
            self._weights.require_ready()

    def _pause(self, mode: str) -> None:
        if mode == "retract":
            self._scheduler.retract_all()
        if not self.is_paused:
            self._paused_at = self._weights.version
        self.is_paused = self._weights.gate.is_paused = True

    def _queue(self, request: Request, call: Call | None) -> list[RunningSample]:
        samples = RunningSample.of(request, self._arrivals)
        self.live[request.request_id] = LiveRequest(samples, call)
        self._scheduler.add(samples[0])
        return samples

    def _step(self) -> list[RunningSample]:
        self.lockstep.say(Step())
        self.lockstep.meet()
        self._weights.require_ready()
        return self._step_loop.advance(self._weights.version)

    def _drain(self) -> None:
        self.lockstep.say(Drain())
        self._take(self._step_loop.drain)

    def _take(self, work: Callable[[], list[RunningSample]]) -> None:
        """Report what a step, or what was in flight, has come to."""
        try:
            self._report(work())
        except BaseException as error:
            self.lockstep.failed(error)
            if isinstance(error, Exception):
                self.fail_all(error)
            raise

    def _report(self, finished: list[RunningSample]) -> None:
        """Tell the callers what was drawn, and what has ended of their requests."""
        for call in self._streams:
            self._tell(call)
        for request_id, num_ended in Counter(s.request.request_id for s in finished).items():
            live = self.live[request_id]
            if all(s.finish_reason is not None for s in live.samples):
                group = self._close(request_id)
                if live.call is None:
                    self._reports.append(group)
            own = live.call
            if own is not None and own.ended is not None and own in self.calls:
                own.ended(num_ended)

    def _tell(self, call: Call) -> None:
        if call.tell is not None and (news := call.news(self._slots)):
            call.tell(news)

    def _abort(self, request_id: str) -> list[Completion]:
        """End a request, with nothing in flight; its completions."""
        self.lockstep.say(AbortRequest(request_id))
        self._scheduler.abort(request_id)
        if (call := self.live[request_id].call) is not None:
            self._tell(call)
        return self._close(request_id)

    def _close(self, request_id: str) -> list[Completion]:
        """Take a request off all of whose samples have ended; its completions."""
        live = self.live.pop(request_id)
        group = [sample.completion() for sample in live.samples]
        if live.call is not None:
            live.call.groups[request_id] = group
            self._settle(live.call)
        return group

    def _settle(self, call: Call) -> None:
        """Give a call its result if it has ended."""
        if len(call.groups) == len(call.requests):
            self._forget(call)
            call.result.set_result([call.groups[r.request_id] for r in call.requests])

    def _forget(self, call: Call) -> None:
        del self.calls[call]
        self._streams.pop(call, None)

    def _repeat(self, message: RankMessage) -> None:
        """Do what rank 0 did."""
        match message:
            case Admit(requests, True):
                self.admit(Call(requests))
            case Admit(requests, False):
                for request in requests:
                    self.admit_for_step(request)
            case Step():
                with suppress(Exception):  # rank 0's failed as well, or the next exchange says so
                    self.step()
            case Drain():
                with suppress(Exception):  # as of a step
                    self._drain()
            case AbortRequest(request_id):
                self._abort(request_id)
            case FlushCache():
                self.flush_cache()
            case Pause(mode):
                self._pause(mode)
            case Continue():
                self.go_on()
