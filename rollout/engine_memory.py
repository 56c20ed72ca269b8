"""The engine's memory by tag: what is released and resumed, and what that means for its content."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from samebit.kernels.memory import Arena, ResumeError, TagBytes, require_tags
from samebit.rollout.runtime.engine_loop import EngineLoop
from samebit.rollout.runtime.kv_cache import KVCache, PagePool
from samebit.rollout.runtime.served_draft import ServedDraft
from samebit.rollout.runtime.weight_control import WeightControl
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.session import SessionState
from samebit.weight_sync.types import WeightSyncError

ENGINE_TAGS = ("weights", "kv_cache", "cuda_graphs", "draft")
_ALIASES = {"cuda_graph": "cuda_graphs"}


class MemoryControl:
    """Releases and resumes an engine's tags; between steps, by the thread that drives them.

    Weights come back as they were if `weights_backup`, else a full update has to follow. KV pages
    of unfinished requests are kept in host memory; cached prefixes are forgotten. A draft's weights
    come back as they were: no update of the target brings them. CUDA graphs need no content.
    """

    def __init__(
        self,
        arena: Arena,
        weights: WeightControl,
        draft: ServedDraft | None,
        pool: PagePool,
        cache: KVCache,
        weights_backup: bool,
    ) -> None:
        self._arena = arena
        self._weights, self._models = weights, [weights] if draft is None else [weights, draft]
        self._pool = pool
        self._cache = cache
        self._kept = ("weights", "draft") if weights_backup else ("draft",)
        self._pages: tuple[list[int], list[Tensor]] | None = None  # and their content

    def release(self, tags: Sequence[str] | None) -> dict[str, int]:
        given = _engine_tags(tags)
        self._weights.gate.end_lost_update(counts_left=False)
        self._arena.require_releasable()
        self._weights.gate.require_quiet("release_memory_occupation")
        has_weights = "weights" in given and self._is_resident("weights")
        for model in self._models:
            tag, state = model.session.tag, model.session.state
            if state is SessionState.UPDATING and tag in given and self._is_resident(tag):
                raise WeightSyncError(
                    f"the memory of {tag} cannot be released: an update writes to it"
                )
        has_pages = "kv_cache" in given and self._is_resident("kv_cache") and self._pages is None
        if has_pages:
            self._weights.flush_cache()
            if pages := self._pool.in_use():
                self._pages = pages, self._cache.read_pages(pages)
        try:
            return self._arena.release(given, keep=self._kept)
        finally:  # it may have broken off before all of them were released
            if has_pages and not self._arena.is_released("kv_cache"):
                self._pages = None
            if has_weights and "weights" not in self._kept and self._arena.is_released("weights"):
                reason = "their memory was released without a backup"
                self._weights.session.invalidate(reason)
            self._tell_released()

    def resume(self, tags: Sequence[str] | None) -> dict[str, int]:
        try:
            return self._arena.resume(_engine_tags(tags))
        finally:
            try:
                self._write_pages()
            finally:
                self._tell_released()

    def agree(self, failure: Exception | None, kind: type[RuntimeError]) -> None:
        """Raise on every rank what failed on any, there as it is and elsewhere as of this kind.

        What is released on one of them is missing for all: none begins a step that others refuse.
        """
        group = self._weights.session.group
        if group is not None:
            own = "" if failure is None else repr(failure), list(self._arena.released)
            told = gather_objects(own, group)
            released = tuple(dict.fromkeys(tag for _, tags in told for tag in tags))
            for model in self._models:
                model.session.released = released
            failed = [f"rank {rank}: {why}" for rank, (why, _) in enumerate(told) if why]
            if failed and failure is None:
                raise kind("; ".join(failed))
        if failure is not None:
            raise failure

    def _tell_released(self) -> None:
        for model in self._models:
            model.session.released = self._arena.released

    def _write_pages(self) -> None:
        """Put the kept pages back into a KV cache that is resident; else it is released again."""
        if self._pages is None or self._arena.is_released("kv_cache"):
            return
        try:
            self._cache.write_pages(*self._pages)
        except BaseException as error:
            self._arena.release(("kv_cache",))
            if not isinstance(error, RuntimeError):
                raise
            raise ResumeError(
                f"{len(self._pages[0])} pages of unfinished requests could not be written back to "
                f"kv_cache, which is still released: make room and resume it again: {error}"
            ) from error
        self._pages = None

    def _is_resident(self, tag: str) -> bool:
        return self._arena.owns(tag) and not self._arena.is_released(tag)


def _engine_tags(tags: Sequence[str] | None) -> Sequence[str]:
    """By our names; SGLang's has another for one, and none mean all."""
    if tags is None:
        return ENGINE_TAGS
    require_tags(tags, (*ENGINE_TAGS, *_ALIASES))
    return [_ALIASES.get(tag, tag) for tag in tags] or ENGINE_TAGS


class EngineMemory:
    """The part of Engine that gives memory back and takes it again."""

    arena: Arena
    loop: EngineLoop
    memory_control: MemoryControl

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """Give the memory of these tags back to the device; the bytes of each.

        tags: of "weights", "kv_cache", "cuda_graphs" (also "cuda_graph") and "draft"; none: all. 0
        bytes: nothing to do, because the tag is released already, has no memory, or is the
        trainer's (after bind_weights). Until all is resumed nothing is served. Every tensor
        parallel rank calls it.

        Raises ValueError for unknown tags, WeightSyncError while requests are unfinished or, for
        weights, an update is under way, ReleasedError for an engine with releasable=false, and
        RuntimeError while rank 0 leads others, or if another rank has failed.
        """
        release = partial(self.memory_control.release, tags)
        return self._alike("release_memory_occupation", release, RuntimeError)

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> dict[str, int]:
        """Have the memory of these tags again, at the same addresses; the bytes of each.

        CUDA graphs stay valid. Weights without a backup need a full update before anything is
        served. Raises ValueError for unknown tags and, where memory is short, ResumeError that
        names the tag and the bytes, on every rank if it is so on one; then the call may be
        repeated. RuntimeError while rank 0 leads.
        """
        resume = partial(self.memory_control.resume, tags)
        return self._alike("resume_memory_occupation", resume, ResumeError)

    def memory_occupation(self) -> dict[str, TagBytes]:
        """Bytes of each tag that are resident, and those of its addresses."""
        return self.arena.occupation()

    def _alike(
        self, what: str, command: Callable[[], dict[str, int]], kind: type[RuntimeError]
    ) -> dict[str, int]:
        def run() -> dict[str, int]:
            self.loop.book.lockstep.require_alike(what)
            found, failure = dict[str, int](), None
            try:
                found = command()
            except Exception as error:  # noqa: BLE001 - raised once the other ranks know of it
                failure = error
            self.memory_control.agree(failure, kind)
            return found

        return self.loop.between_steps(run)
