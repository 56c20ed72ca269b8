"""Llama 2 and 3, SmolLM2 and their kin: grouped-query attention, SwiGLU, no biases."""

from samebit.rollout.models.config import Family

FAMILY = Family(architecture="LlamaForCausalLM", model_type="llama", qk_norm=False, eos_token_id=2)
