"""Algorithms by name: a line each. No torch here, so that --help answers at once."""

from typing import TYPE_CHECKING, Any

from samebit.kernels.named import import_class
from samebit.trainer.config import AlgorithmConfig, require

if TYPE_CHECKING:
    from samebit.trainer.algorithms.base import Algorithm

ALGORITHMS = {
    "grpo": "samebit.trainer.algorithms.grpo:Grpo",
    "gspo": "samebit.trainer.algorithms.gspo:Gspo",
    "cispo": "samebit.trainer.algorithms.cispo:Cispo",
    "rloo": "samebit.trainer.algorithms.rloo:Rloo",
    "reinforce_plus_plus": "samebit.trainer.algorithms.reinforce_plus_plus:ReinforcePlusPlus",
    "reinforce_plus_plus_baseline": (
        "samebit.trainer.algorithms.reinforce_plus_plus_baseline:ReinforcePlusPlusBaseline"
    ),
    "ppo": "samebit.trainer.algorithms.ppo:Ppo",
    "distillation": "samebit.trainer.algorithms.distillation:Distillation",
}


def find_algorithm(name: str) -> "type[Algorithm[Any]]":
    """The class of a registered algorithm or of one named as module:Class; ValueError for none."""
    known = name in ALGORITHMS or ":" in name
    meaning = f"one of {tuple(ALGORITHMS)} or your own module:Class"
    require(known, "algorithm.name", name, meaning)
    from samebit.trainer.algorithms.base import Algorithm

    found = import_class(ALGORITHMS.get(name, name), "algorithm.name", Algorithm)
    fits = isinstance(found.Config, type) and issubclass(found.Config, AlgorithmConfig)
    require(fits, "algorithm.name", name, "a class whose Config is a subclass of AlgorithmConfig")
    return found


def make_algorithm(config: AlgorithmConfig) -> "Algorithm[Any]":
    """The algorithm that a configuration names, with its settings; ValueError for another's."""
    found = find_algorithm(config.name)
    if not isinstance(config, found.Config):
        raise ValueError(
            f"algorithm.name is {config.name!r}, whose settings are {found.Config.__name__}; these "
            f"are {type(config).__name__}"
        )
    return found(config)
