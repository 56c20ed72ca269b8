"""Which weights the engine serves: binding, updates in place, and the ways they arrive."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.rope import SCALING_KEYS
from samebit.rollout.config import EngineConfig, as_path
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.memory import Arena
from samebit.rollout.runtime.runner import Runner
from samebit.rollout.runtime.scheduler import Scheduler
from samebit.rollout.runtime.weights import fill, open_safetensors
from samebit.weight_sync.buckets import pack, plan_buckets
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import ParamSpec, hf_names
from samebit.weight_sync.session import SessionState, UpdateSession, non_finite
from samebit.weight_sync.transports.collective import CollectiveReceiver
from samebit.weight_sync.transports.file import read_version
from samebit.weight_sync.types import Bucket, WeightSyncError, WeightVersion


class WeightControl:
    """The engine's half that receives weights; see weight_sync.transports.base.WeightSink."""

    config: EngineConfig
    model_config: ModelConfig
    specs: list[ParamSpec]
    weights: Mapping[str, torch.Tensor]
    session: UpdateSession
    arena: Arena
    runner: Runner
    scheduler: Scheduler
    _receiver: CollectiveReceiver | None = None

    def flush_cache(self) -> None:
        """Forget all cached prefixes."""
        raise NotImplementedError

    @property
    def weight_version(self) -> WeightVersion:
        """Step and digest of the weights that are served."""
        return self.session.version

    def digest(self) -> str:
        """weights_digest of the weights as they are now, over all tensor parallel ranks."""
        return weights_digest(self.specs, self.weights, self.config.ranks.group)

    def bind_weights(self, params: Mapping[str, torch.Tensor], step: int = 0) -> WeightVersion:
        """Serve the trainer's own parameters from its memory (transport "alias")."""
        expected = {spec.name: spec.shape for spec in self.specs}
        found = {name: tuple(p.shape) for name, p in params.items()}
        if expected != found:
            names = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
            raise ValueError(f"parameters do not fit the engine: {', '.join(names[:5])}")
        self._require_idle("bind_weights")
        misfits = [n for n, p in params.items() if p.dtype != self.config.dtype]
        if misfits or (misfits := non_finite(params)):
            raise ValueError(f"not finite or not {self.config.dtype}: {', '.join(misfits[:5])}")
        self.arena.adopt("weights", params)
        self.weights = {name: p.detach() for name, p in params.items()}
        version = WeightVersion(step, self.digest())
        self.session = UpdateSession(self.specs, self.weights, version, self.config.ranks.group)
        self.runner.bind(self.runner.model.with_params(self.weights))
        self.flush_cache()
        return version

    def begin_weight_update(self, step: int) -> None:
        """See weight_sync.transports.base.WeightSink."""
        self._require_idle("a weight update")
        self.session.begin(step)

    def receive_weights(self, bucket: Bucket) -> None:
        """Copy a bucket's tensors into place."""
        self.session.receive(bucket)

    def receive_weights_in_place(self, params: Mapping[str, torch.Tensor]) -> None:
        """Accept that `params` are this engine's memory and hold the new version."""
        apart = [
            name
            for name, p in params.items()
            if name not in self.weights or self.weights[name].data_ptr() != p.data_ptr()
        ]
        apart += [name for name in self.weights if name not in params]
        if apart:
            reason = f"tensors not shared with the engine: {', '.join(apart[:5])}"
            self.session.abort(reason)
            raise WeightSyncError(reason)
        self.session.receive_in_place()

    def commit_weight_update(self, digest: str) -> WeightVersion:
        """Check the digest and serve the new version; cached prefixes become unreachable."""
        version = self.session.commit(digest)
        self.flush_cache()
        return version

    def abort_weight_update(self, reason: str) -> None:
        """Refuse to generate until a full update commits."""
        self.session.abort(reason)

    def update_weights_from_tensor(
        self, params: Mapping[str, torch.Tensor], step: int, digest: str | None = None
    ) -> WeightVersion:
        """Copy a full set of parameters (engine names) into place."""
        self.begin_weight_update(step)
        with self._aborting():
            for metas in plan_buckets(params, 512 << 20):
                self.receive_weights(pack(metas, params))
        return self.commit_weight_update(digest or self.digest())

    def update_weights_from_disk(
        self, model_path: str | Path, step: int | None = None
    ) -> WeightVersion:
        """Load a Hugging Face folder in place, under its own version if it carries one.

        A folder that is missing or does not fit is refused before anything changes, as is one whose
        config.json, if it has one, is of another model.
        """
        folder = as_path(model_path, "model_path")
        if (folder / "config.json").exists():
            _require_same_model(load_model_config(folder), self.model_config, folder)
        read = open_safetensors(folder, self.specs)
        version = read_version(folder)
        if step is None:
            step = version.step if version else self.session.version.step + 1
        self.begin_weight_update(step)
        with self._aborting():
            fill(folder, self.specs, self.weights, read)
        self.session.receive_in_place()
        own = self.digest()
        # A digest is of bits, so it says nothing about a copy in another dtype.
        same_dtype = read(hf_names(self.specs)[-1]).dtype == self.config.dtype
        return self.commit_weight_update(version.digest if version and same_dtype else own)

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
        self._receiver = CollectiveReceiver(
            master_address, master_port, rank, world_size, backend, timeout_s, secret
        )

    def update_weights_from_distributed(self) -> WeightVersion:
        """Take one update from the weight group, in place."""
        if self._receiver is None:
            raise WeightSyncError("no weight group; call init_weights_update_group first")
        self._receiver.receive(self, self.config.device)
        return self.weight_version

    def get_weights_by_name(self, name: str) -> torch.Tensor:
        """A copy of one parameter by its engine (Megatron) name; KeyError if there is none."""
        return self.weights[name].clone()

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        """Whatever ends the block early also ends the weight update."""
        try:
            yield
        except BaseException as error:
            if self.session.state is SessionState.UPDATING:
                self.session.abort(str(error))
            raise

    def _require_idle(self, what: str) -> None:
        if self.scheduler.has_unfinished:
            raise WeightSyncError(
                f"{what} needs an idle engine: {self.scheduler.num_unfinished} requests are "
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
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    return values | {"rope_scaling": (kind, [scaling.get(key) for key in SCALING_KEYS[kind]])}
