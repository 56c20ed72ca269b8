"""What an update of the engines' weights moves, by transport, and how long that takes."""

from collections import Counter
from dataclasses import dataclass

from samebit.recipes.plan_config import PlanRun
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import Links
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.megatron.stages import stage_specs
from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.transfer_plan import Holding, TransferPlan, make_plan
from samebit.weight_sync.transports.registry import TRANSPORTS

BUCKET_BYTES = 256 << 20


@dataclass(frozen=True)
class SyncPlan:
    """Holds one transport's update.

    held_bytes: what an engine rank holds, and is filled with; moved_bytes: of that, what comes from
    another rank's memory; all_bytes: moved over all ranks. seconds: None where no result says.
    """

    transport: str
    held_bytes: int
    moved_bytes: int
    all_bytes: int
    seconds: float | None


def plan_sync(run: PlanRun, model: ModelConfig, layout: Layout, links: Links) -> list[SyncPlan]:
    """Return the update by the run's transport, then by others that its trainer could have."""
    p = layout.parallel
    kind = "stages" if p.pipeline > 1 else "copies" if p.num_processes > 1 else "one"
    names = [
        name
        for name, entry in TRANSPORTS.items()
        if kind in entry.trainers and (kind == "one" or run.placement.engine in entry.engines)
    ]
    names.sort(key=lambda name: name != run.placement.transport)
    plan = pipeline_plan(model, layout)
    held, moved = plan.bytes_to(0), Counter[int]()
    for transfer in plan.transfers:
        if transfer.sender != transfer.receiver:
            moved[transfer.receiver] += transfer.target.num_bytes
    found = []
    for name in names:
        if name == "stages":
            most, all_bytes = max(moved.values()), sum(moved.values()) * layout.num_engines
            all_bytes = all_bytes // p.pipeline * p.tensor
        else:
            most = 0 if name == "alias" else held
            all_bytes = most * layout.num_engines * layout.engine_tensor
        seconds = _seconds(name, held, layout, links)
        found.append(SyncPlan(name, held, most, all_bytes, seconds))
    return found


def pipeline_plan(model: ModelConfig, layout: Layout) -> TransferPlan:
    """Return the transfer plan of the first tensor ranks of one pipeline, which are its senders.

    Every one of them is a receiver too: it has a rank of an engine, of the whole model. The other
    tensor ranks, and other pipelines, do the same side by side. A rank of an engine apart gets the
    parts of all tensor ranks that hold some of its own.
    """
    size = layout.parallel.tensor
    tensor_ranks = range(max(1, size // layout.engine_tensor))
    senders = [
        _holding(stage_specs(model, (rank, size), stage))
        for stage in layout.stages(model)
        for rank in tensor_ranks
    ]
    receiver = _holding(model.param_specs((0, layout.engine_tensor)))
    return make_plan(senders, [receiver] * len(layout.stages(model)), BUCKET_BYTES)


def _holding(specs: list[ParamSpec]) -> Holding:
    return Holding(tuple(specs), ("torch.bfloat16",) * len(specs))


def _seconds(name: str, held: int, layout: Layout, links: Links) -> float | None:
    """Of the bytes' way, and of the digest that every update ends with.

    Stages broadcast one after another, so that the whole model goes over a link once. What goes to
    engines apart leaves by the trainers' own links, for each of them.
    """
    gpu, p = layout.cluster.gpu, layout.parallel
    across = layout.spans_nodes(p.num_processes // p.pipeline, p.pipeline)
    link = layout.cluster.network_bytes_s if across else gpu.nvlink_bytes_s
    rates = {"stages": link * links.transfer, "nccl": gpu.nvlink_bytes_s * links.transfer}
    rates["ipc"] = gpu.hbm_bytes_s * links.ipc
    digest_s = held / (gpu.hbm_bytes_s * links.digest)
    if name == "alias":
        return digest_s
    sent = held * max(1, layout.engines_apart * layout.engine_tensor / p.num_processes)
    return sent / rates[name] + digest_s if name in rates else None
