"""What an engine's settings say about speculation, made: its draft folder, its proposer."""

from pathlib import Path

from samebit.rollout.config import EngineConfig
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.runtime.draft_folder import DraftFolder, open_draft
from samebit.rollout.speculative.proposer import ProposerParts
from samebit.rollout.speculative.registry import proposer
from samebit.rollout.speculative.speculation import Speculation


def open_speculation(config: EngineConfig, target: ModelConfig) -> DraftFolder | None:
    """The draft model of an engine, if it has one; its weights are not read yet.

    Raises ValueError for a proposer that cannot be imported, and for a draft that is missing, of
    another kind than eagle3 or peagle say, or of another target, besides what open_draft raises.
    """
    kind = config.speculative
    takes_draft = kind != "none" and proposer(kind).takes_draft
    if config.draft_model is not None and not takes_draft:
        raise ValueError(
            f"engine.draft_model is {config.draft_model!r}; it must be unset with "
            f"speculative={kind}, whose class does not say takes_draft"
        )
    if takes_draft and not config.draft_model:
        raise ValueError(
            f"engine.draft_model is {config.draft_model!r}; it must be the path of a draft model's "
            f"folder with speculative={kind}"
        )
    if config.draft_model is None:
        return None
    path = Path(config.draft_model)
    folder = open_draft(path, target.num_layers, config.draft_norm_output)
    draft = folder.config
    if draft.is_block != {"eagle3": False, "peagle": True}.get(kind, draft.is_block):
        what, other = ("a block", "peagle") if draft.is_block else ("no block", "eagle3")
        raise ValueError(
            f"engine.draft_model is {str(path)!r}, {what} draft; engine.speculative must be {other}"
            " or hybrid"
        )
    sizes = {
        "hidden_size": (draft.target_hidden_size, target.hidden_size),
        "vocab_size": (draft.vocab_size, target.vocab_size),
    }
    for name, (found, wanted) in sizes.items():
        if found != wanted:
            raise ValueError(
                f"engine.draft_model is {str(path)!r}, a draft for a target with {name} {found}; "
                f"this engine's model has {wanted}"
            )
    return folder


def make_speculation(config: EngineConfig, parts: ProposerParts) -> Speculation | None:
    """What guesses for an engine; None if nothing does."""
    if config.speculative == "none":
        return None
    speculation = Speculation(proposer(config.speculative)(parts), config.adaptive_drafts)
    if speculation.proposer.streams:
        parts.runner.observer = speculation.proposer
    return speculation
