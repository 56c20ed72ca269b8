"""The promise while tokens are guessed: well, badly, and by a draft model that is damaged."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from samebit.recipes.verification.subject import Result, Subject, flat
from samebit.rollout.engine import Engine
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import DenseModel
from samebit.rollout.models.draft.config import DraftConfig, Verifier
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.runtime.draft_folder import write_draft
from samebit.rollout.runtime.weights import load_dummy
from samebit.rollout.speculative.eagle3 import Eagle3
from samebit.rollout.speculative.proposer import Context, Proposal, Proposer, ProposerParts
from samebit.rollout.types import Completion

_WRONG_EVERY = 4


class Recalled(Proposer):
    """Guesses what a sample drew without speculation, every fourth token wrongly."""

    def __init__(self, parts: ProposerParts, completions: Sequence[Completion]) -> None:
        super().__init__(parts)
        self._drawn = {c.sample_id: c.token_ids for c in completions}

    def propose(self, contexts: Sequence[Context]) -> list[Proposal]:
        return [self._proposal(context) for context in contexts]

    def _proposal(self, context: Context) -> Proposal:
        sample, vocab_size = context.sample, self.parts.vocab_size
        start = len(context.token_ids) - sample.prompt_len
        following = self._drawn[sample.sample_id][start : start + context.room]
        return Proposal(
            [
                (token + ((start + i + sample.sample_id) % _WRONG_EVERY == 0)) % vocab_size
                for i, token in enumerate(following)
            ]
        )


def speculation(subject: Subject) -> Result:
    """Every way to guess, and guesses that are mostly right, few and many at a time."""
    result = Result("speculation")
    small = {"prefill_chunk": 17, "max_num_seqs": 7}
    _try(result, subject, "suffix", {"speculative": "suffix", **small})
    for length, adaptive in ((1, False), (5, False), (15, False), (5, True)):
        settings = {"speculative": "suffix", "num_draft_tokens": length, "page_size": 16}
        settings |= {"adaptive_drafts": True, "max_num_seqs": 3} if adaptive else {}
        case = f"mostly right, {length} at a time, adaptive {adaptive}"
        _try(result, subject, case, settings, lambda e: recall(e, subject.truth()))
    if not isinstance(subject.config, DenseModel):
        result.untried.append("drafts: there is none for a model of this kind")
        return result
    with tempfile.TemporaryDirectory(prefix="samebit_verify_") as folder:
        draft = {"draft_model": str(Path(folder) / "draft")}
        write_random_draft(Path(folder) / "draft", subject.config)
        for value in (None, float("nan"), 3e38):
            case, settings = f"eagle3, weights {value}", {"speculative": "eagle3", **draft}
            _try(result, subject, case, settings, partial(_damage, value=value))
        _try(result, subject, "hybrid", {"speculative": "hybrid", **draft, **small})
        block = str(Path(folder) / "block")
        write_random_draft(Path(block), subject.config, mask_token_id=0)
        for kind in ("peagle", "hybrid"):
            _try(
                result,
                subject,
                f"{kind}, a block draft",
                {"speculative": kind, "draft_model": block},
            )
    return result


def write_random_draft(folder: Path, target: ModelConfig, **options: Any) -> None:
    """A draft of half the target's vocabulary, which knows nothing; `options` are DraftConfig's."""
    assert isinstance(target, DenseModel)
    dialect = "speculators" if "mask_token_id" in options else "sglang"
    options = {"verifier": Verifier("target", (target.architecture,)), **options}
    last, size = target.num_layers, max(1, target.vocab_size // 2)
    layers = tuple(sorted({1, (last + 1) // 2, last}))
    config = DraftConfig.of_target(target, size, captured_layers=layers, **options)
    specs = config.param_specs()
    params = {spec.name: torch.empty(spec.shape) for spec in specs}
    load_dummy(specs, params, seed=0)
    vocabulary = DraftVocabulary(torch.arange(size), target.vocab_size)
    write_draft(folder, config, vocabulary, params, dialect)


def _try(
    result: Result,
    subject: Subject,
    case: str,
    settings: dict[str, Any],
    prepare: Callable[[Engine], None] = lambda engine: None,
) -> None:
    engine = subject.make_engine(**{"adaptive_drafts": False, **settings})
    prepare(engine)
    found, lengths = flat(subject.generate(engine)), engine.accept_lengths
    guessed = lengths is not None and lengths.verifications
    result.compare(found, subject.truth(), case, "" if guessed else f"{case}: no guess was made")


def recall(engine: Engine, completions: Sequence[Completion]) -> None:
    """Have an engine that speculates guess these, by the samples' ids."""
    assert engine.speculation is not None
    engine.speculation.proposer = Recalled(engine.speculation.proposer.parts, completions)


def _damage(engine: Engine, value: float | None) -> None:
    """What no folder may hold, unless None."""
    assert engine.speculation is not None
    assert isinstance(proposer := engine.speculation.proposer, Eagle3)
    assert (draft := proposer.parts.draft) is not None
    for param in draft.params.values():
        if value is not None:
            param.fill_(value)
