"""Small models made on the spot: the demo's, and random ones for `samebit verify` and the tests."""

import json
from pathlib import Path
from typing import Any

from samebit.rollout.models.registry import FAMILIES, load_model_config
from samebit.rollout.runtime.weights import load_dummy

_EOS = "<eos>"
_SHAPE: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
    "eos_token_id": 0,
}


def write_config(folder: Path, architecture: str, **shape: Any) -> None:
    """Write a config.json of a model_type; `shape` holds Hugging Face keys."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {model.family.model_type: model.family.architecture for model in FAMILIES}
    names = {"model_type": architecture, "architectures": [known[architecture]]}
    config = {**_SHAPE, **names, **shape}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_weights(folder: Path, seed: int, std: float = 0.02) -> None:
    """Write model.safetensors with N(0, std) weights and norms of one for the folder's config."""
    import torch

    from samebit.weight_sync.mapping import hf_tensors
    from samebit.weight_sync.transports.file import save_tensors

    specs = load_model_config(folder).param_specs()
    params = {spec.name: torch.empty(spec.shape) for spec in specs}
    load_dummy(specs, params, seed, std)
    tensors = {name: tensor.contiguous() for name, tensor in hf_tensors(specs, params)}
    temporary = folder / ".model.safetensors.tmp"  # a demo that is killed here can be resumed
    save_tensors(tensors, temporary)
    temporary.replace(folder / "model.safetensors")


def write_character_tokenizer(folder: Path, characters: str) -> int:
    """Write a tokenizer of one token a character, after <eos> = 0; returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {_EOS: 0} | {c: i + 1 for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=_EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_EOS, unk_token=_EOS
    )
    fast.save_pretrained(folder)
    return len(vocab)


def make_demo_model(folder: Path, seed: int) -> None:
    """Write the demo's model: two Qwen3 layers, D = 64, over the characters of "0123456789="."""
    vocab_size = write_character_tokenizer(folder, "0123456789=")
    write_config(
        folder,
        "qwen3",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    write_weights(folder, seed)


def make_random_model(
    folder: Path,
    architecture: str,
    seed: int,
    *,
    tied: bool,
    vocab_size: int = 331,
    num_layers: int = 3,
    std: float = 0.2,
    **shape: Any,
) -> None:
    """Write a random model for tests: odd sizes, grouped heads, weights large enough to matter.

    `shape` holds Hugging Face keys that are to be otherwise.
    """
    usual = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 6 if architecture == "llama" else 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": tied,
    }
    write_config(folder, architecture, **usual | shape)
    write_weights(folder, seed, std)
