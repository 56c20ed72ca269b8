"""The engine computes the model that transformers computes, to fp32 accuracy."""

import pytest
import torch
from helpers import edit_config, edit_tensors

from samebit.kernels.rms_norm import rms_norm
from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_IN_FULL = {
    **YARN,
    "beta_fast": 16,
    "beta_slow": 2,
    "mscale": 0.8,
    "mscale_all_dim": 0.5,
    "truncate": False,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
# name -> (architecture, seed, what differs from the shape below)
VARIANTS = {
    "qwen3-untied": ("qwen3", 0, {}),
    "qwen3-untied-2": ("qwen3", 1, {}),
    "qwen3-tied": ("qwen3", 2, {"tie_word_embeddings": True}),
    "qwen3-one-group": ("qwen3", 3, {"num_key_value_heads": 4}),
    "qwen3-wide-heads": ("qwen3", 4, {"head_dim": 32, "rope_theta": 1e6}),
    "llama-untied": ("llama", 5, {}),
    "llama-tied": ("llama", 6, {"tie_word_embeddings": True}),
    "llama-tied-2": ("llama", 7, {"tie_word_embeddings": True}),
    "llama-no-head-dim": ("llama", 8, {"head_dim": None}),
    "llama-9-3": (
        "llama",
        9,
        {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "llama-one-kv-head": ("llama", 10, {"num_key_value_heads": 1}),
    "llama-rope-llama3": ("llama", 11, {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama-rope-linear": ("llama", 12, {"rope_scaling": LINEAR}),
    "llama-eps": ("llama", 13, {"rms_norm_eps": 1e-2}),
    "llama-yarn": ("llama", 14, {"rope_scaling": YARN}),
    "qwen3-yarn": ("qwen3", 15, {"rope_scaling": YARN_IN_FULL}),
    "qwen2-untied": ("qwen2", 16, {}),
    "qwen2-untied-2": ("qwen2", 17, {}),
    "qwen2-tied": ("qwen2", 18, {"tie_word_embeddings": True}),
    "qwen2-no-head-dim": ("qwen2", 19, {"head_dim": None, "tie_word_embeddings": True}),
    "qwen2-one-group": ("qwen2", 20, {"num_key_value_heads": 4}),
    "qwen2-one-kv-head": ("qwen2", 21, {"num_key_value_heads": 1}),
    "qwen2-linear": ("qwen2", 22, {"rope_scaling": LINEAR}),
    "qwen2-llama3": ("qwen2", 23, {"rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "qwen2-yarn": ("qwen2", 24, {"rope_scaling": YARN, "rope_theta": 1e6}),
    "qwen2-yarn-in-full": ("qwen2", 25, {"rope_scaling": YARN_IN_FULL}),
    "qwen2-yarn-attention": ("qwen2", 26, {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen2-no-windows": (
        "qwen2",
        27,
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    ),
}
PROMPT_LENS = (1, 2, 17, 64, 70, 150)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request, tmp_path_factory):
    """(engine, transformers model) of one folder; random norms too, or they could be swapped."""
    from transformers import AutoModelForCausalLM

    architecture, seed, changes = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("variant") / request.param
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "tie_word_embeddings": False,
    }
    write_config(folder, architecture, **{**shape, **changes})
    edit_config(folder)  # drops keys that are None
    write_weights(folder, seed, std=0.15)
    generator = torch.Generator().manual_seed(seed)

    def shake_norms(tensors):
        for name, tensor in tensors.items():
            if name.endswith("norm.weight"):
                tensor += torch.randn(tensor.shape, generator=generator) * 0.3

    edit_tensors(folder, shake_norms)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return Engine(folder), theirs.eval()


def make_prompts(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (n,), generator=generator).tolist() for n in PROMPT_LENS]


@torch.no_grad()
def their_logits(theirs, tokens):
    return theirs(torch.tensor([tokens])).logits[0]


def test_logprobs_are_theirs(model):
    """Every position of several sequences within 1e-4, and the logits are spread enough to tell."""
    engine, theirs = model
    for temperature in (1.0, 0.7):
        sequences = make_prompts(1)[1:]
        found = engine.score(sequences, temperature)
        for tokens, values in zip(sequences, found, strict=True):
            rows = (their_logits(theirs, tokens) / temperature).log_softmax(-1)
            expected = rows[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
            assert len(values) == len(tokens) - 1
            assert (torch.tensor(values) - expected).abs().max() < 1e-4
            assert rows.std() > 0.3


def test_greedy_tokens_are_theirs(model):
    """Temperature 0 takes transformers' argmax, and reports its log-prob at temperature 1."""
    engine, theirs = model
    params = SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True)
    for prompt, [completion] in zip(
        make_prompts(2), engine.generate(make_prompts(2), params), strict=True
    ):
        tokens = list(prompt)
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            row = their_logits(theirs, tokens)[-1].log_softmax(-1)
            assert token == row.argmax().item(), f"{len(prompt)} prompt tokens, at {len(tokens)}"
            assert abs(logprob - row[token].item()) < 1e-4
            tokens.append(token)


@torch.no_grad()
def test_hidden_states_are_theirs(model):
    """Layer i is the residual stream after i layers, as output_hidden_states counts them."""
    engine, theirs = model
    prompt = make_prompts(3)[-1]
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    [[completion]] = engine.generate([prompt], params, return_hidden_states=[0, 1, 2, 3])
    tokens = [*prompt, *completion.token_ids][:-1]
    output = theirs(torch.tensor([tokens]), output_hidden_states=True)
    for layer in range(3):
        found = completion.hidden_states[layer]
        torch.testing.assert_close(found, output.hidden_states[layer][0], rtol=1e-4, atol=1e-4)
    norm = theirs.model.norm  # theirs are the last ones after the final norm
    last = rms_norm(completion.hidden_states[3], norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(last, output.hidden_states[3][0], rtol=1e-4, atol=1e-4)
