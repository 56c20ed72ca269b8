"""Llama 2 and 3, SmolLM2 and their kin: a dense decoder without norms of heads and biases."""

from samebit.rollout.models.config import Family
from samebit.rollout.models.decoder import DenseModel


class Llama(DenseModel):
    family = Family(architecture="LlamaForCausalLM", model_type="llama", eos_token_id=2)
