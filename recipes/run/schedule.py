"""The schedule of a run as it was: schedule.jsonl, one row a training step.

A row says what was drawn for the step by which weights, token by token, and what of it is trained
on. It is a function of configuration, step and samples' lengths, so that `samebit replay` can tell
what it has to be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

from samebit.rollout.types import Completion
from samebit.weight_sync.types import WeightVersion


@dataclass(frozen=True)
class GroupDraw:
    """Says what a step has drawn of one prompt's samples."""

    first_id: int
    """Of the first sample; the others' follow it."""
    tokens: tuple[tuple[int, int], ...]
    """Of each sample the tokens [start, end) that were drawn, counted behind the prompt."""
    pending: tuple[int, ...] = ()
    """Which samples are unfinished then, by their numbers in the group."""

    @classmethod
    def of_whole(cls, completions: Sequence[Completion]) -> Self:
        """Return that of samples that were drawn in one go."""
        tokens = tuple((0, len(c.token_ids)) for c in completions)
        return cls(completions[0].sample_id, tokens)

    @property
    def num_tokens(self) -> int:
        """So many tokens were drawn."""
        return sum(end - start for start, end in self.tokens)


@dataclass(frozen=True)
class ScheduleRow:
    """Says what a training step has drawn, and when it is trained on: in this step."""

    step: int
    begin: int
    """The first place of the training order that it has begun."""
    drawn_after: int
    """The training step whose weights have drawn, 0: the first weights."""
    version: WeightVersion
    """Of those weights."""
    rounds: int
    """It has drawn so many times: once and refills, or stints."""
    drawn: tuple[GroupDraw, ...]
    equal: tuple[int, ...]
    """Prompts whose rewards are all equal, by the ids of their first samples, where dynamic
    sampling drops them."""
    trained: tuple[int, ...]
    """Prompts that are trained on, in this order, by the same ids."""
    served: WeightVersion | None
    """What the engine has got after the step to draw by; None if that is as it was."""

    def to_plain(self) -> dict[str, Any]:
        """Return the row as schedule.jsonl has it."""
        served = None if self.served is None else [self.served.step, self.served.digest]
        return {
            "step": self.step,
            "begin": self.begin,
            "drawn_after": self.drawn_after,
            "version": [self.version.step, self.version.digest],
            "rounds": self.rounds,
            "drawn": [
                {"id": g.first_id, "tokens": [[*t] for t in g.tokens], "pending": [*g.pending]}
                for g in self.drawn
            ],
            "equal": [*self.equal],
            "trained": [*self.trained],
            "served": served,
        }

    @classmethod
    def of_plain(cls, row: Mapping[str, Any]) -> Self:
        """Return what `to_plain` was called of. Raises ValueError for anything else."""
        try:
            served = row["served"]
            found = cls(
                step=row["step"],
                begin=row["begin"],
                drawn_after=row["drawn_after"],
                version=WeightVersion(*row["version"]),
                rounds=row["rounds"],
                drawn=tuple(
                    GroupDraw(
                        g["id"],
                        tuple((start, end) for start, end in g["tokens"]),
                        tuple(g["pending"]),
                    )
                    for g in row["drawn"]
                ),
                equal=tuple(row["equal"]),
                trained=tuple(row["trained"]),
                served=None if served is None else WeightVersion(*served),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no row of a schedule ({type(error).__name__}: {error})") from error
        found._require_kinds()
        if found.to_plain() != row:
            raise ValueError("no row of a schedule: it has other keys")
        return found

    def _require_kinds(self) -> None:
        """Raise ValueError unless numbers are whole and digests are texts."""
        versions = [v for v in (self.version, self.served) if v is not None]
        numbers = [self.step, self.begin, self.drawn_after, self.rounds, *self.equal, *self.trained]
        numbers += [v.step for v in versions]
        for g in self.drawn:
            numbers += [g.first_id, *g.pending, *chain.from_iterable(g.tokens)]
        wrong: list[Any] = [x for x in numbers if type(x) is not int or x < 0]
        wrong += [v.digest for v in versions if type(v.digest) is not str]
        if wrong:
            raise ValueError(f"no row of a schedule: {wrong[0]!r} is of another kind")
