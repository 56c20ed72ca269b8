"""The transports by name (placement.transport): the class of each, and where it fits. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Says which class it is, and between which trainers and engines it may be."""

    path: str
    """module:Class, a Lease or a Transport."""
    engines: tuple[str, ...]
    """colocated: in the trainer's process; process: in one of its own."""
    trainers: tuple[str, ...]
    """one: a single process; copies: several, of which none is a stage of a pipeline; stages."""
    gpus: int = 0
    """How many it is between, with one trainer and one engine; 0: it needs none."""
    settings: tuple[str, ...] = ()
    """Keys of the placement that `between` takes by name."""
    replicas: bool = False
    """Whether it updates several engines at once."""


TRAINERS = ("one", "copies", "stages")
_REMOTE = ("delta", "timeout_s")


TRANSPORTS = {
    "alias": Entry(
        "samebit.weight_sync.transports.alias:AliasLease", ("colocated",), ("one", "copies")
    ),
    "stages": Entry(
        "samebit.weight_sync.transports.stages:StageTransport", ("colocated",), ("stages",)
    ),
    "gloo": Entry(
        *("samebit.weight_sync.transports.remote:GlooTransport", ("process",), TRAINERS),
        settings=_REMOTE,
        replicas=True,
    ),
    "nccl": Entry(
        *("samebit.weight_sync.transports.remote:NcclTransport", ("process",), TRAINERS, 2),
        settings=_REMOTE,
        replicas=True,
    ),
    "ipc": Entry(
        *("samebit.weight_sync.transports.remote:IpcTransport", ("process",), ("one",), 1),
        settings=_REMOTE,
    ),
    "file": Entry(
        "samebit.weight_sync.transports.file:FileTransport", ("colocated", "process"), ("one",)
    ),
}
FROM_ONE = tuple(name for name, entry in TRANSPORTS.items() if "one" in entry.trainers)
"""Those from one trainer process."""
