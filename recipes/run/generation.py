"""Samples that a generate function of the user's makes, each checked against what the engine drew.

All functions of a round run in one event loop of this process, over one engine, whose batches they
share. The ids of a sample's turns follow from its own and from their number, so that neither tokens
nor log-probs depend on which function waits for what, or how long.
"""

import asyncio
import inspect
import math
import os
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from samebit.kernels.named import import_named
from samebit.recipes.data.conversation import Generate, GenerateError, GenerateRequest, Response
from samebit.recipes.data.order import MAX_TURNS, turn_id
from samebit.recipes.rollout_config import RolloutSection
from samebit.rollout.client import EngineClient, Progress
from samebit.rollout.types import Completion, SamplingParams
from samebit.trainer.types import Sample
from samebit.weight_sync.types import VersionSpan

_TICK_S = 0.1
_NO_STOP = "was drawn where stop tokens were forbidden (min_new_tokens): mask it"
_CANCEL_S = 5.0  # for functions that another one's error ends


@dataclass(frozen=True)
class Turn:
    """Keeps what was drawn, and after what."""

    context_ids: tuple[int, ...]
    completion: Completion
    params: SamplingParams


@dataclass
class SampleEngine:
    """The engine as a generate function has it for one sample; it writes down what was drawn."""

    client: EngineClient
    request: GenerateRequest
    turns: list[Turn] = field(default_factory=list)
    drawing: asyncio.Task[list[list[Completion]]] | None = None
    """The turn that is being drawn."""
    ended: bool = False
    """Nothing more is drawn: the sample is made, or what makes it was told to end."""

    async def draw(self, context_ids: Sequence[int], sampling_params: SamplingParams) -> Completion:
        """Draw the next turn; see TurnDrawer."""
        context, number = tuple(context_ids), len(self.turns)
        self._check(context, sampling_params, number)
        ids = [[turn_id(self.request.sample_id, number)]]
        turn: Coroutine[Any, Any, list[list[Completion]]]
        turn = self.client.agenerate([context], sampling_params, ids)
        self.drawing = asyncio.create_task(turn)
        try:
            [[found]] = await self.drawing
        finally:
            self.drawing = None
        self.turns.append(Turn(context, found, sampling_params))
        return found

    async def agenerate(
        self, prompt_ids: Sequence[Sequence[int]], sampling_params: SamplingParams
    ) -> list[list[Completion]]:
        """Draw the next turn; see TurnDrawer."""
        if len(prompt_ids) != 1:
            raise GenerateError(f"asks for {len(prompt_ids)} contexts; give one, a turn's, at once")
        return [[await self.draw(prompt_ids[0], sampling_params)]]

    def _check(self, context: tuple[int, ...], params: SamplingParams, number: int) -> None:
        request = self.request
        if self.ended:
            raise GenerateError("draws a turn after its sample was made, or its round has ended")
        if self.drawing is not None:
            raise GenerateError(
                "draws a turn while another one is being drawn, so that their order would be that "
                "of a race; await one before the next"
            )
        if number >= MAX_TURNS:
            raise GenerateError(f"draws turn {number + 1}; a sample has at most {MAX_TURNS}")
        if context[: len(request.prompt_ids)] != request.prompt_ids:
            raise GenerateError("draws after a context that does not begin with request.prompt_ids")
        added = f"{len(context) - len(request.prompt_ids)} tokens after the prompt"
        limit = f"rollout.max_new_tokens is {request.max_new_tokens}"
        room = request.room(context)
        if room == 0:
            raise GenerateError(
                f"draws turn {number + 1} after the context is full: it has {added}, and {limit}"
            )
        if params.max_new_tokens > room:
            raise GenerateError(
                f"draws turn {number + 1} with max_new_tokens={params.max_new_tokens}; its context "
                f"has {added}, and {limit}: give at most {room} (request.room)"
            )
        if params.n != 1:
            raise GenerateError(f"draws turn {number + 1} with n={params.n}; give n=1")


