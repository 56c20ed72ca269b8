"""What would make a plan fit that does not: settings, alone or together, that are tried out."""

import math
from collections.abc import Iterator
from copy import deepcopy
from itertools import combinations
from typing import Any

from samebit.recipes.plan_config import PlanRun
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import Measured
from samebit.recipes.planning.memory import MemoryPlan, plan_memory
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.algorithms.registry import make_algorithm

MOST_TOGETHER = 3

type Change = dict[str, Any]
"""Values by their keys."""


def remedies(run: PlanRun, model: ModelConfig, measured: Measured, memory: MemoryPlan) -> list[str]:
    """Return what fits, in the words of the command line, with the fewest changes; or, where none
    of them does, the whole GiB of the GPUs on which the run would fit as it is."""
    changes = list(_changes(run))
    for count in range(1, MOST_TOGETHER + 1):
        together = (
            {key: value for change in chosen for key, value in change.items()}
            for chosen in combinations(changes, count)
        )
        found = [
            " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
            for change in together
            if _fits(run, model, measured, change)
        ]
        if found:
            return found
    gib = math.ceil(memory.peak_bytes / 2**30)
    while not _fits(run, model, measured, {"cluster.gpu_gib": gib}):
        gib = max(gib + 1, gib * 21 // 20)  # an automatic KV cache takes part of what is added
    return [f"cluster.gpu_gib={gib}"]


def _changes(run: PlanRun) -> Iterator[Change]:
    """Settings that take less memory than the run's own, those that cost least time first."""
    parallel, engine, longest = run.trainer.parallel, run.engine, run.rollout.longest
    if run.placement.engine == "colocated" and run.placement.release_memory is False:
        yield {"placement.release_memory": True}
    if parallel.data * parallel.context > 1 and not parallel.distributed_optimizer:
        yield {"trainer.parallel.distributed_optimizer": True}
    if run.trainer.micro_batch_tokens > longest:
        yield {"trainer.micro_batch_tokens": longest}
    if engine.kv_cache_tokens is not None:
        yield {"engine.kv_cache_tokens": -(-longest // engine.page_size) * engine.page_size}
    elif engine.kv_memory_fraction is None or engine.kv_memory_fraction > 0.25:
        yield {"engine.kv_memory_fraction": 0.25}
    if engine.max_num_seqs > 64:
        yield {"engine.max_num_seqs": 64}
    if parallel.recompute != "full":
        yield {"trainer.parallel.recompute": "full"}
    if make_algorithm(run.algorithm).has_reference and not parallel.offload_reference:
        yield {"trainer.parallel.offload_reference": True}
    if not parallel.offload_optimizer:
        yield {"trainer.parallel.offload_optimizer": True}
    twice = {"trainer.parallel.tensor": 2 * parallel.tensor}
    if parallel.num_processes * 2 <= run.cluster.num_gpus:
        yield twice
    elif parallel.data % 2 == 0:
        yield twice | {"trainer.parallel.data": parallel.data // 2}


def _fits(run: PlanRun, model: ModelConfig, measured: Measured, change: Change) -> bool:
    changed = deepcopy(run)
    for key, value in change.items():
        *sections, name = key.split(".")
        section: Any = changed
        for part in sections:
            section = getattr(section, part)
        setattr(section, name, value)
    try:
        changed.validate()
        layout = Layout.of(changed, model)
    except ValueError:  # two settings that do not go together, or a layout that does not divide
        return False
    return plan_memory(changed, model, layout, measured).shortage is None
