"""EngineConfig: every setting of the engine, once. No torch here.

It is the section `engine` of a recipe, the argument of Engine, and what bench and placement use.
What depends on the machine (device, dtype, ranks) is no setting: see rollout/device.py.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from samebit.kernels.registry import ATTENTION_KINDS
from samebit.rollout.values import MAX_UINT64, bring_to_type, shown

WITH_DRAFT = ("eagle3", "peagle", "hybrid")
"""The proposers that guess by a draft model."""
SPECULATIVE = ("none", "suffix", *WITH_DRAFT)
MAX_DRAFT_TOKENS = 15
"""With the newest token as many rows as attention decodes at once."""
LOAD_FORMATS = ("safetensors", "dummy")  # of an engine that serves from its start
_BESIDES = ("device", "dtype", "ranks", "weights", "step")  # what else Engine takes by name


@dataclass(kw_only=True)  # not frozen: OmegaConf would refuse to change a frozen one's keys
class EngineConfig:
    """The engine's settings. None can change a token but seed, load format, attention and family.

    Example: EngineConfig(kv_cache_tokens=1 << 16, max_num_seqs=64)

    Raises ValueError, naming the key, for a value that cannot be used.
    """

    key: ClassVar[str] = "engine"
    """The section's name in a recipe's configuration."""

    page_size: int = 64
    """Tokens per KV page."""
    kv_cache_tokens: int | None = None
    """KV capacity in tokens; unset: what max_num_seqs samples can need, within 1 GiB on a CPU and
    kv_memory_fraction on a GPU."""
    kv_memory_fraction: float | None = None
    """Of a GPU's free memory, once the weights are in place, for keys and values; unset: 0.5, and
    0.85 in a recipe that releases it to train."""
    max_batch_tokens: int = 4096
    """Tokens computed in one step, over all samples."""
    max_num_seqs: int = 256
    """Samples running at a time."""
    prefill_chunk: int = 1024
    """Prompt tokens of one sample computed in one step."""
    prefix_cache: bool = True
    """Compute a prefix that prompts share once."""
    group_attention: bool = True
    """On a GPU, read what decoding samples share of their contexts once for all of them, in steps
    where that spares enough; the bits are the same."""
    cuda_graphs: bool | None = None
    """Decode by CUDA graphs; unset: on GPUs; tensor parallel ones need peer access."""
    overlap: bool | None = None
    """Plan and start a step while the one before still runs, or with speculation, while callers are
    told of it; unset: on a GPU."""
    speculative: str = "none"
    """What guesses tokens that the model verifies several at a time: none, suffix, eagle3, peagle,
    hybrid, or your own module:Class; the tokens are the same."""
    num_draft_tokens: int = 5
    """The most tokens of one sample guessed for one step."""
    adaptive_drafts: bool = True
    """Guess fewer, or none, while too few are right to pay for so many samples."""
    draft_model: str | None = None
    """Folder of the draft model, for eagle3, peagle, hybrid and classes that take one; in GRPO with
    draft.train=online it may be unset, for a new one."""
    draft_norm_output: str | None = None
    """Whose meaning norm_output has in a draft folder that leaves it open: sglang or specforge."""
    releasable: bool | None = None
    """Allocate weights, KV cache and graphs so that release_memory_occupation can give their memory
    back; unset: on a CPU, and on GPUs where a C compiler is found, once, for the allocator."""
    weights_backup: bool = False
    """Keep released weights in (pinned) host memory; else a full update follows their resume."""
    max_model_len: int | None = None
    """Longest context, prompt and completion; unset: the model's, in a recipe its longest sample.
    """
    attention: str = "canonical"
    """The attention kind, or your own module:Class; in a recipe it is numerics.attention."""
    model_family: str | None = None
    """module:Class, a model family of your own; in a recipe it is model_family."""
    load_format: str = "safetensors"
    """safetensors; dummy: random weights for a folder that holds only a config.json; none: nothing
    is loaded, and served after the first update."""
    seed: int = 0
    """Of the noise of requests that bring no seed; in a recipe it is the recipe's."""

    def __post_init__(self) -> None:
        bring_to_type(self, self.key)
        page, tokens, longest = self.page_size, self.kv_cache_tokens, self.max_model_len
        for name in ("page_size", "max_batch_tokens", "max_num_seqs", "prefill_chunk"):
            self._require(getattr(self, name) >= 1, name, "positive")
        self._require(longest is None or longest >= 1, "max_model_len", "positive, or unset")
        fits, meaning = tokens is None or tokens >= page, f"at least one page of {page}, or unset"
        self._require(fits, "kv_cache_tokens", meaning)
        fraction = self.kv_memory_fraction
        fits = fraction is None or 0 < fraction <= 1
        self._require(fits, "kv_memory_fraction", "above 0 and at most 1, or unset")
        fits = fraction is None or tokens is None
        self._require(fits, "kv_memory_fraction", f"unset with kv_cache_tokens={tokens}")
        kinds = tuple(ATTENTION_KINDS)
        meaning = f"one of {kinds} or your own module:Class"
        self._require(self.attention in kinds or ":" in str(self.attention), "attention", meaning)
        formats = (*LOAD_FORMATS, "none")
        self._require(self.load_format in formats, "load_format", f"one of {formats}")
        self._require_speculation()
        self._require(0 <= self.seed <= MAX_UINT64, "seed", "an unsigned 64-bit integer")

    def _require_speculation(self) -> None:
        kind = str(self.speculative)
        known = kind in SPECULATIVE or ":" in kind
        self._require(known, "speculative", f"one of {SPECULATIVE} or your own module:Class")
        number = self.num_draft_tokens
        meaning = f"in [1, {MAX_DRAFT_TOKENS}]"
        self._require(1 <= number <= MAX_DRAFT_TOKENS, "num_draft_tokens", meaning)
        for name in ("num_draft_tokens", "adaptive_drafts") if kind == "none" else ():
            default = getattr(type(self), name)
            fits = getattr(self, name) == default
            self._require(fits, name, f"{default}, its default, with speculative=none")
        folder, norm = self.draft_model, self.draft_norm_output
        fits = folder is None or kind in WITH_DRAFT or ":" in kind  # the class says so itself
        self._require(fits, "draft_model", f"unset with speculative={kind}")
        fits = norm is None or (folder is not None and norm in ("sglang", "specforge"))
        meaning = "sglang or specforge, or unset, as without draft_model"
        self._require(fits, "draft_norm_output", meaning)

    def _require(self, holds: bool, name: str, meaning: str) -> None:
        if not holds:
            value = shown(getattr(self, name))
            raise ValueError(f"{self.key}.{name} is {value}; it must be {meaning}")

    @classmethod
    def of(cls, config: Self | None, overrides: Mapping[str, Any]) -> Self:
        """A copy of `config`, or of the defaults, with `overrides` by name.

        Raises TypeError for a name that is no setting; it says the nearest one.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"Engine config is {shown(config)}; it must be an EngineConfig")
        known = [f.name for f in fields(cls)]
        for name in overrides:
            if name not in known:
                [nearest] = difflib.get_close_matches(name, [*known, *_BESIDES], n=1, cutoff=0)
                raise TypeError(f"Engine has no setting '{name}'; the nearest is '{nearest}'")
        return replace(config or cls(), **overrides)


def as_path(value: object, what: str) -> Path:
    """A path, given as text or Path; ValueError, which says `what`, for anything else."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f"{what} is {shown(value)}; it must be the path of a local model folder")
    return Path(value)
