"""DraftControl: an engine's draft, beside a prefix cache whose pages hold keys of it."""

from samebit.kernels.memory import Arena
from samebit.rollout.runtime.draft_folder import DraftFolder
from samebit.rollout.runtime.prefix_cache import PrefixCache
from samebit.rollout.runtime.served_draft import ServedDraft
from samebit.rollout.runtime.weight_control import StepGate
from samebit.weight_sync.session import UpdateSession


class DraftControl(ServedDraft):
    """Forgets cached prefixes as the draft changes: keys and values of two models lie in one page,
    and those of the draft before would spoil the guesses behind every hit, the longer it is shared.
    """

    def __init__(
        self,
        folder: DraftFolder,
        session: UpdateSession,
        arena: Arena,
        gate: StepGate,
        prefixes: PrefixCache | None,
    ) -> None:
        super().__init__(folder, session, arena, gate)
        self._prefixes = prefixes

    def flush_cache(self) -> None:
        """Drop all cached prefixes; the target computes them anew, and the draft with it. Samples
        that an update finds paused keep their keys."""
        if self._prefixes is not None:
            self._prefixes.reset(self._prefixes.version)
