"""ModelConfig: a model as a type, and the folder that it is read from.

A family is a subclass in a file of its own and a line of registry.py. What engine, trainer and
benchmarks have to know of a model they ask its configuration; nothing else knows what it is made
of.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from samebit.kernels.attention_kind import AttentionKind, Heads
from samebit.kernels.reduce import ALONE, RankGroup
from samebit.rollout.models.json_file import JsonFile
from samebit.rollout.models.stop_tokens import StopTokens, find_stop_tokens
from samebit.rollout.models.supported import require_supported
from samebit.weight_sync.mapping import WHOLE, ParamSpec, Shard


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family's config.json is known by, and may say."""

    architecture: str
    model_type: str
    eos_token_id: int | None = None
    """Where a folder says nothing; transformers' default."""
    explicit: Collection[str] = ()
    """Sizes that other families derive, and for which transformers takes a number of its own."""
    without_effect: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of this family's own that change the model, and the values under which they do not."""


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """What attention keeps of every token: a key and a value [Hkv, Dh] in every layer."""

    num_layers: int
    num_heads: int  # Hkv
    head_dim: int  # Dh

    def of_rank(self, tp_size: int) -> Self:
        """What each of tp_size ranks keeps, which share the heads."""
        return replace(self, num_heads=self.num_heads // tp_size)

    def cache_shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        """[P, page_size, Hkv, Dh] of the keys or values of one layer."""
        return (num_pages, page_size, self.num_heads, self.head_dim)

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * dtype.itemsize


class Product(NamedTuple):
    """A weight [n, k] that every token is multiplied by."""

    n: int
    k: int
    biased: bool = False
    """Whether a bias is added, for which the product stays in fp32."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """A model: the sizes that all have, and what a family answers about its own."""

    family: ClassVar[Family]

    architecture: str
    num_layers: int
    hidden_size: int  # D
    vocab_size: int  # V
    max_position: int
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    """What ends a completion: see models/stop_tokens.py."""

    @classmethod
    @abstractmethod
    def from_hf(cls, hf: Any, eos_token_ids: tuple[int, ...]) -> Self:
        """Read transformers' configuration, whose config.json has been found to be supported."""

    @abstractmethod
    def attention_heads(self, tp_size: int = 1) -> Heads:
        """What attention is made for: the heads that each of tp_size ranks has."""

    @property
    @abstractmethod
    def kv_layout(self) -> KVLayout:
        """What attention keeps of every token."""

    @property
    @abstractmethod
    def layer_products(self) -> Mapping[str, Product]:
        """The products of one layer by name, in the order in which they are taken."""

    @abstractmethod
    def attention_flops(self, length: int) -> int:
        """Operations of one sequence's causal attention, forward: two products over half of all
        pairs."""

    @abstractmethod
    def param_specs(self, shard: Shard = WHOLE) -> list[ParamSpec]:
        """Every parameter of one tensor parallel rank, in forward order.

        Raises ValueError for sizes that the ranks cannot share.
        """

    @abstractmethod
    def selfcheck(self, attention: AttentionKind, ranks: RankGroup = ALONE) -> None:
        """Prove the contract for the shapes of a rank's shard on attention's device; see
        kernels.selfcheck. Raises ValueError for a model that tp_invariant cannot cut up."""

    @abstractmethod
    def segment_shapes(self, device: torch.device) -> set[tuple[int, int]]:
        """(N, K) of the products that tp_invariant cuts row-parallel weights into.

        Raises ValueError for a width that cannot be cut.
        """

    @abstractmethod
    def make_decoder(
        self, params: Mapping[str, Tensor], num_positions: int, ranks: RankGroup = ALONE
    ) -> Any:
        """Build the engine's forward over a rank's parameters, for contexts of num_positions."""

    @property
    def num_matmul_weights(self) -> int:
        """Weights that multiply every token: all but norms, biases and the embedding's lookup."""
        layer = sum(product.n * product.k for product in self.layer_products.values())
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    def require_context(self, num_tokens: int, what: str) -> None:
        """ValueError, which says `what` has so many tokens, unless the model's context holds them.

        Example: require_context(768, "rollout.max_prompt_len + rollout.max_new_tokens")
        """
        if num_tokens > self.max_position:
            raise ValueError(
                f"{what} = {num_tokens} tokens; the model's context (max_position_embeddings of "
                f"its config.json) holds {self.max_position}"
            )


ADAPTER_FILE = "adapter_config.json"


GENERATES = "ForCausalLM"
RATES = ("ForSequenceClassification", "ForTokenClassification")
"""How transformers' names of architectures end whose output layer is the vocabulary's, or gives
labels: with one label it is a value head."""


def read_folder(
    path: Path, models: Collection[type[ModelConfig]], rates: bool = False
) -> tuple[ModelConfig, StopTokens]:
    """The model of a local Hugging Face folder, of one of these families, and what ends its texts.

    rates: its output layer has to be a value head, as that of a reward model or a critic.
    Raises FileNotFoundError for what is missing, ValueError that names file, key and value for what
    cannot be read or is not computed here.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"model folder {path} does not exist (nothing is fetched from a hub: give a local "
            "folder)"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"model folder {path} is a file; give the folder that holds it")
    if not (path / "config.json").exists():
        adapter = (path / ADAPTER_FILE).exists()
        hint = f": it is an adapter ({ADAPTER_FILE}), not a model" if adapter else ""
        raise FileNotFoundError(f"model folder {path} has no config.json{hint}")
    require_no_adapter(path)
    written = JsonFile.read(path / "config.json")
    model = _model(written, models, rates)
    family = model.family
    require_supported(written, family.explicit, family.without_effect)
    stop_tokens, filled = find_stop_tokens(written, family.eos_token_id), _filled(written)
    if rates and filled.num_labels != 1:
        raise ValueError(
            f"{written.path}: it has {filled.num_labels} labels (id2label, num_labels; 2 where "
            "neither says more); a value head has 1"
        )
    return model.from_hf(filled, stop_tokens.ids), stop_tokens


def require_no_adapter(folder: Path) -> None:
    """ValueError for a folder with an adapter, which transformers would add to the weights."""
    if (folder / ADAPTER_FILE).exists():
        raise ValueError(
            f"{folder / ADAPTER_FILE}: adapters are not supported; merge it into the weights "
            "(peft: merge_and_unload) or take the file away"
        )


def _model(
    written: JsonFile, models: Collection[type[ModelConfig]], rates: bool
) -> type[ModelConfig]:
    known = {
        model.family.architecture.replace(GENERATES, end): model
        for model in models
        for end in (RATES if rates else (GENERATES,))
    }
    names = written.values.get("architectures", [])
    texts = [n for n in names if isinstance(n, str)] if isinstance(names, list) else []
    found = [known[name] for name in texts if name in known]
    if not found:
        raise ValueError(
            f"{written.path}: architectures = {names}; it must be a list with one of the known: "
            f"{', '.join(sorted(known))}"
        )
    family = found[0].family
    right = f'"{family.model_type}", that of {family.architecture}'
    written.require("model_type", lambda x: x == family.model_type, right)
    return found[0]


def _filled(written: JsonFile) -> Any:
    """The transformers config object; its errors name the file."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(written.path.parent, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{written.path}: transformers does not take it: {reason}") from error
