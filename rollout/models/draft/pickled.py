"""Draft folders whose weights torch has pickled, as EAGLE's own are: refused, with a way out.

A pickle may run code as it is read, so none is; and transformers, which converts models, knows no
drafts.
"""

from pathlib import Path

_CONVERT = """\
import torch
from safetensors.torch import save_file
tensors = {{}}
for path in {sources!r}:
    tensors |= torch.load(path, map_location="cpu", weights_only=True)
save_file({{name: x.contiguous().clone() for name, x in tensors.items()}}, {target!r})"""


def require_safetensors(folder: Path) -> None:
    """Raise FileNotFoundError for a folder that holds pickled weights alone; it says in Python how
    to make model.safetensors of them."""
    pickled = sorted(folder.glob("*.bin"))
    if not pickled or any(folder.glob("*.safetensors")):
        return
    weights = [str(file) for file in pickled if file.name.startswith("pytorch_model")]
    sources = weights or [str(pickled[0])]
    code = _CONVERT.format(sources=sources, target=str(folder / "model.safetensors"))
    names = ", ".join(file.name for file in pickled[:5])
    raise FileNotFoundError(
        f"draft folder {folder} holds {names}, which is not read, and no *.safetensors; once, in "
        f"Python:\n{code}"
    )
