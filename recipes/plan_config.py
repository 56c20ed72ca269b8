"""The configuration of `samebit plan`: a GRPO run's own, and the cluster that it is to run on.

No torch here, so that --help answers at once.
"""

import math
from dataclasses import dataclass, field

from samebit.recipes.config import GrpoRun
from samebit.trainer.config import require, require_default

MAX_GPUS = 1024


@dataclass(frozen=True)
class Card:
    """Holds a GPU's data sheet: memory that programs find, and rates that no program reaches."""

    gpu_gib: float
    hbm_bytes_s: float
    flops_s: float
    nvlink_bytes_s: float


CARDS = {
    "h200": Card(gpu_gib=139.8, hbm_bytes_s=4.8e12, flops_s=989e12, nvlink_bytes_s=450e9),
    "h100": Card(gpu_gib=79.1, hbm_bytes_s=3.35e12, flops_s=989e12, nvlink_bytes_s=450e9),
}
"""SXM cards. H100 80GB and H200 by their data sheets; memory as torch counts it."""


@dataclass(kw_only=True)
class ClusterSection:
    """Describes machines of equal GPUs. What is unset is the card's."""

    card: str = "h200"
    """h200 or h100."""
    nodes: int = 1
    gpus_per_node: int = 8
    gpu_gib: float | None = None
    """Memory of a GPU."""
    hbm_bytes_s: float | None = None
    """What a GPU reads from its memory."""
    flops_s: float | None = None
    """Dense bf16 operations of a GPU."""
    nvlink_bytes_s: float | None = None
    """From a GPU to the others of its node, one way."""
    network_bytes_s: float = 50e9
    """From a GPU to those of other nodes, one way: 400 Gb/s."""

    def __post_init__(self) -> None:
        known = self.card in CARDS
        require(known, "cluster.card", self.card, f"one of {tuple(CARDS)}, with rates of your own")
        for name in ("nodes", "gpus_per_node"):
            value = getattr(self, name)
            require(value >= 1, f"cluster.{name}", value, "at least 1")
        total, per_node = self.num_gpus, self.gpus_per_node
        meaning = f"at most {MAX_GPUS // per_node} with {per_node} GPUs a node: {MAX_GPUS} GPUs"
        require(total <= MAX_GPUS, "cluster.nodes", self.nodes, meaning)
        for name in ("gpu_gib", "hbm_bytes_s", "flops_s", "nvlink_bytes_s", "network_bytes_s"):
            value = getattr(self, name)
            fits = value is None or 0 < value < math.inf
            require(fits, f"cluster.{name}", value, "positive and finite, or unset")

    @property
    def num_gpus(self) -> int:
        """The cluster has so many GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def gpu(self) -> Card:
        """One of its GPUs: the card's figures, or those that are given."""
        card = CARDS[self.card]
        return Card(
            gpu_gib=self.gpu_gib or card.gpu_gib,
            hbm_bytes_s=self.hbm_bytes_s or card.hbm_bytes_s,
            flops_s=self.flops_s or card.flops_s,
            nvlink_bytes_s=self.nvlink_bytes_s or card.nvlink_bytes_s,
        )


@dataclass(kw_only=True)
class PlanRun(GrpoRun):
    """`samebit plan`: what a GRPO run would take of a cluster. Nothing is run."""

    cluster: ClusterSection = field(default_factory=ClusterSection)
    output: str | None = None
    """A file for the plan as JSON, such as plan.json."""

    @property
    def num_processes(self) -> int:
        """The plan is made by one process; the run's are trainer.parallel's."""
        return 1

    @property
    def launcher(self) -> str:
        """The plan is made here; the run's processes are placement.launcher's."""
        return "local"

    def validate(self) -> None:
        """Check across sections; raises ValueError, which names the keys."""
        super().validate()
        require(self.output != "", "output", "", "the path of a file, or unset")
        gpu = self.device is None or self.device.startswith("cuda")
        require(gpu, "device", self.device, "unset or cuda: a plan is of GPUs")
        unknown = "no result says how fast such a run is"
        idle = ("dry_run", "resume", "overwrite", "max_restarts")
        require_default(self, "", idle, "nothing is run")
        require_default(self.engine, "engine", ("speculative",), unknown)
        require_default(self.numerics, "numerics", ("attention",), unknown)
        require(not self.draft.is_online, "draft.train", "online", f"left alone: {unknown}")
        for section in ("critic", "distillation"):
            absent = getattr(self, section) is None
            meaning = f"one without a section `{section}`: {unknown}"
            require(absent, "algorithm.name", self.algorithm.name, meaning)
