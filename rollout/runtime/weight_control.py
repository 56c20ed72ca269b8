"""Which weights an engine serves: loading, binding, updates in place, and the ways they arrive."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.kernels.memory import Arena
from samebit.kernels.rope import SCALING_KEYS
from samebit.rollout.config import EngineConfig, as_path
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.weights import fill, load_dummy, load_safetensors, open_safetensors
from samebit.weight_sync.buckets import cut_buckets, pack
from samebit.weight_sync.mapping import ParamSpec, Read, hf_parts, unequal_shapes
from samebit.weight_sync.session import SessionState, UpdateSession, non_finite
from samebit.weight_sync.transports.file import read_version
from samebit.weight_sync.types import Bucket, ParamMeta, WeightSyncError, WeightVersion


def load_weights(
    model_path: Path,
    config: EngineConfig,
    specs: Sequence[ParamSpec],
    dtype: torch.dtype,
    arena: Arena,
    group: dist.ProcessGroup | None,
) -> UpdateSession:
    """The parameters of `specs` in the arena, filled from the folder, under the folder's version.

    The version counts if its digest is that of the weights; else they are step 0's. With
    load_format "none" they are whatever the memory held, and nothing is served before an update.
    """
    weights = arena.allocate("weights", {spec.name: (spec.shape, dtype) for spec in specs})
    if config.load_format == "none":
        session = UpdateSession(specs, weights, WeightVersion(0, ""), group)
        session.invalidate("no weights were loaded yet")
        return session
    stored = None
    if config.load_format == "dummy":
        load_dummy(specs, weights, config.seed)
    else:
        load_safetensors(model_path, specs, weights)
        stored = read_version(model_path)
    if arena.device.type == "cuda":
        torch.cuda.empty_cache()  # small things of later would keep all that loading needed
    return versioned(UpdateSession(specs, weights, WeightVersion(0, ""), group), stored)


def versioned(session: UpdateSession, stored: WeightVersion | None) -> UpdateSession:
    """The session, under the version of its folder if that has their digest, else of step 0."""
    digest = session.digest()
    step = stored.step if stored and stored.digest == digest else 0
    session.version = WeightVersion(step, digest)
    return session


def adopt_weights(
    params: Mapping[str, Tensor],
    step: int,
    specs: Sequence[ParamSpec],
    dtype: torch.dtype,
    arena: Arena,
    group: dist.ProcessGroup | None,
) -> UpdateSession:
    """Parameters whose memory somebody else owns, in place of the arena's, as those of `step`.

    Raises ValueError for other names, shapes or another dtype than the engine's, and NaN or Inf.
    """
    if names := unequal_shapes(specs, params):
        raise ValueError(f"parameters do not fit the engine: {', '.join(sorted(names)[:5])}")
    bad = [n for n, p in params.items() if p.dtype != dtype]
    if bad or (bad := non_finite(params)):
        raise ValueError(f"not finite or not {dtype}: {', '.join(bad[:5])}")
    arena.adopt("weights")
    weights = {name: p.detach() for name, p in params.items()}
    session = UpdateSession(specs, weights, WeightVersion(step, ""), group, shared=True)
    session.version = WeightVersion(step, session.digest())
    return session


class StepGate:
    """When an engine's models may change: between two steps, while none is due."""

    is_paused = False
    """Whether no step runs before the engine is told to go on."""
    between_steps: Callable[[Callable[[], Any]], Any] = staticmethod(lambda command: command())
    """What touches the engine's books, which have one thread at a time, goes through here."""
    require_alike: Callable[[str], None] = staticmethod(lambda what: None)
    """Raises for what every tensor parallel rank has to call, while rank 0 alone is called."""
    end_lost_update: Callable[..., None] = staticmethod(lambda counts_left=True: None)
    """Breaks off an update that nobody is left to end; every rank calls it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def require_quiet(self, what: str) -> None:
        """Raise WeightSyncError unless no step may come: the engine is idle, or paused."""
        if self._scheduler.has_unfinished and not self.is_paused:
            raise WeightSyncError(
                f"{what} needs an idle engine: {self._scheduler.num_unfinished} requests are "
                "unfinished; finish or abort them first, or call pause_generation"
            )


class ServedModel(ABC):
    """Holds the weights of one of an engine's models and changes them in place: a WeightSink.

    Each has a session, and so a version and a digest, of its own.
    """

    def __init__(self, session: UpdateSession, arena: Arena, gate: StepGate) -> None:
        self.session, self.gate = session, gate
        self._arena = arena
        self._dtype = next(iter(session.params.values())).dtype

    @property
    def version(self) -> WeightVersion:
        return self.session.version

    @abstractmethod
    def flush_cache(self) -> None:
        """Forget what was computed by these weights and must not be found under others."""

    @abstractmethod
    def _open(self, folder: Path) -> Read:
        """A reader of a folder; ValueError or WeightLoadError for one of another model."""

    def require_resident(self) -> None:
        """Raise ReleasedError if the weights' memory is released."""
        self._arena.require_resident((self.session.tag,))

    def digest(self) -> str:
        self.require_resident()
        return self.session.digest()

    def begin(self, step: int, *, may_go_back: bool = False) -> WeightVersion | None:
        def begin() -> WeightVersion | None:
            self.gate.require_alike("a weight update")
            self.gate.require_quiet("a weight update")
            if self.session.is_open:
                self.gate.end_lost_update()
            held = self.session.whole
            self.session.begin(step, may_go_back=may_go_back)
            try:
                self.flush_cache()  # before a byte is written, so before anything is served again
            except BaseException:
                self.session.cancel()
                raise
            return held

        return self.gate.between_steps(begin)

    def receive_in_place(self, params: Mapping[str, Tensor]) -> None:
        own = self.session.params
        apart = [
            name
            for name, p in params.items()
            if name not in own or own[name].data_ptr() != p.data_ptr()
        ]
        apart += [name for name in own if name not in params]
        if apart:
            with self.aborting():
                self.session.refuse(f"tensors not shared with the engine: {', '.join(apart[:5])}")
        self.session.receive_in_place()

    def bucket_for(self, metas: Sequence[ParamMeta]) -> Bucket:
        return self.session.bucket_for(metas)

    def cancel(self) -> None:
        self.session.cancel()

    def expect(self, metas: Sequence[ParamMeta]) -> Sequence[Tensor]:
        return self.session.expect(metas)

    def arrived(self, metas: Sequence[ParamMeta]) -> None:
        self.session.arrived(metas)

    def receive(self, bucket: Bucket) -> None:
        self.session.receive(bucket)

    def abort(self, reason: str) -> None:
        self.session.abort(reason)

    def commit(self, digest: str | None) -> WeightVersion:
        def commit() -> WeightVersion:
            version = self.session.commit(digest)
            self.flush_cache()
            return version

        return self.gate.between_steps(commit)

    def copy_weights(
        self, params: Mapping[str, Tensor], step: int, digest: str | None
    ) -> WeightVersion:
        self.begin(step, may_go_back=True)
        with self.aborting():
            for metas in cut_buckets(params, 512 << 20):
                self.session.receive(pack(metas, params))
            return self.commit(digest)

    def update_weights_from_disk(self, model_path: str | Path, step: int | None) -> WeightVersion:
        folder, session, failure = as_path(model_path, "model_path"), self.session, None
        try:
            read, version = self._open(folder), read_version(folder)
        except Exception as error:  # noqa: BLE001 - raised once the other ranks know of it
            failure = error
        session.agree(failure)
        if step is None:
            step = version.step if version else self.version.step + 1
        self.begin(step, may_go_back=True)
        with self.aborting():
            metas = session.metas()
            session.expect(metas)
            fill(folder, session.specs, session.params, read)
            session.arrived(metas)
            # A digest is of bits, so it says nothing about a copy in another dtype.
            same_dtype = read(*hf_parts(session.specs)[-1]).dtype == self._dtype
            return self.commit(version.digest if version and same_dtype else None)

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """Whatever ends the block early also ends the weight update, on all ranks."""
        try:
            yield
        except BaseException as error:
            if self.session.is_refused:
                self.session.commit(None)  # raises, on all ranks the same
            with suppress(RuntimeError):  # a rank is gone: the first error is the one to tell
                self.session.abort_alike(str(error) or repr(error))
            raise


