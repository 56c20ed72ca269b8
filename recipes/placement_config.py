"""Where the engine of a run of GRPO is, as a section of the configuration. No torch here."""

from dataclasses import dataclass

from samebit.trainer.config import ParallelConfig, check_tp_invariant, require
from samebit.weight_sync.transports.registry import TRANSPORTS

PLACEMENTS = ("colocated", "process")
LAUNCHERS = ("local", "ray")


@dataclass(kw_only=True)
class PlacementSection:
    """Where the engine runs and how weights reach it. Neither can change a token."""

    engine: str = "colocated"
    """colocated: in the trainer's process; process: in one of its own."""
    transport: str = "alias"
    """How weights reach it: alias, stages (pipelines), file (colocated); gloo, nccl (another GPU),
    ipc (the same GPU), file (process); or module:Class, a transport of your own."""
    delta: bool = False
    """Send only what has changed in the weights; the trainer's device keeps them once more."""
    timeout_s: float = 600.0
    """Seconds that trainer and engine wait for each other in an update by gloo, nccl or ipc. An
    engine apart that stands still in it is killed then, and replaced (gloo, nccl)."""
    replicas: int = 1
    """Engines with placement.engine=process, which share the prompts: on a GPU each, with nccl."""
    engine_tensor: int = 1
    """Tensor parallel processes of an engine apart, on a GPU each with nccl: as many as
    trainer.parallel.tensor, or with numerics.tp_invariant any of 1, 2, 4, 8."""
    replica_timeout_s: float = 600.0
    """By gloo or nccl: an engine that draws or is asked something and takes no step for so long is
    killed.
    Compiling kernels takes long."""
    start_timeout_s: float = 1800.0
    """By gloo or nccl: an engine that has not started in so long is killed."""
    max_restarts: int = 3
    """By gloo or nccl: how many engines may die in a run, and are replaced."""
    launcher: str = "local"
    """Who starts the run's processes, the trainer's and those of engines apart: local, samebit on
    this machine; ray, which has a place for each on a cluster."""
    ray_address: str | None = None
    """With launcher=ray: host:port of a cluster that this machine is a node of, or auto; unset: one
    on this machine, for this run."""
    release_memory: bool | None = None
    """Give the engine's KV cache and CUDA graphs back while training, and the trainer's gradients
    while drawing; unset: with a colocated engine on a GPU."""

    def __post_init__(self) -> None:
        known = self.engine in PLACEMENTS
        require(known, "placement.engine", self.engine, f"one of {PLACEMENTS}")
        fitting = tuple(name for name, entry in TRANSPORTS.items() if self.engine in entry.engines)
        meaning = f"one of {fitting} for placement '{self.engine}'"
        fits = self.transport in fitting or ":" in self.transport
        require(fits, "placement.transport", self.transport, meaning)
        fits = 0 < self.timeout_s < 1e8
        require(fits, "placement.timeout_s", self.timeout_s, "positive, and below 1e8")
        self._check_engines()
        self._check_launcher()
        for key, default in (("delta", False), ("timeout_s", 600.0)):
            able = tuple(name for name, entry in TRANSPORTS.items() if key in entry.settings)
            value, usual = getattr(self, key), str(default).lower()
            fits = value == default or self.transport in able
            meaning = f"with placement.transport '{self.transport}', or the transport one of {able}"
            require(fits, f"placement.{key}", value, f"{usual} {meaning}")
        fits, meaning = not self.release_memory or self.engine == "colocated", "unset or false"
        meaning += " with placement.engine=process: the engine's memory is another process's"
        require(fits, "placement.release_memory", self.release_memory, meaning)

    def _check_engines(self) -> None:
        able = tuple(name for name, entry in TRANSPORTS.items() if entry.replicas)
        meaning = f"1 with placement.transport '{self.transport}', or the transport one of {able}"
        for name in ("replicas", "engine_tensor"):
            value = getattr(self, name)
            require(value >= 1, f"placement.{name}", value, "positive")
            fits = value == 1 or self.transport in able or ":" in self.transport
            require(fits, f"placement.{name}", value, meaning)
        fits = self.engine_tensor == 1 or self.engine == "process"
        meaning = "1 with placement.engine=colocated, which has trainer.parallel.tensor"
        require(fits, "placement.engine_tensor", self.engine_tensor, meaning)
        for key in ("replica_timeout_s", "start_timeout_s"):
            value = getattr(self, key)
            require(0 < value < 1e8, f"placement.{key}", value, "positive, and below 1e8")
        require(self.max_restarts >= 0, "placement.max_restarts", self.max_restarts, "0 or more")
        usual = {"replica_timeout_s": 600.0, "start_timeout_s": 1800.0, "max_restarts": 3}
        for key, default in usual.items():
            value = getattr(self, key)
            fits = value == default or self.has_replicas
            meaning = f"{default} with placement.transport '{self.transport}', or one of {able}"
            require(fits, f"placement.{key}", value, meaning)

    def _check_launcher(self) -> None:
        require(self.launcher in LAUNCHERS, "placement.launcher", self.launcher, f"{LAUNCHERS}")
        able = tuple(name for name, entry in TRANSPORTS.items() if entry.replicas)
        together = self.launcher == "local" or self.engine == "colocated"
        fits = together or self.transport in able or ":" in self.transport
        meaning = f"local with placement.transport '{self.transport}', or the transport one of "
        require(fits, "placement.launcher", self.launcher, f"{meaning}{able}")
        address = self.ray_address
        fits = address is None or self.launcher == "ray"
        require(fits, "placement.ray_address", address, "unset without placement.launcher=ray")
        host, _, port = (address or "").rpartition(":")
        is_place = bool(host) and "/" not in host and port.isdecimal() and int(port) < 1 << 16
        fits = address in (None, "auto") or is_place
        require(fits, "placement.ray_address", address, "auto, or host:port as of ray start")

    @property
    def has_replicas(self) -> bool:
        """Whether engines apart are watched, and replaced if they die; one is, too."""
        entry = TRANSPORTS.get(self.transport)
        several = self.replicas > 1 or (entry is not None and entry.replicas)
        return self.engine == "process" and several

    @property
    def num_engine_processes(self) -> int:
        """Of all engines apart; 0: there are none."""
        return self.replicas * self.engine_tensor if self.engine == "process" else 0

    def check(self, parallel: ParallelConfig, tp_invariant: bool) -> None:
        """Raise ValueError where it does not fit the trainer's layout."""
        count, apart = parallel.num_processes, self.engine == "process"
        meaning = f"{parallel.tensor} with placement.engine=process and trainer.parallel.tensor="
        meaning += f"{parallel.tensor} unless numerics.tp_invariant=true: another number of "
        meaning += "processes computes other bits without it"
        key, size = "placement.engine_tensor", self.engine_tensor
        require(not apart or tp_invariant or size == parallel.tensor, key, size, meaning)
        check_tp_invariant(tp_invariant, size, key)
        trainer = "stages" if parallel.pipeline > 1 else "copies" if count > 1 else "one"
        fitting = sorted(
            name
            for name, entry in TRANSPORTS.items()
            if trainer in entry.trainers and self.engine in entry.engines
        )
        layout = f"{count} processes of the trainer, in {parallel.pipeline} stages"
        meaning = f"{' or '.join(fitting)} with placement={self.engine} and {layout}"
        is_own = ":" in self.transport and not (apart and count > 1)
        fits = self.transport in fitting or is_own
        require(fits, "placement.transport", self.transport, meaning)
