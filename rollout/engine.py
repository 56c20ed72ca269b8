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
from samebit.rollout.client import Progress, result_of, stream_of
from samebit.rollout.config import EngineConfig, as_path
from samebit.rollout.device import as_ranks, automatic_kv_bytes, own_device, resolve_dtype, settled
from samebit.rollout.engine_memory import EngineMemory, MemoryControl
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.engine_loop import EngineLoop
from samebit.rollout.runtime.kv_cache import KVCache, PagePool
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.request_book import RequestBook
from samebit.rollout.runtime.requests import RequestFactory, scores_of
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.sampler import Sampler
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.slots import Slots
from samebit.rollout.runtime.step_loop import StepLoop
from samebit.rollout.runtime.weight_control import WeightControl, load_weights
from samebit.rollout.types import Completion, Increment, SamplingParams
from samebit.weight_sync.objects import smallest
from samebit.weight_sync.session import UpdateSession
from samebit.weight_sync.transports.base import WeightSink
from samebit.weight_sync.transports.broadcast import GlooGroup
from samebit.weight_sync.transports.planes import UpdateReceiver
from samebit.weight_sync.types import WeightSyncError, WeightVersion


class Engine(EngineMemory):
    """A rollout engine in this process: an EngineClient; its `sink` receives weights.

    Settings are EngineConfig's, given as `config`, by name, or both (a name wins). ranks: tensor
    parallel ranks; each runs an engine of its own and is given the same requests, or follows rank
    0 (see `leading`).

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
        **overrides: Any,
    ) -> None:
        self.model_path = as_path(model_path, "Engine model_path")
        self.ranks, self.device = as_ranks(ranks), own_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.config = settled(EngineConfig.of(config, overrides), self.device, ranks)
        self.model_config = load_model_config(self.model_path, self.config.model_family)
        self.specs = self.model_config.param_specs(ranks.shard)
        kind, numerics = attention_kind(self.config.attention), (ranks.size, ranks.invariant)
        self.profile: NumericsProfile = numerics_profile(self.device, *numerics, kind)
        self.attention = kind(self.model_config.attention_heads(ranks.size), self.device)
        self.model_config.selfcheck(self.attention, ranks)
        self.arena = Arena(self.device, bool(self.config.releasable))
        session = load_weights(
            self.model_path, self.config, self.specs, self.dtype, self.arena, ranks.group
        )
        self._make_runtime(session)
        self._receiver: UpdateReceiver | None = None

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

    def leading(self) -> AbstractContextManager[None]:
        """In the block rank 0 alone is called, and by any number of callers; the others `follow`.

        In it weights may not change, nor memory be released. At its end what callers wait for is
        aborted. It costs an exchange of the ranks for each step, for which the others wait as long
        as their group's timeout. Raises RuntimeError on another rank.
        """
        return self.loop.leading(self.requests.marks)

    def follow(self) -> None:
        """Do what rank 0 does in its block `leading`, to its end. RuntimeError on rank 0."""
        end = self.loop.follow()
        self.requests.resume(end.request_id, end.sample_id)

    def close(self) -> None:
        """Abort what callers wait for."""
        self.loop.between_steps(self.loop.book.abandon_all)

    # -- weights ---------------------------------------------------------------------------------

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The parameters that are served, by their engine (Megatron) names."""
        return self.weight_control.session.params

    @property
    def sink(self) -> WeightSink:
        """What a transport of this process updates."""
        return self.weight_control

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return self.weight_control.version

    def digest(self) -> str:
        """weights_digest of the weights as they are now, over all tensor parallel ranks."""
        return self.weight_control.digest()

    def get_weights_by_name(self, name: str) -> Tensor:
        """A copy of one parameter by its engine (Megatron) name; KeyError if there is none."""
        self.arena.require_resident(("weights",))
        return self.weights[name].clone()

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        self.loop.between_steps(self.loop.book.flush_cache)

    def bind_weights(self, params: Mapping[str, Tensor], step: int = 0) -> WeightVersion:
        """Serve the trainer's own parameters from its memory (transport "alias")."""
        return self.weight_control.bind_weights(params, step)

    def update_weights_from_tensor(
        self, params: Mapping[str, Tensor], step: int, digest: str | None = None
    ) -> WeightVersion:
        """Copy a full set of parameters (engine names) into place."""
        return self.weight_control.update_weights_from_tensor(params, step, digest)

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """Load a Hugging Face folder in place, under its own version if it carries one.

        A folder that is missing or does not fit is refused before anything changes, as is one whose
        config.json, if it has one, is of another model.
        """
        return self.weight_control.update_weights_from_disk(model_path, step)

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        backend: str = "gloo",
        timeout_s: float = 600.0,
        secret: str | None = None,
    ) -> None:
        """Join the trainer's weight group as `rank` (1 or higher).

        secret: what the trainer and all engines have to know, by default SAMEBIT_SECRET of the
        environment; on one machine there need be none. Raises ValueError if theirs is another.
        """
        place = master_address, master_port, rank, world_size
        group = GlooGroup(*place, backend, timeout_s, secret)
        self._receiver = UpdateReceiver(group, group)

    def update_weights_from_distributed(self) -> WeightVersion:
        """Take one update from the weight group, in place."""
        if self._receiver is None:
            raise WeightSyncError("no weight group; call init_weights_update_group first")
        self._receiver.receive(self.sink, self.device)
        return self.weight_version

    # -- internals -------------------------------------------------------------------------------

    def _make_runtime(self, session: UpdateSession) -> None:
        c, m, version = self.config, self.model_config, session.version
        self.max_model_len = c.max_model_len or m.max_position
        if self.max_model_len > m.max_position:
            raise ValueError(
                f"engine.max_model_len is {self.max_model_len}; the model has {m.max_position} "
                "positions"
            )
        num_pages = self._kv_tokens() // c.page_size
        self.kv_capacity = num_pages * c.page_size
        self.pool = PagePool(num_pages)
        self.prefixes = PrefixCache(self.pool, c.page_size, version) if c.prefix_cache else None
        cache = KVCache(
            m.kv_layout, num_pages, c.page_size, self.dtype, self.arena, self.ranks.size
        )
        slots = Slots(c.max_num_seqs, self.max_model_len + 1, c.page_size, c.seed)
        positions = min(self.max_model_len, self.kv_capacity)  # no request may be longer
        decoder = m.make_decoder(session.params, positions, self.ranks)
        graph_pool = self.arena.graph_pool("cuda_graphs") if c.cuda_graphs else None
        self.runner = Runner(decoder, cache, self.attention, c.max_num_seqs, graph_pool)
        self.sampler = Sampler(m.vocab_size, m.eos_token_ids)
        self.scheduler = Scheduler(c, self.pool, self.prefixes, slots)
        depth = 1 if c.overlap else 0
        self.step_loop = StepLoop(self.scheduler, slots, self.runner, self.sampler, depth)
        self.weight_control = WeightControl(
            session, m, self.arena, self.runner, self.scheduler, self.prefixes
        )
        book = RequestBook(
            *(self.scheduler, self.step_loop, slots, self.weight_control), self.device, self.ranks
        )
        self.loop = EngineLoop(book)
        self.memory_control = MemoryControl(
            *(self.arena, self.weight_control, self.scheduler, self.pool, cache), c.weights_backup
        )
        self.requests = RequestFactory(
            vocab_size=m.vocab_size,
            num_layers=m.num_layers,
            max_model_len=self.max_model_len,
            kv_capacity=self.kv_capacity,
            eos_token_ids=m.eos_token_ids,
        )

    def _kv_tokens(self) -> int:
        """Tokens that the KV cache is to hold; the same on all tensor parallel ranks."""
        c, m = self.config, self.model_config
        if c.kv_cache_tokens is not None:
            return c.kv_cache_tokens
        token_bytes = m.kv_layout.bytes_per_token(self.dtype) // self.ranks.size
        affordable = automatic_kv_bytes(self.device, c.kv_memory_fraction) // token_bytes
        tokens = max(c.page_size, min(affordable, c.max_num_seqs * self.max_model_len))
        return smallest(tokens, self.ranks.group)  # all ranks take the same decisions
