"""Small drafts of every kind, and a plain forward of them, for the tests."""

import torch
from torch import Tensor

from samebit.rollout.models.draft.config import DraftConfig, Verifier
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.runtime.weights import load_dummy
from samebit.weight_sync.mapping import hf_tensors

OPTIONS = {
    "eagle3": {},
    "eagle3.1": {"fc_norm": True, "feeds_normed": True},
    "speculators": {"norm_before_fc": True, "norm_before_residual": True, "feeds_normed": True},
    "own width": {
        "target_hidden_size": 20,
        "owns_embedding": True,
        "captured_layers": (0, 1, 2, 4),
    },
    "block": {"mask_token_id": 60, "fc_norm": True},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_config(**options) -> DraftConfig:
    """D = 24, 4 / 2 heads of 6, 29 of 61 tokens, streams after 1, 2 and 3 layers."""
    usual = {
        "hidden_size": 24,
        "target_hidden_size": 24,
        "captured_layers": (1, 2, 3),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "ffn_size": 40,
        "vocab_size": 61,
        "draft_vocab_size": 29,
        "max_position": 128,
        "norm_eps": 1e-6,
        "verifier": Verifier("some/target", ("LlamaForCausalLM",)),
        "token_ids": {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": [2, 3]},
    }
    return DraftConfig(**usual | options)


def make_vocabulary(config: DraftConfig) -> DraftVocabulary:
    """A random subset of the target's tokens."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.randint(1000, (config.vocab_size,), generator=generator).numpy()
    return DraftVocabulary.most_frequent(counts, config.draft_vocab_size)


def make_params(config: DraftConfig, seed: int = 0, dtype=torch.float32) -> dict[str, Tensor]:
    """Random ones, the norms' too."""
    specs = config.param_specs()
    params = {spec.name: torch.empty(spec.shape, dtype=dtype) for spec in specs}
    load_dummy(specs, params, seed, std=0.15)
    generator = torch.Generator().manual_seed(seed + 1)
    for param in params.values():
        if param.dim() == 1:
            param.copy_(1 + 0.3 * torch.randn(param.shape, generator=generator))
    return params


def plain_tensors(config: DraftConfig, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves by Hugging Face names, in fp64."""
    named = hf_tensors(config.param_specs(), params)
    return {name: tensor.detach().double().requires_grad_() for name, tensor in named}


def plain_norm(config: DraftConfig, x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight


def plain_fuse(config: DraftConfig, w: dict[str, Tensor], features: list[Tensor]) -> Tensor:
    if config.fc_norm:
        features = [plain_norm(config, x, w[f"fc_norm.{i}.weight"]) for i, x in enumerate(features)]
    joined = torch.cat(features, -1)
    if config.norm_before_fc:
        joined = plain_norm(config, joined, w["input_norm.weight"])
    return joined @ w["fc.weight"].t()


def plain_mask(config: DraftConfig, w: dict[str, Tensor]) -> Tensor:
    """[1, D]: what a block draft reads in place of a token's streams."""
    width = config.target_hidden_size
    return plain_fuse(config, w, [x[None] for x in w["mask_hidden"].split(width)])


def plain_rotate(config: DraftConfig, x: Tensor, positions: Tensor) -> Tensor:
    """x [T, heads, Dh]; unscaled."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions[:, None] * frequency)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def plain_step(config, w, states, token_ids, positions, embedding, attend):
    """(fed back, final) of one pass; attend(q, k, v) of [T, heads, Dh] -> [T, Hq, Dh]."""
    layer = {k.removeprefix("midlayer."): v for k, v in w.items()}
    embedded = plain_norm(config, embedding[token_ids], layer["input_layernorm.weight"])
    normed = plain_norm(config, states, layer["hidden_norm.weight"])
    inputs = torch.cat([embedded, normed], -1)
    q, k, v = (
        (inputs @ layer[f"self_attn.{x}_proj.weight"].t()).unflatten(1, (-1, config.head_dim))
        for x in "qkv"
    )
    q, k = plain_rotate(config, q, positions), plain_rotate(config, k, positions)
    attended = attend(q, k, v).flatten(1) @ layer["self_attn.o_proj.weight"].t()
    residual = (normed if config.norm_before_residual else states) + attended
    x = plain_norm(config, residual, layer["post_attention_layernorm.weight"])
    gate, up = (x @ layer[f"mlp.{n}_proj.weight"].t() for n in ("gate", "up"))
    branch = torch.nn.functional.silu(gate) * up
    residual = residual + branch @ layer["mlp.down_proj.weight"].t()
    final = plain_norm(config, residual, w["norm.weight"])
    return (final if config.feeds_normed else residual), final
