"""The critic of a run: made beside its policy, with the weights of its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from samebit.recipes.config import GrpoRun
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import OUTPUT
from samebit.rollout.models.registry import has_value_head
from samebit.rollout.runtime.weights import load_safetensors
from samebit.trainer.critic.value_model import trunk
from samebit.trainer.megatron.critic import ActorCritic, MegatronCritic
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.weight_sync.mapping import ParamSpec


def make_critic(run: GrpoRun, model: ModelConfig, policy: MegatronTrainer) -> MegatronCritic:
    """Make the critic that the run asks for, and give it to the policy.

    model: that of its folder, whose output layer a value head replaces unless it is one.
    """
    assert isinstance(policy, ActorCritic)
    assert run.critic is not None
    policy.critic = MegatronCritic(policy, model, run.critic, run.num_critic_updates)
    fill_critic(policy.critic, model, run.critic.model or run.model.path)
    return policy.critic


def fill_critic(critic: MegatronCritic, model: ModelConfig, folder: str | Path) -> None:
    """Fill it from a Hugging Face folder of `model`: the trunk, and the value head if the folder
    has one, else with zeros."""
    rates = has_value_head(folder)

    def load(specs: Sequence[ParamSpec], params: Mapping[str, Tensor]) -> None:
        if rates:
            load_safetensors(Path(folder), specs, params, critic.model.param_specs())
            return
        known = trunk(specs)
        own = {spec.name: params[spec.name] for spec in known}
        load_safetensors(Path(folder), known, own, model.param_specs())
        if OUTPUT in params:
            params[OUTPUT].zero_()

    critic.fill(load)
