"""The schedule that a configuration gives, step by step, against the one that a run has logged.

Taken from the log are samples' lengths, which prompts have equal rewards, and digests of weights;
everything else follows from the configuration: which prompts are begun and when, which weights draw
which tokens, how many stints or refills a step has, and which prompts it is trained on.
"""

from dataclasses import dataclass

from samebit.recipes.data.order import SampleIds
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.schedule import GroupDraw, ScheduleRow
from samebit.weight_sync.types import WeightVersion


class ScheduleError(ValueError):
    """A row of a schedule is another than the configuration gives; the message names it."""


@dataclass
class _Group:
    """The samples of one prompt, as far as the replay has come."""

    first_id: int
    lens: list[int]
    pending: set[int]


class ScheduleReplay:
    """Replays a run's schedule: call `check` with one row after another, from step 1 on."""

    def __init__(self, settings: RolloutSection, batch_size: int, num_waits: int = 0) -> None:
        """batch_size: samples of an optimizer step; num_waits: steps that the policy waits for its
        critic."""
        self._settings, self._batch_size, self._num_waits = settings, batch_size, num_waits
        self._ids = SampleIds()
        self._steps = self._updates = self._place = 0
        self._served: dict[int, WeightVersion] = {}
        """By the training step after which the engine got them."""
        self._left: list[_Group] = []

    def check(self, row: ScheduleRow) -> None:
        """Go on by one step. Raises ScheduleError, which names the first thing that differs."""
        settings, step = self._settings, self._steps + 1
        _require(step, "step", row.step, step)
        _require(step, "begin", row.begin, self._place)
        _require(step, "drawn_after", row.drawn_after, settings.drawn_after(step))
        self._check_version(row)
        rounds, trained = self._draw(row)
        _require(step, "rounds", row.rounds, rounds)
        few = len(trained) < settings.prompts_per_step and settings.too_few_groups == "error"
        if few or not trained:
            meaning = f"{len(trained)} prompts can be trained on: the run ends here with an error"
            raise ScheduleError(f"step {step}: {meaning}")
        _require(step, "trained", [*row.trained], trained)
        samples = len(trained) * settings.samples_per_prompt
        self._updates += -(-samples // self._batch_size) if step > self._num_waits else 0
        _require(step, "served", row.served is not None, settings.syncs_after(step))
        if row.served is not None:
            _require(step, "served's optimizer step", row.served.step, self._updates)
            self._served[step] = row.served
        self._steps, self._place = step, self._place + self._num_begun(rounds)

    def _num_begun(self, rounds: int) -> int:
        settings = self._settings
        if settings.partial_tokens is not None:
            return rounds * settings.prompts_per_step
        return settings.places_of(rounds - 1).stop

    def _check_version(self, row: ScheduleRow) -> None:
        """The first weights are whatever step 1 says that they are."""
        known = self._served.setdefault(row.drawn_after, row.version)
        first = WeightVersion(0, known.digest) if row.drawn_after == 0 else known
        _require(row.step, "version", row.version, first)

    def _new(self, step: int, places: range) -> list[_Group]:
        """The groups that a step, counted from 0, or a stint begins."""
        n = self._settings.samples_per_prompt
        ids = self._ids.of_step(step, len(places), n, first_prompt=places.start)
        return [_Group(group[0], [0] * n, {*range(n)}) for group in ids]

    def _begun(self, row: ScheduleRow, number: int) -> list[_Group]:
        """The groups that are begun in one of a step's rounds, counted from 0."""
        wanted = self._settings.prompts_per_step
        if self._settings.partial_tokens is None:
            return self._new(row.step - 1, self._settings.places_of(number))
        return self._new(row.begin // wanted + number, range(wanted))

    def _draw(self, row: ScheduleRow) -> tuple[int, list[int]]:
        """The rounds of a step and the prompts that it is trained on; what is left goes on."""
        settings, drawn = self._settings, {g.first_id: g for g in row.drawn}
        wanted, rounds, kept, groups = settings.prompts_per_step, 0, list[_Group](), self._left
        drawing = [g for g in groups if g.pending]
        starts = {g.first_id: [*g.lens] for g in drawing}
        while not rounds or (len(kept) < wanted and rounds < settings.most_rounds_per_step):
            begun = self._begun(row, rounds)
            groups, drawing, rounds = groups + begun, drawing + begun, rounds + 1
            for group in drawing:
                if group.pending:
                    self._grow(row.step, group, drawn.get(group.first_id))
            kept = [g for g in groups if not g.pending and g.first_id not in row.equal]
        _require(row.step, "drawn", [g.first_id for g in row.drawn], [g.first_id for g in drawing])
        for group in drawing:
            found, who = drawn[group.first_id], f"{group.first_id:#x}"
            begins = starts.get(group.first_id, [0] * len(group.lens))
            tokens = list(zip(begins, group.lens, strict=True))
            _require(row.step, f"tokens of {who}", [*found.tokens], tokens)
            _require(row.step, f"pending of {who}", [*found.pending], sorted(group.pending))
        scored = [g.first_id for g in groups if not g.pending and settings.dynamic_sampling]
        equal = [i for i in scored if i in row.equal]
        _require(row.step, "equal", [*row.equal], equal)
        trained = [g.first_id for g in kept[:wanted]]
        goes_on = settings.partial_tokens is not None
        self._left = [g for g in groups if goes_on and g.first_id not in {*trained, *equal}]
        return rounds, trained

    def _grow(self, step: int, group: _Group, found: GroupDraw | None) -> None:
        """Have unfinished samples draw further tokens in a round, as many as were found or may
        be."""
        settings, who = self._settings, f"{group.first_id:#x}"
        if found is None:
            raise ScheduleError(f"step {step}: nothing is drawn of {who}, which is not finished")
        _require(step, f"samples of {who}", len(found.tokens), len(group.lens))
        budget = settings.partial_tokens or settings.max_new_tokens
        for i in sorted(group.pending):
            start, end = group.lens[i], found.tokens[i][1]
            reach = min(start + budget, settings.max_new_tokens)
            is_finished = end <= reach and i not in found.pending
            if end <= start or (end < reach and not is_finished):
                raise ScheduleError(
                    f"step {step}: sample {i} of {who} has {end} tokens and is not finished; the "
                    f"configuration gives {reach}"
                )
            group.lens[i] = min(reach, end)
            if is_finished or reach == settings.max_new_tokens:
                group.pending.remove(i)


def _require(step: int, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ScheduleError(
            f"step {step}: {what} is {_shown(found)}; the configuration gives {_shown(expected)}"
        )


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
