"""What a run makes of its steps: rows of metrics, checkpoints after them, and a bar to look at."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tqdm import tqdm

from samebit.recipes.run.metrics import MetricsLogger
from samebit.recipes.run.secrets import to_dict
from samebit.recipes.run.session import RunSession, has_schedule
from samebit.recipes.run.signals import Stopped
from samebit.trainer.checkpoint import latest_checkpoint


@dataclass
class Progress:
    """How far a run has come. A recipe adds what its summary needs; all of it is small, and stands
    in the manifest of every checkpoint."""

    step: int = 0


class Stateful(Protocol):
    """What a checkpoint holds the state of: a trainer, or a recipe with more than one."""

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run goes on from; `params` are its model's."""


@dataclass
class Recorder:
    """Keeps what becomes of each step. Only the first process has a logger and shows a bar."""

    session: RunSession
    progress: Progress
    trained: Stateful
    _logger: MetricsLogger | None
    _bar: tqdm

    def is_due(self, every: int) -> bool:
        """Whether the present step is the last one or a multiple of `every`."""
        step = self.progress.step
        return step == self.session.run.trainer.num_steps or step % every == 0

    def show(self, text: str) -> None:
        """Write something beside the bar."""
        self._bar.set_postfix_str(text)

    def log(self, metrics: dict[str, Any]) -> None:
        """Write the row of the present step."""
        if self._logger is not None:
            self._logger.log(self.progress.step, metrics)

    def log_samples(self, kind: str, rows: list[dict[str, Any]]) -> None:
        """Write samples of the present step; see MetricsLogger."""
        if self._logger is not None:
            self._logger.log_samples(self.progress.step, kind, rows)

    def end_step(
        self, metrics: dict[str, Any], shown: str, schedule: dict[str, Any] | None = None
    ) -> None:
        """Write the step's row, and that of the schedule if there is one, begin a checkpoint where
        one is due, and move the bar on."""
        self.log(metrics)
        if self._logger is not None and schedule is not None:
            self._logger.log_schedule(schedule)
        if self.session.run.trainer.checkpoint_due(self.progress.step):
            self.save()
        self.show(shown)
        self._bar.update()

    def save(self) -> None:
        """Begin a checkpoint of the present step, which must not outlive its rows."""
        if self._logger is not None:
            self._logger.sync()
        state, progress = self.trained.state_dict(), asdict(self.progress)
        self.session.save(self.progress.step, state, progress)


@contextmanager
def recording(session: RunSession, progress: Progress, trained: Stateful) -> Iterator[Recorder]:
    """Within the block a run goes on from `progress`; at its end all checkpoints are whole.

    If the run is stopped, the last whole step is saved, unless it is, and the error says so.
    """
    with _logger(session, progress) as logger, _bar(session, progress) as bar:
        recorder = Recorder(session, progress, trained, logger, bar)
        try:
            session.started()
            yield recorder
            session.writer.finish()
        except Stopped as stopped:
            session.writer.finish()
            newest = latest_checkpoint(session.checkpoints)
            if progress.step > 0 and (newest is None or newest.step < progress.step):
                recorder.save()
                session.writer.finish()
            where = f"saved in {session.checkpoints}" if progress.step > 0 else "nothing to save"
            raise Stopped(
                f"{stopped}: stopped after step {progress.step}, {where}; resume=true goes on"
            ) from None
        except BaseException:
            session.writer.close()
            raise


def _logger(
    session: RunSession, progress: Progress
) -> AbstractContextManager[MetricsLogger | None]:
    if not session.is_first:
        return nullcontext()
    run, resume_step = session.run, progress.step if session.resumed is not None else None
    settings = run.logger, run.run_name, to_dict(run)
    return MetricsLogger(session.run_dir, *settings, resume_step, has_schedule(run))


def _bar(session: RunSession, progress: Progress) -> tqdm:
    return tqdm(
        total=session.run.trainer.num_steps,
        initial=progress.step,
        desc=session.run.run_name,
        unit="step",
        disable=not session.is_first,
    )