class WeightControl(ServedModel):
    """The weights of the target, the model whose tokens an engine draws.

    Nothing may be served while an update is under way or has broken off: see UpdateSession.
    """

    def __init__(
        self,
        session: UpdateSession,
        model: ModelConfig,
        arena: Arena,
        runner: Runner,
        prefixes: PrefixCache | None,
        gate: StepGate,
    ) -> None:
        super().__init__(session, arena, gate)
        self._model = model
        self._runner = runner
        self._prefixes = prefixes

    def require_ready(self) -> None:
        """Raise WeightSyncError unless the weights are there, and one whole version."""
        if self.session.state is SessionState.UPDATING and self.session.group is None:
            # Ranks of a group have to agree, at their next update.
            self.gate.end_lost_update(counts_left=False)
        self.session.require_ready()

    def flush_cache(self) -> None:
        if self._prefixes is not None:
            self._prefixes.reset(self.version)

    def bind_weights(self, params: Mapping[str, Tensor], step: int) -> WeightVersion:
        def bind() -> WeightVersion:
            self.gate.require_alike("bind_weights")
            self.gate.require_quiet("bind_weights")
            self.gate.end_lost_update()
            own = self.session
            if own.state is SessionState.UPDATING:
                raise WeightSyncError("bind_weights: an update is under way; end it first")
            places = {p.data_ptr() for p in own.params.values()}
            if any(p.data_ptr() in places for p in params.values()):
                self.require_resident()
            kept = own.specs, self._dtype, self._arena, own.group
            self.session = adopt_weights(params, step, *kept)
            self.session.released = self._arena.released
            self._runner.bind(self._runner.model.with_params(self.session.params))
            self.flush_cache()
            return self.version

        return self.gate.between_steps(bind)

    def _open(self, folder: Path) -> Read:
        if (folder / "config.json").exists():
            _require_same_model(load_model_config(folder), self._model, folder)
        return open_safetensors(folder, self.session.specs)


def _require_same_model(found: ModelConfig, own: ModelConfig, folder: Path) -> None:
    """Where completions end and how long contexts are stays the engine's own."""
    served = _computed(own)
    for name, value in _computed(found).items():
        if value != served[name]:
            raise ValueError(
                f"{folder}/config.json is of another model: {name} is {value}, the engine's "
                f"{served[name]}"
            )


def _computed(config: ModelConfig) -> dict[str, Any]:
    """What the forward depends on."""
    values = asdict(config)
    del values["eos_token_ids"], values["max_position"]
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "default")
    return values | {"rope_scaling": (kind, [scaling.get(key) for key in SCALING_KEYS[kind]])}
