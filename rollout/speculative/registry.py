"""The proposers by name."""

from samebit.kernels.named import import_class
from samebit.rollout.speculative.proposer import Proposer

PROPOSERS = {
    "suffix": "samebit.rollout.speculative.suffix:Suffix",
    "eagle3": "samebit.rollout.speculative.eagle3:Eagle3",
    "peagle": "samebit.rollout.speculative.eagle3:Eagle3",
    "hybrid": "samebit.rollout.speculative.hybrid:Hybrid",
}
"""Where each proposer is, as "module:class"; the names of EngineConfig.speculative."""


def proposer(name: str) -> type[Proposer]:
    """The proposer of this name, or one named as module:Class; ValueError for none."""
    return import_class(PROPOSERS.get(name, name), "engine.speculative", Proposer)
