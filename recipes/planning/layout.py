"""Which rank of a GRPO run is where: its place in the layout, its GPU, its engine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from samebit.recipes.models.shards import require_shards
from samebit.recipes.plan_config import ClusterSection, PlanRun
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.config import ParallelConfig, require
from samebit.trainer.megatron.stages import Stage, make_stage
from samebit.weight_sync.transports.registry import TRANSPORTS


@dataclass(frozen=True)
class Place:
    """Says where one rank is, in Megatron's order: tensor ranks are neighbours, stages far apart.

    engine: the number of the engine that it is a rank of.
    """

    rank: int
    tensor: int
    context: int
    data: int
    stage: int
    engine: int
    node: int
    gpu: int


@dataclass(frozen=True)
class Layout:
    """Holds the ranks of a run on a cluster."""

    parallel: ParallelConfig
    cluster: ClusterSection
    engines_apart: int
    """Engines that have the GPUs behind the trainer's (placement=process by nccl)."""
    engine_tensor: int
    """So many GPUs share every layer of an engine."""

    @classmethod
    def of(cls, run: PlanRun, model: ModelConfig) -> "Layout":
        """Raises ValueError, which names the keys, for ranks that model or cluster cannot hold."""
        parallel, cluster = run.trainer.parallel, run.cluster
        make_stage(model, 0, parallel.pipeline, parallel.virtual_pipeline)
        require_shards(model, parallel.tensor, "trainer.parallel.tensor")
        require_shards(model, run.placement.engine_tensor, "placement.engine_tensor")
        entry = TRANSPORTS.get(run.placement.transport)
        meaning = f"one of {tuple(TRANSPORTS)}: what another sends is not known here"
        require(entry is not None, "placement.transport", run.placement.transport, meaning)
        is_apart = run.placement.engine == "process" and entry is not None and entry.gpus == 2
        known = is_apart or run.placement.engine == "colocated" or parallel.num_processes == 1
        meaning = "nccl with several processes of the trainer beside engines apart: no result says "
        meaning += "how fast another is"
        require(known, "placement.transport", run.placement.transport, meaning)
        apart, size = run.placement.replicas * is_apart, run.placement.engine_tensor
        meaning = "nccl with placement.engine_tensor: engines behind another transport are on the "
        meaning += "trainer's GPU"
        require(size == 1 or is_apart, "placement.transport", run.placement.transport, meaning)
        layout = cls(parallel, cluster, apart, size if apart else parallel.tensor)
        per_node = cluster.gpus_per_node
        least = layout.num_gpus if apart else 1
        meaning = f"at least {least} with placement.transport=nccl: one node has trainer and "
        meaning += "engines"
        require(per_node >= least, "cluster.gpus_per_node", per_node, meaning)
        needed, meaning = layout.num_gpus, f"such that cluster.nodes x {per_node} GPUs hold"
        meaning += f" {needed}: trainer.parallel is {parallel}"
        fits = needed <= cluster.num_gpus
        require(fits, "cluster.nodes", cluster.nodes, meaning + (", and one engine" * apart))
        fits = parallel.tensor == 1 or apart > 0 or per_node % parallel.tensor == 0
        meaning = f"a divisor of cluster.gpus_per_node = {per_node}: tensor ranks share a node"
        require(fits, "trainer.parallel.tensor", parallel.tensor, meaning)
        fits = needed <= per_node or needed % per_node == 0
        meaning = f"a divisor of the {needed} processes of trainer.parallel: every node starts as "
        meaning += "many"
        require(fits, "cluster.gpus_per_node", per_node, meaning)
        return layout

    @property
    def num_gpus(self) -> int:
        """The run takes so many GPUs."""
        return self.parallel.num_processes + self.engines_apart * self.engine_tensor

    @property
    def num_engines(self) -> int:
        """So many engines share the prompts."""
        return self.engines_apart or self.parallel.num_processes // self.parallel.tensor

    def places(self) -> Iterator[Place]:
        """Every rank of the trainer."""
        p, per_node = self.parallel, self.cluster.gpus_per_node
        for rank in range(p.num_processes):
            rest, tensor = divmod(rank, p.tensor)
            engine = rest
            rest, context = divmod(rest, p.context)
            stage, data = divmod(rest, p.data)
            yield Place(rank, tensor, context, data, stage, engine, *divmod(rank, per_node))

    def stages(self, model: ModelConfig) -> list[Stage]:
        """Every stage of the pipeline."""
        p = self.parallel
        return [make_stage(model, i, p.pipeline, p.virtual_pipeline) for i in range(p.pipeline)]

    def spans_nodes(self, stride: int, size: int) -> bool:
        """Say whether `size` ranks that are `stride` apart are in several nodes."""
        per_node = self.cluster.gpus_per_node
        return size > 1 and stride * size > per_node

    def to_plain(self) -> list[dict[str, Any]]:
        """What plan.json says of the ranks."""
        found = [vars(place) | {"trains": True} for place in self.places()]
        if self.engines_apart:
            for place in found:
                del place["engine"]
        for number in range(self.engines_apart * self.engine_tensor):
            engine, tensor = divmod(number, self.engine_tensor)
            first = self.parallel.num_processes
            node, gpu = divmod(first + number, self.cluster.gpus_per_node)
            where = {"tensor": tensor, "node": node, "gpu": gpu}
            found.append({"engine": engine, **where, "trains": False})
        return found
