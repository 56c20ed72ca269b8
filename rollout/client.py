"""EngineClient: what a caller may ask of an engine, wherever it runs. No torch here.

Engine (in this process), RemoteEngine (in another one) and recipes' ReplicatedEngine (one in each
process of a run) are such clients. What needs more, such as weights in place, takes an Engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from samebit.kernels.memory import TagBytes
    from samebit.kernels.top_tokens import TopTokens
    from samebit.rollout.speculative.accept_lengths import AcceptLengths
    from samebit.rollout.types import Completion, Increment, SamplingParams
    from samebit.weight_sync.types import WeightVersion

_PROGRESS_S = 0.1  # how often a caller is told that it still waits

type Progress = Callable[[int, int], None]
"""It is called with (finished samples, tokens drawn so far) after every step."""
type Tell = Callable[[list[Increment]], object]
"""It is called with what a step drew for a caller, in the thread that drives the engine."""
type Begun[T] = tuple[Future[T], Callable[[], Future[None]]]
"""A call's result to come, and what abandons the call."""


class EngineClient(Protocol):
    """Draws samples, scores tokens, and serves one version of the weights at a time."""

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Complete every prompt; outer list in the prompts' order, inner in the samples' order.

        If `progress` raises, the requests are aborted.
        """

    async def agenerate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """`generate` for asyncio; a call that is cancelled aborts its requests.

        Without sample_ids every sample gets an id that was never given before.
        """

    def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Increment, None]:
        """`agenerate`, told as it is drawn; who stops reading aborts the requests."""

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probs of given tokens: L - 1 values for a sequence of L."""

    def score_top(
        self, token_ids: Sequence[Sequence[int]], k: int, temperature: float = 1.0
    ) -> list[tuple[list[float], TopTokens]]:
        """Those log-probs, and the k likeliest tokens at the same places."""

    def abort_request(self, request_id: str) -> list[Completion]:
        """End a request; its samples as far as they are. KeyError if it is not unfinished."""

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""

    @property
    def accept_lengths(self) -> AcceptLengths | None:
        """How many guesses were right so far; None if it does not speculate."""

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """Load a Hugging Face folder in place; the engine has to be idle."""

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """Give the memory of these tags back; the bytes of each."""

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """Have the memory of these tags again, at the same addresses; the bytes of each."""

    def memory_occupation(self) -> dict[str, TagBytes]:
        """Bytes of each tag that are resident, and those of its addresses."""

    def close(self) -> None:
        """Abort what is unfinished and let go of the engine."""


def awaited[T](begun: Begun[T], tell: Callable[[], object] | None = None) -> T:
    """Wait for a call's result, and `tell` now and then; who waits no longer, for what it raises,
    abandons the call."""
    result, abandon = begun
    try:
        while tell is not None and not wait([result], _PROGRESS_S).done:
            tell()
        return result.result()
    except BaseException:
        if not result.done():
            with suppress(RuntimeError):  # its engine has died meanwhile
                abandon()
        raise


async def result_of[T](result: Future[T], abandon: Callable[[], Future[None]]) -> T:
    """Wait for a call's result; one that is cancelled is abandoned first."""
    try:
        return await asyncio.wrap_future(result)
    except asyncio.CancelledError:
        with suppress(Exception):  # if a step fails in it, those who still wait are told
            await asyncio.wrap_future(abandon())
        raise


async def stream_of[T](begin: Callable[[Tell], Begun[T]]) -> AsyncGenerator[Increment, None]:
    """Begin a call and give its increments as they come; one that nobody reads on is abandoned."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[list[Increment] | None] = asyncio.Queue()

    def put(increments: list[Increment] | None) -> None:
        with suppress(RuntimeError):  # asyncio's loop is closed: nobody listens any more
            loop.call_soon_threadsafe(queue.put_nowait, increments)

    result, abandon = begin(put)
    result.add_done_callback(lambda _: put(None))
    try:
        while (increments := await queue.get()) is not None:
            for increment in increments:
                yield increment
        result.result()  # raises what ended it early
    finally:
        if not result.done():
            with suppress(RuntimeError):  # its engine has died meanwhile
                abandon()