class GenerateFunction:
    """Runs the function that rollout.generate names; raises ValueError if there is none."""

    def __init__(self, settings: RolloutSection, vocab_size: int) -> None:
        self.name, self._vocab_size = str(settings.generate), vocab_size
        self._function = _load(self.name, settings.generate_args)
        self._args = settings.generate_args
        self._timeout_s = settings.generate_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[asyncio.Task[Response] | None, GenerateRequest] = {}

    def draw(
        self,
        client: EngineClient,
        requests: Sequence[GenerateRequest],
        params: SamplingParams,
        progress: Progress = lambda done, tokens: None,
    ) -> list[Response]:
        """Have the function make a sample of each request; returns them in order.

        `progress` is called now and then; what it raises ends all of them. Raises GenerateError,
        naming the function, the problem and the sample. Where the function blocks for longer than
        the timeout, that is said and the process ends.
        """
        self._loop = self._loop or asyncio.new_event_loop()  # as long as the run, for sessions
        loop, limit = self._loop, min(self._timeout_s + 2 * _CANCEL_S, threading.TIMEOUT_MAX)
        watchdog = threading.Timer(limit, self._end_the_run, (loop, len(requests)))
        watchdog.daemon = True
        watchdog.start()
        try:
            return loop.run_until_complete(self._all(client, requests, params, progress))
        finally:
            watchdog.cancel()
            self._tasks.clear()

    def _end_the_run(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        """Where a function blocks the event loop nothing that is awaited can end it."""
        request = self._tasks.get(asyncio.current_task(loop))
        where = f"rollout.generate {self.name!r} on one of {count} samples"
        if request is not None:
            where = self._where(request)
        limit = f"{self._timeout_s:g} s (rollout.generate_timeout_s)"
        what = "and does not let others run: code that blocks belongs in asyncio.to_thread"
        print(f"\nsamebit: {where} took longer than {limit} {what}", file=sys.stderr, flush=True)
        os._exit(1)

    def close(self) -> None:
        """Let go of the event loop. A second call does nothing."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    async def _all(
        self,
        client: EngineClient,
        requests: Sequence[GenerateRequest],
        params: SamplingParams,
        progress: Progress,
    ) -> list[Response]:
        engines = [SampleEngine(client, request) for request in requests]
        tasks = [asyncio.create_task(self._one(engine, params)) for engine in engines]
        self._tasks = dict(zip(tasks, requests, strict=True))
        deadline, waits = time.monotonic() + self._timeout_s, set(tasks)
        try:
            while waits:
                done, waits = await asyncio.wait(
                    waits, timeout=_TICK_S, return_when=asyncio.FIRST_EXCEPTION
                )
                failed = [task for task in tasks if task.done() and task.exception()]
                if failed:
                    failed[0].result()
                tokens = sum(len(t.completion.token_ids) for e in engines for t in e.turns)
                progress(len(tasks) - len(waits), tokens)
                if waits and time.monotonic() > deadline:
                    [late, *_] = [e for e, t in zip(engines, tasks, strict=True) if t in waits]
                    limit = f"{self._timeout_s:g} s (rollout.generate_timeout_s)"
                    raise GenerateError(f"{self._where(late.request)} took longer than {limit}")
            return [task.result() for task in tasks]
        finally:
            for engine in engines:
                engine.ended = True
            # A function may have left a turn to a task of its own.
            left = [*tasks, *(e.drawing for e in engines if e.drawing is not None)]
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=_CANCEL_S)

    async def _one(self, engine: SampleEngine, params: SamplingParams) -> Response:
        request = engine.request
        try:
            sample = await self._function(engine, request, params, **self._args)
            if engine.drawing is not None:
                raise GenerateError("returned while a turn was being drawn; await every turn")
            _check_fields(request, sample, self._vocab_size)
            response = response_of(request, sample, engine.turns, params)
            engine.ended = True
            return response
        except BaseException as error:
            # Of others' code: a SystemExit too ends the sample, and then the run, with its name.
            if engine.ended:
                raise
            what = f"{error}"
            if not isinstance(error, GenerateError):
                what = f"raised {type(error).__name__}: {error} (SAMEBIT_TRACEBACK=1 shows where)"
            raise GenerateError(f"{self._where(request)} {what}") from error

    def _where(self, request: GenerateRequest) -> str:
        sample = f"sample {request.sample_id:#x}"
        return f"rollout.generate {self.name!r} on {request.problem.name}, {sample},"


class DrawnToken(NamedTuple):
    """Keeps what the engine said of a token."""

    logprob: float
    threshold: float
    """Of what could be drawn, as in Completion; -inf: every token could."""
    fault: str
    """Why the run cannot train on it; empty if it can."""


def response_of(
    request: GenerateRequest, sample: Sample, turns: Sequence[Turn], params: SamplingParams
) -> Response:
    """Check a sample against the turns that were drawn for it; returns what follows its prompt.

    params: by which the run draws. Raises GenerateError, naming the place of the first token that
    cannot be as it is.
    """
    token_ids, begin = tuple(sample.token_ids.tolist()), len(request.prompt_ids)
    drawn, mask = _drawn_at(token_ids, turns, params), sample.loss_mask
    for place in np.flatnonzero(mask).tolist():
        where = f"returned token {token_ids[place]} at place {place} of {len(token_ids)}"
        if place < begin:
            raise GenerateError(f"{where} with its loss mask set: that is the prompt; mask it")
        if place not in drawn:
            raise GenerateError(
                f"{where} with its loss mask set, but the engine did not draw it there after these "
                "tokens: mask it"
            )
        if fault := drawn[place].fault:
            raise GenerateError(f"{where} with its loss mask set, which {fault}")
        own, given = drawn[place].logprob, sample.logprobs
        if given is not None and np.float32(own) != given[place]:
            raise GenerateError(
                f"{where} with log-prob {given[place]}; the engine drew it with {own}: give that, "
                "or no log-probs"
            )
    trained = [turn for turn in turns if any(mask[len(turn.context_ids) :])]
    last = max(trained, key=lambda turn: len(turn.context_ids)).completion
    counted = [drawn[i] if mask[i] else None for i in range(begin, len(token_ids))]
    thresholds = tuple(0.0 if token is None else token.threshold for token in counted)
    return Response(
        request_id=last.request_id,
        sample_id=request.sample_id,
        token_ids=token_ids[begin:],
        logprobs=tuple(0.0 if token is None else token.logprob for token in counted),
        thresholds=thresholds if params.truncates else (),
        finish_reason=last.finish_reason,
        version_spans=_spans(turns, begin),
        loss_mask=tuple(mask[begin:].tolist()),
        num_turns=len(turns),
    )


def _check_fields(request: GenerateRequest, sample: Sample, vocab_size: int) -> None:
    if not isinstance(sample, Sample):
        raise GenerateError(f"returned {sample!r:.80}; return a samebit.trainer.types:Sample")
    token_ids, begin = tuple(sample.token_ids.tolist()), len(request.prompt_ids)
    if sample.sample_id != request.sample_id:
        raise GenerateError(
            f"returned a sample with the id {sample.sample_id:#x}; give request.sample_id"
        )
    if token_ids[:begin] != request.prompt_ids:
        raise GenerateError("returned a sample that does not begin with request.prompt_ids")
    if len(token_ids) - begin > request.max_new_tokens:
        raise GenerateError(
            f"returned {len(token_ids) - begin} tokens after the prompt; rollout.max_new_tokens is "
            f"{request.max_new_tokens}"
        )
    if outside := [i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size]:
        raise GenerateError(
            f"returned token {token_ids[outside[0]]} at place {outside[0]} of {len(token_ids)}, "
            f"which is outside the vocabulary [0, {vocab_size})"
        )
    given = {
        "advantages": sample.advantages.any(),
        "thresholds": sample.thresholds is not None,
        "ref_logprobs": sample.ref_logprobs is not None,
        "teacher_logprobs": sample.teacher_logprobs is not None,
        "teacher_top": sample.teacher_top is not None,
        "values": sample.values is not None,
        "returns": sample.returns is not None,
        "version_spans": sample.version_spans != (),
        "unit": sample.unit is not None,
    }
    if names := [name for name, is_given in given.items() if is_given]:
        raise GenerateError(f"returned a sample with {names[0]}, which the run finds: leave it out")


def _drawn_at(
    token_ids: tuple[int, ...], turns: Sequence[Turn], params: SamplingParams
) -> dict[int, DrawnToken]:
    """By place in a sample: what was drawn there after the very same tokens.

    A turn that was cut short counts as far as it was kept.
    """
    found: dict[int, DrawnToken] = {}
    for turn in turns:
        start, drawn = len(turn.context_ids), turn.completion
        if token_ids[:start] != turn.context_ids or not drawn.logprobs:
            continue
        fault = _fault(turn.params, params)
        thresholds = drawn.thresholds or (-math.inf,) * len(drawn.token_ids)
        tokens = zip(drawn.token_ids, drawn.logprobs, thresholds, strict=True)
        for place, (token, logprob, threshold) in enumerate(tokens, start):
            if place >= len(token_ids) or token_ids[place] != token:
                break
            forbidden = _NO_STOP if place - start < turn.params.min_new_tokens else ""
            found[place] = DrawnToken(logprob, threshold, fault or forbidden)
    return found


def _fault(own: SamplingParams, run: SamplingParams) -> str:
    """Why a run that draws by its parameters cannot train on what others drew; empty if it can."""
    if own.temperature != run.temperature:
        both = f"{own.temperature}; the run trains at {run.temperature}"
        return f"was drawn at temperature {both}: mask it"
    truncates = run.truncated_logprobs
    if own.truncates != (truncates and own.limits):
        kinds = "of the full softmax", "of what could be drawn"
        return (
            f"has a log-prob {kinds[not truncates]}; the run's are {kinds[truncates]} "
            f"(rollout.logprobs): draw with truncated_logprobs={truncates}, or mask it"
        )
    if not truncates and own.limits and _cut(own) != _cut(run):
        return (
            f"was drawn with {_cut(own)}, the run trains the full softmax (rollout.logprobs): mask "
            "it, or draw as the run does"
        )
    return ""


def _cut(params: SamplingParams) -> str:
    return f"top_k={params.top_k}, top_p={params.top_p}, min_p={params.min_p}"


def _spans(turns: Sequence[Turn], begin: int) -> tuple[VersionSpan, ...]:
    """Which version drew from which place after the prompt on: one, unless weights changed."""
    found: list[VersionSpan] = []
    for turn in turns:
        for span in turn.completion.version_spans:
            start = len(turn.context_ids) - begin + span.start
            if not found or found[-1].version != span.version:
                found.append(replace(span, start=start))
    return tuple(found)


def _load(name: str, args: dict[str, Any]) -> Generate:
    function = import_named(name, "rollout.generate")
    if not inspect.iscoroutinefunction(function):
        raise ValueError(
            f"rollout.generate is {name!r}, a {type(function).__name__}; it must be an `async def "
            "generate(engine, request, sampling_params)` that returns a Sample"
        )
    try:
        inspect.signature(function).bind(None, None, None, **args)
    except TypeError as error:
        raise ValueError(
            f"rollout.generate_args is {args}, but {name!r} is called as "
            f"generate(engine, request, sampling_params, **generate_args): {error}"
        ) from error
    return function
