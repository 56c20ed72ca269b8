"""What a property is measured on: a model, fixed prompts and ids, and the baseline they gave."""

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samebit.rollout.client import EngineClient
from samebit.rollout.engine import Engine
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.types import Completion, SamplingParams

# Around every tile (16, 64) and page boundary.
PROMPT_LENS = (1, 2, 15, 16, 17, 31, 33, 48, 63, 64, 65, 80, 127, 128, 129, 191, 193)
# On a GPU also around the KV splits.
GPU_PROMPT_LENS = (*PROMPT_LENS, 511, 513, 1023, 1024, 1025, 2047, 2049)
NUM_NEW_TOKENS = 48
NUM_SAMPLES = 3
KV_TOKENS = 1 << 15
_LIMITS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_p": 0.9, "temperature": 1.3},
    {"min_p": 0.05},
    {"temperature": 0.0},
)


@dataclass
class Result:
    """How often a property held. Without a mismatch it is proven only if tokens were compared."""

    name: str
    cases: int = 0
    tokens: int = 0
    """Comparisons: a token that is found in several cases counts in each."""
    mismatches: int = 0
    notes: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    """Why cases could not be tried here: they prove nothing, and are no mismatches."""
    drawn: int = 0
    """Tokens drawn to compare with, besides the baseline's."""
    outcomes_digest: str = ""
    """Of every value found, in order and to the bit: equal in two runs that found the same."""

    @property
    def was_tried(self) -> bool:
        """Whether anything was compared that says something about the property."""
        return self.tokens > 0

    def compare(
        self, found: Sequence[Completion], truth: Sequence[Completion], case: str, untried: str = ""
    ) -> None:
        """Count a case: every position whose token or log-prob differs.

        untried: why it says nothing about the property; then only mismatches count.
        """
        self.cases += 1
        assert len(found) == len(truth), case
        tokens = self.tokens
        for a, b in zip(found, truth, strict=True):
            self.compare_values(
                list(zip(a.token_ids, a.logprobs, strict=True)),
                list(zip(b.token_ids, b.logprobs, strict=True)),
                case,
            )
        if untried:
            self.tokens = tokens
            self.untried += [untried] if untried not in self.untried else []

    def compare_values(self, found: Sequence[Any], truth: Sequence[Any], case: str) -> None:
        """Count positions whose bits differ; a missing position is a mismatch."""
        exact = exact_bytes(found)
        self.outcomes_digest = chained_digest(self.outcomes_digest, case, exact)
        length = max(len(found), len(truth))
        unequal = length - min(len(found), len(truth))
        if exact != exact_bytes(truth):
            pairs = zip(found, truth, strict=False)
            unequal += sum(exact_bytes([a]) != exact_bytes([b]) for a, b in pairs)
        self.tokens += length
        self.mismatches += unequal
        if unequal and len(self.notes) < 5:
            self.notes.append(f"{case}: {unequal} of {length}")


def chained_digest(before: str, name: str, content: bytes) -> str:
    """SHA-256 of all that `before` stands for and of `content` under `name`."""
    header = f"{before} {name} {len(content)}:".encode()
    return hashlib.sha256(header + content).hexdigest()


def exact_bytes(values: Sequence[Any]) -> bytes:
    """Numbers, or tuples of them, as doubles: exact for fp32 and for token ids."""
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return struct.pack(f"<{len(flat)}d", *flat)


@dataclass
class Subject:
    """One model under test. `baseline[p][s]` is sample s of prompt p from a plain engine."""

    model_path: Path
    device: torch.device
    prompts: list[list[int]]
    params: list[SamplingParams]
    sample_ids: list[list[int]]
    engine: Engine
    baseline: list[list[Completion]]
    load_format: str = "safetensors"
    num_new_tokens: int = NUM_NEW_TOKENS
    """The most tokens that a sample has; fewer in a short context."""

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        return self.engine.model_config

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return max(map(len, self.prompts)) + self.num_new_tokens

    @property
    def is_short(self) -> bool:
        """Whether contexts have less than two of the usual small pages."""
        return self.longest < 32

    @property
    def num_drawn(self) -> int:
        """Tokens of the baseline, each of which is compared again and again."""
        return sum(len(completion.token_ids) for completion in flat(self.baseline))

    def make_engine(self, **settings: Any) -> Engine:
        """A fresh engine on the same model."""
        same = {"load_format": self.load_format, "attention": self.engine.config.attention}
        settings = {"kv_cache_tokens": KV_TOKENS, **same, **settings}
        return Engine(self.model_path, device=self.device, seed=11, **settings)

    def generate(
        self, engine: EngineClient, order: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Completions of the prompts named by `order` (default: all), each by its own ids."""
        order = range(len(self.prompts)) if order is None else order
        return engine.generate(
            [self.prompts[i] for i in order],
            [self.params[i] for i in order],
            [self.sample_ids[i] for i in order],
        )

    def run(self, order: Sequence[int] | None = None, **settings: Any) -> list[Completion]:
        """Completions of the prompts by an engine of their own, which is gone afterwards."""
        return flat(self.generate(self.make_engine(**settings), order))

    def truth(self, order: Sequence[int] | None = None) -> list[Completion]:
        """The baseline's completions in that order, flat."""
        order = range(len(self.prompts)) if order is None else order
        return [completion for i in order for completion in self.baseline[i]]


def flat(groups: Sequence[Sequence[Completion]]) -> list[Completion]:
    """All completions, in order."""
    return [completion for group in groups for completion in group]


def make_subject(
    model_path: Path,
    device: torch.device,
    load_format: str = "safetensors",
    attention: str = "canonical",
    num_new_tokens: int = NUM_NEW_TOKENS,
) -> Subject:
    """Fixed prompts of every boundary length, and what a plain engine makes of them.

    num_new_tokens: the most that a sample has, at least 1; half a shorter context at most.
    """
    config = load_model_config(model_path)
    rng = random.Random(5)
    if config.max_position < 2:
        raise ValueError(
            f"{model_path}: a context of {config.max_position} tokens is too short to verify; it "
            "must hold a token of a prompt and one that is drawn"
        )
    num_new = min(num_new_tokens, config.max_position // 2)
    lens: tuple[int, ...] = GPU_PROMPT_LENS if device.type == "cuda" else PROMPT_LENS
    lens = tuple(n for n in lens if n + num_new <= config.max_position)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in lens]
    params = [
        SamplingParams(
            n=NUM_SAMPLES,
            max_new_tokens=num_new,
            ignore_eos=i % 4 != 3,
            **_LIMITS[i % len(_LIMITS)],
        )
        for i in range(len(prompts))
    ]
    ids = [[1000 * i + s for s in range(NUM_SAMPLES)] for i in range(len(prompts))]
    engine = Engine(
        model_path,
        device=device,
        seed=11,
        kv_cache_tokens=KV_TOKENS,
        load_format=load_format,
        attention=attention,
    )
    subject = Subject(model_path, device, prompts, params, ids, engine, [], load_format, num_new)
    subject.baseline = subject.generate(engine)
    return subject
