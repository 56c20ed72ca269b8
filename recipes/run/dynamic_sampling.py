"""What a training step draws, and which of it is trained on.

Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): prompts whose samples all
have the same reward teach nothing, so more are drawn until there are enough of the others. Which
are kept is a function of seed, data and rewards alone: a refill draws the next prompts of the
training order; the first ones with a spread are kept, in that order; what the last refill has drawn
beyond them is dropped, and the next step begins behind it. Rewards are the reward function's,
before any length penalty or KL.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from samebit.recipes.data.conversation import num_drawn
from samebit.recipes.data.rewards import Poll
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.sampling import Rollout, RolloutSource
from samebit.recipes.run.schedule import GroupDraw, ScheduleRow
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion
from samebit.trainer.types import Sample
from samebit.weight_sync.types import WeightVersion


class TooFewGroupsError(RuntimeError):
    """After the last refill a step has too few prompts whose samples' rewards differ."""


@dataclass(frozen=True)
class StepRollout:
    """Holds all that a step has drawn, scored, in the training order."""

    drawn: Rollout
    kept: Sequence[int]
    """Places in `drawn` of the groups that are trained on, ascending."""
    refills: int = 0
    guesses: AcceptLengths | None = None
    """What the engine's guesses came to, if it speculates."""

    @property
    def rounds(self) -> int:
        """The step has drawn so many times."""
        return self.refills + 1

    @property
    def draws(self) -> Sequence[GroupDraw]:
        """The step has drawn these samples, whole, in the training order."""
        return [GroupDraw.of_whole(group) for group in self.drawn.completions]

    @property
    def version(self) -> WeightVersion:
        """This one version has drawn all of them."""
        spans = [s for group in self.drawn.completions for c in group for s in c.version_spans]
        [version] = {span.version for span in spans}
        return version

    @property
    def trained(self) -> Rollout:
        """These groups are trained on."""
        return self.drawn.select(self.kept)

    def drawn_samples(self) -> list[tuple[Sample, int]]:
        """Return what the step has drawn and does not drop: samples, as far as they are drawn, and
        from which token on the step has drawn them."""
        return [(sample, 0) for group in self.trained.samples() for sample in group]

    def left_samples(self) -> list[tuple[Sample, int]]:
        """Return the same of what is left to later steps alone; whole samples are not."""
        return []

    @property
    def num_prompts(self) -> int:
        """The step has drawn so many prompts."""
        return len(self.drawn.problems)

    @property
    def num_tokens(self) -> int:
        """So many tokens were drawn for it."""
        return sum(num_drawn(c) for group in self.drawn.completions for c in group)

    def schedule_row(
        self, settings: RolloutSection, step: int, begin: int, served: WeightVersion | None
    ) -> ScheduleRow:
        """Return what is logged of a step, counted from 1, that has begun at this place of the
        training order; served: what the engine has got since, to draw by."""
        ids = [group[0].sample_id for group in self.drawn.completions]
        differ = with_spread(self.drawn.rewards) if settings.dynamic_sampling else range(len(ids))
        return ScheduleRow(
            step=step,
            begin=begin,
            drawn_after=settings.drawn_after(step),
            version=self.version,
            rounds=self.rounds,
            drawn=tuple(self.draws),
            equal=tuple(ids[i] for i in sorted({*range(len(ids))} - {*differ})),
            trained=tuple(ids[i] for i in self.kept),
            served=served,
        )

    def dropped(self) -> list[tuple[Completion, float]]:
        """Return the samples that are not trained on, with their rewards, in order."""
        rest = self.drawn.select(sorted(set(range(len(self.drawn.problems))) - set(self.kept)))
        groups = zip(rest.completions, rest.rewards, strict=True)
        return [pair for group, rewards in groups for pair in zip(group, rewards, strict=True)]

    def metrics(self) -> dict[str, float]:
        """Return what dynamic sampling has come to, under rollout/."""
        scored = len(self.drawn.rewards)
        return {
            "rollout/refills": self.refills,
            "rollout/prompts_drawn": self.num_prompts,
            "rollout/spread_fraction": len(with_spread(self.drawn.rewards)) / scored,
            "rollout/kept_fraction": len(self.kept) / scored,
            "rollout/drawn_reward_mean": self.drawn.reward_mean,
        }


def with_spread(rewards: Sequence[Sequence[float]]) -> list[int]:
    """Return the places of the groups whose rewards are not all equal, [groups][samples]."""
    return [i for i, group in enumerate(rewards) if min(group) != max(group)]


def draw_step(
    source: RolloutSource,
    settings: RolloutSection,
    step: int,
    begin: int,
    poll: tuple[Poll, Poll] = (lambda: None, lambda: None),
    show: Callable[[str], object] = lambda text: None,
) -> StepRollout:
    """Draw and score a step, counted from 0, from the place `begin` of the training order.

    poll: while samples are drawn, and while they are scored; show: as RolloutSource.draw. Every
    process is given the same rewards, so all decide alike. Raises TooFewGroupsError, and Stopped.
    """

    def round_of(refill: int) -> Rollout:
        rollout = source.draw(source.training_prompts(step, begin, refill), poll[0], show)
        source.score(rollout, poll[1])
        return rollout

    before = source.accept_lengths
    drawn, refills = round_of(0), 0
    if not settings.dynamic_sampling:
        return StepRollout(drawn, range(len(drawn.problems)), guesses=source.guesses_since(before))
    wanted = settings.prompts_per_step
    while len(kept := with_spread(drawn.rewards)) < wanted and refills < settings.max_refills:
        refills += 1
        show(f"refill {refills}: {len(kept)} of {wanted} prompts")
        drawn.extend(round_of(refills))
    require_enough(settings, step, len(kept), len(drawn.problems))
    return StepRollout(drawn, kept[:wanted], refills, source.guesses_since(before))


def require_enough(settings: RolloutSection, step: int, found: int, drawn: int) -> None:
    """Raise TooFewGroupsError unless step, counted from 0, can be trained on the `found` prompts
    that may be, of `drawn`."""
    few = found < settings.prompts_per_step and settings.too_few_groups == "error"
    if few or not found:
        raise TooFewGroupsError(_too_few(settings, step, found, drawn))


def _too_few(settings: RolloutSection, step: int, found: int, drawn: int) -> str:
    meaning = "give other prompts, or more refills"
    if settings.too_few_groups == "error":
        meaning += " (of records in files resume=true goes on with them)"
        meaning += ", or rollout.too_few_groups=train"
    return (
        f"step {step + 1}: of {drawn} prompts drawn {found} have samples of different rewards; "
        f"rollout.prompts_per_step is {settings.prompts_per_step} and rollout.max_refills is "
        f"{settings.max_refills}: {meaning}; the last checkpoint is unharmed"
    )
