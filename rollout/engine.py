"""The engine: prompts in, completions out, every bit a function of its inputs alone.

engine = Engine("path/to/model")
[[completion]] = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=16))
"""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from samebit.kernels.profile import NumericsProfile, numerics_profile
from samebit.kernels.reduce import ALONE, RankGroup
from samebit.rollout.config import (
    EngineConfig,
    as_path,
    as_ranks,
    automatic_kv_bytes,
    can_record,
    on_device,
    own_device,
    resolve_dtype,
)
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.kv_cache import KVCache, PagePool
from samebit.rollout.runtime.memory import Arena
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.requests import RequestFactory
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.running_sample import RunningSample
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.runtime.step_loop import StepLoop
from samebit.rollout.runtime.weight_control import WeightControl
from samebit.rollout.runtime.weights import load_dummy, load_safetensors
from samebit.rollout.types import Completion, Request, SamplingParams
from samebit.weight_sync.mapping import Shard
from samebit.weight_sync.objects import smallest
from samebit.weight_sync.session import UpdateSession
from samebit.weight_sync.transports.file import read_version
from samebit.weight_sync.types import WeightVersion

Progress = Callable[[int, int], None]
"""Called with (finished samples, tokens drawn so far) after every step."""


class Engine(WeightControl):
    """An in-process rollout engine.

    Not thread-safe except for `agenerate` and `abort_request`. Raises ValueError for bad settings,
    FileNotFoundError for a missing model, DeviceError for device=cuda without a GPU.
    """

    def __init__(
        self,
        model_path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        page_size: int = 64,
        kv_cache_tokens: int | None = None,
        max_batch_tokens: int = 4096,
        max_num_seqs: int = 256,
        prefill_chunk: int = 1024,
        prefix_cache: bool = True,
        load_format: str = "safetensors",
        seed: int = 0,
        max_model_len: int | None = None,
        cuda_graphs: bool | None = None,
        overlap: bool | None = None,
        ranks: RankGroup = ALONE,
    ) -> None:
        ranks, resolved = as_ranks(ranks), own_device(device)
        self.config = EngineConfig(
            model_path=as_path(model_path, "Engine model_path"),
            device=resolved,
            dtype=resolve_dtype(dtype, resolved),
            page_size=page_size,
            kv_cache_tokens=kv_cache_tokens,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            prefill_chunk=prefill_chunk,
            max_model_len=max_model_len,
            prefix_cache=prefix_cache,
            load_format=load_format,
            seed=seed,
            cuda_graphs=can_record(resolved, ranks) if cuda_graphs is None else cuda_graphs,
            overlap=resolved.type == "cuda" if overlap is None else overlap,
            ranks=ranks,
        )
        self.model_config = load_model_config(self.config.model_path)
        self.specs = self.model_config.param_specs(Shard(ranks.rank, ranks.size))
        self.profile: NumericsProfile = numerics_profile(resolved, ranks.size, ranks.invariant)
        self.model_config.selfcheck(resolved, ranks)
        self.arena = Arena(resolved)
        self._load_weights()
        self._make_runtime()
        self._lock = threading.RLock()
        self._arrivals = itertools.count()
        self._live: dict[str, list[RunningSample]] = {}
        self._for_step: set[str] = set()  # live requests of add_request
        self._done: list[list[Completion]] = []

    # -- generation ------------------------------------------------------------------------------

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

        sample_ids [prompts][n] key the noise; by default they are the running index in the call,
        so the same call repeats itself, and several samples of one prompt come from one call.
        Raises ValueError for bad input before anything runs, and WeightSyncError while the weights
        are not one whole version.
        """
        requests = self.requests.generation(
            prompt_ids, sampling_params, sample_ids, return_hidden_states
        )
        return self._finish(self._add_all(requests), progress)

    async def agenerate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """`generate` for asyncio; concurrent calls share the engine's batches.

        Without sample_ids every sample gets an id that this engine never gave before: from 2^64 - 1
        downwards, in the order of the calls. So calls for the same prompt give different samples;
        what is to be repeated must be given its ids.
        """
        requests = self.requests.generation(
            prompt_ids, sampling_params, sample_ids, return_hidden_states, fresh_ids=True
        )
        groups = self._add_all(requests)  # at once, so that concurrent calls share batches
        try:
            return await asyncio.to_thread(self._finish, groups, None)
        except asyncio.CancelledError:
            self._abort_all(groups)
            raise

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probs of given tokens by the same bits as generation.

        For each sequence of L >= 2 tokens, L - 1 values: that of token i + 1 given tokens 0..i.
        """
        requests = self.requests.scoring(token_ids, temperature)
        return [
            list(completion.logprobs)
            for [completion] in self._finish(self._add_all(requests), None)
        ]

    # -- finer control ---------------------------------------------------------------------------

    def add_request(
        self,
        prompt_ids: Sequence[int],
        sampling_params: SamplingParams | None = None,
        sample_ids: Sequence[int] | None = None,
        *,
        return_hidden_states: Sequence[int] = (),
    ) -> str:
        """Queue one prompt; returns the request id that `step` reports on.

        sample_ids [n]: by default ids that this engine never gave before, as in agenerate.
        """
        ids = None if sample_ids is None else [sample_ids]
        [request] = self.requests.generation(
            [prompt_ids], sampling_params, ids, return_hidden_states, fresh_ids=True
        )
        with self._lock:
            self._add(request)
            self._for_step.add(request.request_id)
        return request.request_id

    def step(self) -> list[list[Completion]]:
        """Run one batch; n completions of each request of `add_request` that is newly finished."""
        with self._lock:
            self._advance()
            done, self._done = self._done, []
            return done

    def abort_request(self, request_id: str) -> list[Completion]:
        """End a request; its samples as far as they are, finish_reason "abort".

        Raises KeyError for an unknown or finished request.
        """
        with self._lock:
            if request_id in self._live:
                self._close_finished(self.step_loop.drain())
            if request_id not in self._live:
                raise KeyError(f"no unfinished request '{request_id}'")
            self._for_step.discard(request_id)
            for seq in self.scheduler.abort(request_id):
                seq.finish_reason = "abort"
            return [seq.completion() for seq in self._live.pop(request_id)]

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return self.scheduler.has_unfinished or bool(self._done)

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        if self.prefixes is not None:
            self.prefixes.reset(self.weight_version)

    def close(self) -> None:
        """Nothing to end: the engine lives in this process."""

    # -- internals -------------------------------------------------------------------------------

    def _load_weights(self) -> None:
        c = self.config
        self.weights = {
            s.name: self.arena.allocate("weights", s.name, s.shape, c.dtype) for s in self.specs
        }
        if c.load_format == "dummy":
            load_dummy(self.specs, self.weights, c.seed)
        else:
            load_safetensors(c.model_path, self.specs, self.weights)
        stored = read_version(c.model_path) if c.load_format == "safetensors" else None
        digest = self.digest()
        step = stored.step if stored and stored.digest == digest else 0
        version = WeightVersion(step, digest)
        self.session = UpdateSession(self.specs, self.weights, version, c.ranks.group)

    def _make_runtime(self) -> None:
        c, m = self.config, self.model_config
        self.max_model_len = c.max_model_len or m.max_position
        if self.max_model_len > m.max_position:
            raise ValueError(
                f"Engine max_model_len is {self.max_model_len}; the model has {m.max_position} "
                "positions"
            )
        tokens = c.kv_cache_tokens
        if tokens is None:
            token_bytes = m.kv_layout.bytes_per_token(c.dtype) // c.ranks.size
            affordable = automatic_kv_bytes(c.device) // token_bytes
            tokens = max(c.page_size, min(affordable, c.max_num_seqs * self.max_model_len))
            tokens = smallest(tokens, c.ranks.group)  # all ranks take the same decisions
        num_pages = tokens // c.page_size
        self.kv_capacity = num_pages * c.page_size
        self.pool = PagePool(num_pages)
        self.prefixes = (
            PrefixCache(self.pool, c.page_size, self.weight_version) if c.prefix_cache else None
        )
        cache = KVCache(m.kv_layout, num_pages, c.page_size, c.dtype, self.arena, c.ranks.size)
        slots = Slots(c.max_num_seqs, self.max_model_len + 1, c.page_size, c.seed)
        positions = min(self.max_model_len, self.kv_capacity)  # no request may be longer
        decoder = m.make_decoder(self.weights, positions, c.ranks)
        self.runner = Runner(decoder, cache, c.max_num_seqs, c.cuda_graphs)
        self.sampler = Sampler(m.vocab_size, m.eos_token_ids)
        self.scheduler = Scheduler(c, self.pool, self.prefixes, slots)
        self.step_loop = StepLoop(
            self.scheduler, slots, self.runner, self.sampler, depth=1 if c.overlap else 0
        )
        self.requests = RequestFactory(
            vocab_size=m.vocab_size,
            num_layers=m.num_layers,
            max_model_len=self.max_model_len,
            kv_capacity=self.kv_capacity,
            eos_token_ids=m.eos_token_ids,
        )

    def _add(self, request: Request) -> list[RunningSample]:
        with self._lock:
            self.session.require_ready()
            seqs = [
                RunningSample(
                    request=request,
                    index=i,
                    arrival=next(self._arrivals),
                    token_ids=list(request.prompt_ids),
                )
                for i in range(len(request.sample_ids))
            ]
            seqs[0].siblings = seqs[1:]
            self._live[request.request_id] = seqs
            self.scheduler.add(seqs[0])
            return seqs

    def _add_all(self, requests: list[Request]) -> list[list[RunningSample]]:
        with self._lock:
            return [self._add(request) for request in requests]

    def _finish(
        self, groups: list[list[RunningSample]], progress: Progress | None
    ) -> list[list[Completion]]:
        """Step until these groups are done; other callers' steps count too."""
        flat = [seq for group in groups for seq in group]
        unfinished, drawn_before = list(reversed(flat)), self.step_loop.num_drawn
        try:
            while unfinished:
                self._advance()
                while unfinished and unfinished[-1].finish_reason is not None:
                    unfinished.pop()
                if progress is not None:
                    done = sum(seq.finish_reason is not None for seq in flat)
                    progress(done, self.step_loop.num_drawn - drawn_before)
        except BaseException:
            self._abort_all(groups)
            raise
        return [[seq.completion() for seq in group] for group in groups]

    def _abort_all(self, groups: list[list[RunningSample]]) -> None:
        with self._lock:
            try:
                self._close_finished(self.step_loop.drain())  # some may end by themselves
            finally:
                for request_id in {seq.request.request_id for group in groups for seq in group}:
                    if request_id in self._live:
                        self.abort_request(request_id)

    def _advance(self) -> None:
        with self._lock, on_device(self.config.device):  # also in a thread of agenerate
            self.session.require_ready()
            self._close_finished(self.step_loop.advance(self.weight_version))

    def _close_finished(self, finished: list[RunningSample]) -> None:
        """Report requests all of whose samples are done."""
        for request_id in dict.fromkeys(s.request.request_id for s in finished):
            if all(s.finish_reason is not None for s in self._live[request_id]):
                group = self._live.pop(request_id)
                if request_id in self._for_step:
                    self._for_step.remove(request_id)
                    self._done.append([s.completion() for s in group])
