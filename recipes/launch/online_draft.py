"""A draft that learns what its target says, while the target learns: GRPO's online draft.

On the steps whose turn it is, the trainer's forward shows the residual streams of each micro-batch,
under the weights that make them: no pass is added. Every process that shares the target's layers or
a sample's tokens is shown the same, whole, and trains the same draft to the same bits. Once the
policy has taken its steps the draft takes one, and its weights go to the engine behind the
target's. Source of the loss: Li et al. 2025, arXiv 2503.01840.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from samebit.recipes.config import GrpoRun
from samebit.recipes.launch.draft import (
    make_trainer_of,
    new_draft,
    require_dense,
    require_positions,
)
from samebit.rollout.draft_side import DraftSide, DraftSides
from samebit.rollout.engine import Engine
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import DenseModel
from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.runtime.draft_folder import DIALECTS, DraftFolder, write_draft
from samebit.rollout.speculative.making import open_speculation
from samebit.trainer.checkpoint import Checkpoint
from samebit.trainer.draft.batch import DraftBatch
from samebit.trainer.megatron.outer_params import OuterParams
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first, together
from samebit.trainer.types import MicroBatch, NonFiniteError
from samebit.weight_sync.transports.base import WeightSync
from samebit.weight_sync.transports.copy import CopyTransport
from samebit.weight_sync.transports.with_draft import WithDraft

logger = logging.getLogger(__name__)


def checked_online_draft(
    run: GrpoRun, model: ModelConfig
) -> tuple[DraftFolder | None, DraftConfig]:
    """The folder that the draft starts from, if there is one, and the draft's configuration.

    A new one can say all of the target's tokens. Raises ValueError or OSError for a draft of
    another target, or one that does not reach over the longest sample.
    """
    model = require_dense(model)
    if run.engine.draft_model is None:
        folder, config = None, new_draft(model, model.vocab_size, run.draft.layers)
    else:
        folder = open_speculation(run.engine, model)
        assert folder is not None
        config = folder.config
    require_positions(config, run.rollout.longest)
    run.ttt.require_enough(config.is_block)
    DIALECTS[_dialect(folder)].write(config, "float32")
    return folder, config


def _dialect(folder: DraftFolder | None) -> str:
    """What the run writes its draft as."""
    return "sglang" if folder is None else folder.dialect


class OnlineDraftError(RuntimeError):
    """The first process could not write the draft; the message is its own."""


class OnlineDraft:
    """Trains a draft beside its target: what the trainer's `observer` is on the draft's steps."""

    def __init__(
        self,
        run: GrpoRun,
        checked: tuple[DraftFolder | None, DraftConfig],
        policy: MegatronTrainer,
    ) -> None:
        """checked: as checked_online_draft gives it; policy: whose output layer a new draft's
        begins with. All processes make one alike."""
        folder, config = checked
        model, every = policy.model, run.draft.every
        assert isinstance(model, DenseModel)
        self._outer = OuterParams(policy)
        whole = DraftVocabulary.whole(model.vocab_size)
        self.trainer = make_trainer_of(
            *(
                model,
                self._outer.params,
                folder,
                config,
                whole if folder is None else folder.vocabulary,
            ),
            optimizer=run.draft.optimizer,
            num_steps=run.num_draft_updates,
            ttt=run.ttt,
            seed=run.seed,
            ranks=policy.data_ranks,
            target_ranks=policy.ranks,
        )
        self.streams = tuple(sorted({*config.captured_layers, model.num_layers}))
        self.folder = run.run_dir / "draft"
        self._every, self._policy, self._dialect = every, policy, _dialect(folder)
        self._is_due = False

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Within the block the policy takes the optimizer steps of training step `step`, from 1 on;
        where the draft's turn has come it is shown what they compute."""
        self._is_due = step % self._every == 0
        if self._is_due:
            self.trainer.begin_step()
            self._policy.observer = self
        try:
            yield
        finally:
            self._policy.observer = None

    def observe(self, batch: MicroBatch, streams: Mapping[int, Tensor]) -> None:
        """See StreamObserver."""
        self._outer.refresh()
        self.trainer.take(DraftBatch(batch=batch, streams=streams))

    def end_step(self) -> dict[str, float]:
        """Take the optimizer step, if it is due; returns its metrics.

        None is taken where no row counts (what the target says is not in the draft vocabulary), and
        where loss or gradient is not finite: a draft can change no token, so the run goes on.
        """
        if not self._is_due:
            return {}
        try:
            stats = self.trainer.end_step()
        except NonFiniteError as error:  # on all ranks: they sum loss and gradient
            if is_first():
                logger.warning("draft: an optimizer step is left out: %s", error)
            return {"draft/skipped_steps": 1}
        if stats is None:
            return {"draft/num_rows": 0}
        figures = {
            "skipped_steps": 0,
            "num_rows": stats.num_rows,
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
        }
        return {f"draft/{name}": value for name, value in (figures | stats.metrics).items()}

    def write(self) -> None:
        """Write run_dir/draft as it is now: the engine starts from it, and it is what is left.

        All processes call it, and the first one writes. Raises OSError, others OnlineDraftError,
        or a CrashError: see `together`.
        """
        parts = self.trainer.config, self.trainer.vocabulary, self.trainer.params
        with together(OnlineDraftError):
            if is_first():
                write_draft(self.folder, *parts, self._dialect)

    def state_dict(self) -> dict[str, Any]:
        """What the first process adds to its checkpoint: the draft is the same on all."""
        return {"draft": self.trainer.state_dict()} if is_first() else {}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of any layout; CheckpointError for a damaged one."""
        self.trainer.load_state_dict(next(checkpoint.load_all())["draft"])

    def beside(
        self,
        run: GrpoRun,
        target: WeightSync,
        engine: Engine | RemoteEngine | EnginePool | None,
        kind: type[WeightSync],
        settings: Mapping[str, Any],
    ) -> WeightSync:
        """The target's way to the engine, with the draft's beside it.

        In this process a draft is copied; to another it goes as the target does, by `kind`. An
        engine apart is the first process's to call: the others give None.
        """
        source: Any = self.trainer  # no stage of a pipeline, of which alone more is asked
        side: Any = engine
        if engine is not None:
            side = DraftSides(engine) if isinstance(engine, EnginePool) else DraftSide(engine)
        if isinstance(engine, Engine):
            kind, settings = CopyTransport, {}
        folder = run.run_dir / "draft_sync"
        return WithDraft(target, kind.between(source, side, folder, **settings), source)
