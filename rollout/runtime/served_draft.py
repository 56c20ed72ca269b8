"""The draft model that an engine guesses by: its weights, and how they change.

It is a model of its own, with a version and a digest of its own: no update of the target touches
it, and none of it touches the target. A draft can change no token. So where an update of it has
broken off nothing is refused: the engine draws the same tokens, and guesses none by the draft until
a full update of it commits.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samebit.kernels.memory import Arena
from samebit.kernels.reduce import RankGroup
from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.runtime.draft_folder import DraftFolder, open_draft
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.weight_control import ServedModel, StepGate, versioned
from samebit.rollout.runtime.weights import open_safetensors
from samebit.weight_sync.mapping import Read
from samebit.weight_sync.session import SessionState, UpdateSession
from samebit.weight_sync.transports.file import read_version
from samebit.weight_sync.types import WeightVersion

_SAID_ONLY = ("max_position", "token_ids", "verifier", "speculative_tokens")  # computed by none


def load_draft(
    folder: DraftFolder, dtype: torch.dtype, arena: Arena, ranks: RankGroup
) -> UpdateSession:
    """The draft's parameters in the arena, filled from its folder, under the folder's version.

    Every tensor parallel rank has it whole. Raises WeightLoadError for a draft with NaN or Inf.
    """
    specs = folder.config.param_specs(replica=ranks.rank > 0)
    params = arena.allocate("draft", {spec.name: (spec.shape, dtype) for spec in specs})
    folder.fill(params)
    session = UpdateSession(specs, params, WeightVersion(0, ""), ranks.group, tag="draft")
    return versioned(session, read_version(folder.path))


class ServedDraft(ServedModel):
    """An engine's draft: what it is, and its weights; proposers read both.

    It forgets cached prefixes as it changes: keys and values of two models lie in one page, and
    those of the draft before would spoil the guesses behind every hit, the longer it is shared.
    """

    def __init__(
        self,
        folder: DraftFolder,
        session: UpdateSession,
        arena: Arena,
        gate: StepGate,
        prefixes: PrefixCache | None,
    ) -> None:
        super().__init__(session, arena, gate)
        self._prefixes = prefixes
        self.config: DraftConfig = folder.config
        self.vocabulary: DraftVocabulary = folder.vocabulary
        self._norm_output = folder.norm_output

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters, by the names of config.param_specs; rewritten in place."""
        return self.session.params

    @property
    def is_whole(self) -> bool:
        """Whether the weights are one whole version: else there is nothing to guess by."""
        return self.session.state is SessionState.READY

    def flush_cache(self) -> None:
        """Drop all cached prefixes; the target computes them anew, and the draft with it. Samples
        that an update finds paused keep their keys."""
        if self._prefixes is not None:
            self._prefixes.reset(self._prefixes.version)

    def _open(self, folder: Path) -> Read:
        """Weights alone are read by the names of the sglang dialect; what is a draft's folder must
        be that of this very draft."""
        if not (folder / "config.json").exists():
            return open_safetensors(folder, self.session.specs)
        found = open_draft(folder, norm_output=self._norm_output)
        theirs, own = _computed(found.config), _computed(self.config)
        for name, value in own.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{folder}/config.json is of another draft: {name} is {theirs[name]}, that of "
                    f"the engine's draft {value}"
                )
        if not torch.equal(found.vocabulary.token_ids, self.vocabulary.token_ids):
            raise ValueError(
                f"{folder} holds another draft's vocabulary: as many tokens as the engine's, and "
                "others"
            )
        return found.read


def _computed(config: DraftConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in _SAID_ONLY}
