"""The engine: prompts in, completions out, every bit a function of its inputs alone.

engine = Engine("path/to/model")
[[completion]] = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=16))
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samebit.kernels.memory import Arena
from samebit.kernels.profile import NumericsProfile, numerics_profile
from samebit.kernels.reduce import ALONE, RankGroup
from samebit.kernels.registry import attention_kind
from samebit.kernels.top_tokens import TopTokens
from samebit.rollout.client import Progress, result_of, stream_of
from samebit.rollout.config import EngineConfig, as_path
from samebit.rollout.device import as_ranks, automatic_kv_bytes, own_device, resolve_dtype, settled
from samebit.rollout.engine_memory import EngineMemory, MemoryControl
from samebit.rollout.engine_weights import EngineWeights
from samebit.rollout.models.config import KVLayout
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.engine_loop import EngineLoop
from samebit.rollout.runtime.kv_cache import KVCache, PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.request_book import RequestBook
from samebit.rollout.runtime.requests import RequestFactory, scores_of, top_scores_of
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.served_draft import ServedDraft, load_draft
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.runtime.step_loop import StepLoop
from samebit.rollout.runtime.weight_control import (
    StepGate,
    WeightControl,
    adopt_weights,
    load_weights,
)
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.speculative.making import make_speculation, open_speculation
from samebit.rollout.speculative.proposer import ProposerParts
from samebit.rollout.types import Completion, Increment, SamplingParams
from samebit.rollout.values import as_integer, shown
from samebit.rollout.weight_arguments import as_step, as_tensors
from samebit.weight_sync.objects import smallest
from samebit.weight_sync.session import UpdateSession


class Engine(EngineWeights, EngineMemory):
    """A rollout engine in this process: an EngineClient; its weights and memory come and go.

    Settings are EngineConfig's, given as `config`, by name, or both (a name wins). ranks: tensor
    parallel ranks; each runs an engine of its own and is given the same requests, or follows rank
    0 (see `leading`). weights: parameters (engine names) of `step` that are served from their own
    memory as by bind_weights; none are loaded then.

    Several threads may call it at once, but for the methods that change weights. Raises ValueError
    for bad settings, TypeError for unknown ones, FileNotFoundError for a missing model and
    DeviceError for device=cuda without a GPU.
    """

    def __init__(
        self,
        model_path: str | Path,
        config: EngineConfig | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        ranks: RankGroup = ALONE,
        weights: Mapping[str, Tensor] | None = None,
        step: int = 0,
        **overrides: Any,
    ) -> None:
        self.model_path = as_path(model_path, "Engine model_path")
        self.ranks, self.device = as_ranks(ranks), own_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.config = settled(EngineConfig.of(config, overrides), self.device, ranks)
        self.model_config = load_model_config(self.model_path, self.config.model_family)
        self.specs = self.model_config.param_specs(ranks.shard)
        self._draft = open_speculation(self.config, self.model_config)
        kind, numerics = attention_kind(self.config.attention), (ranks.size, ranks.invariant)
        self.profile: NumericsProfile = numerics_profile(self.device, *numerics, kind)
        self.attention = kind(self.model_config.attention_heads(ranks.size), self.device)
        self.model_config.selfcheck(self.attention, ranks)
        if not self.config.group_attention:
            self.attention.least_shared_bytes = None
        self.arena = Arena(self.device, bool(self.config.releasable))
        place = self.specs, self.dtype, self.arena, ranks.group
        if weights is None and step != 0:
            raise ValueError(f"step is {shown(step)} without weights; a folder has its own version")
        if weights is None:
            session = load_weights(self.model_path, self.config, *place)
        else:
            session = adopt_weights(as_tensors(weights, "weights"), as_step(step), *place)
        self._make_runtime(session)

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
        return self.loop.run(requests, progress)

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
        return await result_of(*self.loop.begin(requests))

    def stream(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        sample_ids: Sequence[Sequence[int]] | None = None,
    ) -> AsyncGenerator[Increment, None]:
        """`agenerate`, told as it is drawn: after each step, what it drew for each sample.

        Who stops reading aborts the requests. Raises as generate does.
        """
        requests = self.requests.generation(
            prompt_ids, sampling_params, sample_ids, (), fresh_ids=True
        )
        return stream_of(partial(self.loop.begin, requests))

    def score(
        self, token_ids: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[list[float]]:
        """Log-probs of given tokens by the same bits as generation.

        For each sequence of L >= 2 tokens, L - 1 values: that of token i + 1 given tokens 0..i.
        """
        return scores_of(self.loop.run(self.requests.scoring(token_ids, temperature), None))

    def score_top(
        self, token_ids: Sequence[Sequence[int]], k: int, temperature: float = 1.0
    ) -> list[tuple[list[float], TopTokens]]:
        """What `score` gives for each sequence, and the k likeliest tokens [L - 1, k] there.

        They are in the host's memory, 8 bytes each.
        """
        requests = self.requests.scoring(token_ids, temperature, as_integer(k, "score_top k"))
        return top_scores_of(self.loop.run(requests, None))

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
        self.loop.between_steps(partial(self.loop.book.admit_for_step, request))
        return request.request_id

    def step(self) -> list[list[Completion]]:
        """Run one batch; n completions of each request of `add_request` that is newly finished."""
        return self.loop.between_steps(self.loop.book.step_and_report)

    def abort_request(self, request_id: str) -> list[Completion]:
        """End a request; its samples as far as they are, finish_reason "abort".

        Raises KeyError for an unknown or finished request.
        """
        return self.loop.between_steps(partial(self.loop.book.abort_request, request_id))

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return self.loop.book.has_unfinished

    @property
    def accept_lengths(self) -> AcceptLengths | None:
        """How many guesses were right over the engine's life; None if it does not speculate."""
        return None if self.speculation is None else self.speculation.accept_lengths

    def leading(self) -> AbstractContextManager[None]:
        """In the block rank 0 alone is called, and by any number of callers; the others `follow`.

        In it weights may not change, nor memory be released. At its end what callers wait for is
        aborted. It costs an exchange of the ranks for each step, for which the others wait as long
        as their group's timeout. Raises RuntimeError on another rank.
        """
        return self.loop.leading(self.requests.marks)

    def follow(self) -> None:
        """Do what rank 0 does in its block `leading`, to its end. RuntimeError on rank 0."""
        end = self.loop.follow(_takes_nothing)
        self.requests.resume(end.request_id, end.sample_id)

    def close(self) -> None:
        """Abort what callers wait for."""
        self.loop.between_steps(self.loop.book.abandon_all)
        for selector in list(self._receivers):
            self.leave_weight_transport(selector)
        self._leave_update_groups()

    # -- internals -------------------------------------------------------------------------------

    def _make_runtime(self, session: UpdateSession) -> None:
        c, m, version = self.config, self.model_config, session.version
        self.max_model_len = c.max_model_len or m.max_position
        if self.max_model_len > m.max_position:
            raise ValueError(
                f"engine.max_model_len is {self.max_model_len}; the model has {m.max_position} "
                "positions"
            )
        drafted = None
        if self._draft is not None:
            drafted = load_draft(self._draft, self.dtype, self.arena, self.ranks)
        num_pages = self._kv_tokens() // c.page_size
        self.kv_capacity = num_pages * c.page_size
        self.pool = PagePool(num_pages)
        self.prefixes = PrefixCache(self.pool, c.page_size, version) if c.prefix_cache else None
        cache = KVCache(self._kv_layouts, num_pages, c.page_size, self.dtype, self.arena)
        slots = Slots(c.max_num_seqs, self.max_model_len + 1, c.page_size, c.seed)
        positions = min(self.max_model_len, self.kv_capacity)  # no request may be longer
        decoder = m.make_decoder(session.params, positions, self.ranks)
        graph_pool = self.arena.graph_pool("cuda_graphs") if c.cuda_graphs else None
        self.runner = Runner(decoder, cache, self.attention, c.max_num_seqs, graph_pool)
        self.sampler = Sampler(m.vocab_size, m.eos_token_ids)
        self.scheduler = Scheduler(c, self.pool, self.prefixes, slots, cache)
        gate = StepGate(self.scheduler)
        if self._draft is not None and drafted is not None:
            self.draft_control = ServedDraft(self._draft, drafted, self.arena, gate, self.prefixes)
        self.speculation = make_speculation(c, self._proposer_parts(slots, cache, positions))
        self.step_loop = StepLoop(
            *(self.scheduler, slots, self.runner, self.sampler),
            depth=1 if c.overlap else 0,
            speculation=self.speculation,
        )
        self.weight_control = WeightControl(
            session, m, self.arena, self.runner, self.prefixes, gate
        )
        book = RequestBook(
            *(self.scheduler, self.step_loop, slots, self.weight_control), self.device, self.ranks
        )
        self.loop = EngineLoop(book)
        gate.between_steps = self.loop.weak_between_steps()
        gate.require_alike = book.lockstep.require_alike
        gate.end_lost_update = self._weak_end_lost_update()
        self.memory_control = MemoryControl(
            *(self.arena, self.weight_control, self.draft_control, self.pool, cache),
            c.weights_backup,
        )
        self.requests = RequestFactory(
            vocab_size=m.vocab_size,
            num_layers=m.num_layers,
            max_model_len=self.max_model_len,
            kv_capacity=self.kv_capacity,
            eos_token_ids=m.eos_token_ids,
        )

    def _proposer_parts(self, slots: Slots, cache: KVCache, positions: int) -> ProposerParts:
        return ProposerParts(
            vocab_size=self.model_config.vocab_size,
            num_draft_tokens=self.config.num_draft_tokens,
            slots=slots,
            runner=self.runner,
            cache=cache,
            attention=self.attention,
            arena=self.arena,
            ranks=self.ranks,
            num_positions=positions,
            draft=self.draft_control,
        )

    @property
    def _kv_layouts(self) -> list[KVLayout]:
        """This rank's of the model, and behind it the draft's, which every rank has whole."""
        draft = [] if self._draft is None else [self._draft.config.kv_layout]
        return [self.model_config.kv_layout.of_rank(self.ranks.size), *draft]

    def _kv_tokens(self) -> int:
        """Tokens that the KV cache is to hold; the same on all tensor parallel ranks."""
        c = self.config
        if c.kv_cache_tokens is not None:
            return c.kv_cache_tokens
        token_bytes = sum(x.bytes_per_token(self.dtype) for x in self._kv_layouts)
        affordable = automatic_kv_bytes(self.device, c.kv_memory_fraction) // token_bytes
        tokens = max(c.page_size, min(affordable, c.max_num_seqs * self.max_model_len))
        return smallest(tokens, self.ranks.group)  # all ranks take the same decisions


def _takes_nothing(number: int) -> None:
    raise AssertionError(number)
