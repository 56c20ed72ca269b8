"""Which weights the engine serves: loading, binding, updates in place, and the ways they arrive."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import ParamSpec, hf_names, unequal_shapes
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

    The version counts if its digest is that of the weights; else they are step 0's.
    """
    weights = arena.allocate("weights", {spec.name: (spec.shape, dtype) for spec in specs})
    stored = None
    if config.load_format == "dummy":
        load_dummy(specs, weights, config.seed)
    else:
        load_safetensors(model_path, specs, weights)
        stored = read_version(model_path)
    digest = weights_digest(specs, weights, group)
    step = stored.step if stored and stored.digest == digest else 0
    return UpdateSession(specs, weights, WeightVersion(step, digest), group)


class WeightControl:
    """Holds the engine's weights and changes them: a WeightSink, and methods of Engine.

    Nothing may be served while an update is under way or has broken off: see UpdateSession.
    """

    def __init__(
        self,
        session: UpdateSession,
        model: ModelConfig,
        arena: Arena,
        runner: Runner,
        scheduler: Scheduler,
        prefixes: PrefixCache | None,
    ) -> None:
        self.session = session
        self._model = model
        self._arena = arena
        self._runner = runner
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._dtype = next(iter(session.params.values())).dtype

    @property
    def version(self) -> WeightVersion:
        return self.session.version

    def digest(self) -> str:
        self._arena.require_resident(("weights",))
        return weights_digest(self.session.specs, self.session.params, self.session.group)

    def flush_cache(self) -> None:
        if self._prefixes is not None:
            self._prefixes.reset(self.version)

    def bind_weights(self, params: Mapping[str, Tensor], step: int) -> WeightVersion:
        specs, group = self.session.specs, self.session.group
        if names := unequal_shapes(specs, params):
            raise ValueError(f"parameters do not fit the engine: {', '.join(sorted(names)[:5])}")
        self._require_idle("bind_weights")
        bad = [n for n, p in params.items() if p.dtype != self._dtype]
        if bad or (bad := non_finite(params)):
            raise ValueError(f"not finite or not {self._dtype}: {', '.join(bad[:5])}")
        self._arena.adopt("weights")
        weights = {name: p.detach() for name, p in params.items()}
        version = WeightVersion(step, weights_digest(specs, weights, group))
        self.session = UpdateSession(specs, weights, version, group)
        self.session.released = self._arena.released
        self._runner.bind(self._runner.model.with_params(weights))
        self.flush_cache()
        return version

    def begin(self, step: int) -> None:
        self._require_idle("a weight update")
        self.session.begin(step)

    def receive_in_place(self, params: Mapping[str, Tensor]) -> None:
        own = self.session.params
        apart = [
            name
            for name, p in params.items()
            if name not in own or own[name].data_ptr() != p.data_ptr()
        ]
        apart += [name for name in own if name not in params]
        if apart:
            reason = f"tensors not shared with the engine: {', '.join(apart[:5])}"
            self.session.abort(reason)
            raise WeightSyncError(reason)
        self.session.receive_in_place()

    def bucket_for(self, metas: Sequence[ParamMeta]) -> Bucket:
        return self.session.bucket_for(metas)

    def receive(self, bucket: Bucket) -> None:
        self.session.receive(bucket)

    def abort(self, reason: str) -> None:
        self.session.abort(reason)

    def commit(self, digest: str) -> WeightVersion:
        version = self.session.commit(digest)
        self.flush_cache()
        return version

    def update_weights_from_tensor(
        self, params: Mapping[str, Tensor], step: int, digest: str | None
    ) -> WeightVersion:
        self.begin(step)
        with self._aborting():
            for metas in cut_buckets(params, 512 << 20):
                self.session.receive(pack(metas, params))
            return self.commit(digest or self.digest())

    def update_weights_from_disk(self, model_path: str | Path, step: int | None) -> WeightVersion:
        folder = as_path(model_path, "model_path")
        if (folder / "config.json").exists():
            _require_same_model(load_model_config(folder), self._model, folder)
        specs = self.session.specs
        read = open_safetensors(folder, specs)
        version = read_version(folder)
        if step is None:
            step = version.step if version else self.version.step + 1
        self.begin(step)
        with self._aborting():
            fill(folder, specs, self.session.params, read)
            self.session.receive_in_place()
            own = self.digest()
            # A digest is of bits, so it says nothing about a copy in another dtype.
            same_dtype = read(hf_names(specs)[-1]).dtype == self._dtype
            return self.commit(version.digest if version and same_dtype else own)

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        """Whatever ends the block early also ends the weight update."""
        try:
            yield
        except BaseException as error:
            if self.session.state is SessionState.UPDATING:
                self.session.abort(str(error) or repr(error))
            raise

    def _require_idle(self, what: str) -> None:
        if self._scheduler.has_unfinished:
            raise WeightSyncError(
                f"{what} needs an idle engine: {self._scheduler.num_unfinished} requests are "
                "unfinished; finish or abort them first"
            )


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
