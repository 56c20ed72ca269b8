"""How a step is drawn with rollout.partial_tokens: in stints, long samples over several steps.

A stint begins the next prompts_per_step prompts of the training order, and in it every sample that
is unfinished, of them or of earlier ones, draws at most partial_tokens further tokens: after its
prompt and what it has drawn, as a prompt of these tokens would. Stints end once the samples of
prompts_per_step prompts are all finished; the first of these prompts are trained on, in their
order, and the others go on in the next step, by its weights. With dynamic sampling finished prompts
whose rewards are all equal are dropped and do not count. So what is drawn when, and trained on
when, is a function of seed, data and weights, never of time.

Partial rollouts: Kimi Team 2025, "Kimi k1.5", arXiv 2501.12599.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from samebit.recipes.data.rewards import Poll
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.dynamic_sampling import StepRollout, require_enough, with_spread
from samebit.recipes.run.sampling import Rollout, RolloutSource
from samebit.recipes.run.schedule import GroupDraw
from samebit.rollout.types import Completion
from samebit.trainer.types import Sample
from samebit.weight_sync.types import WeightVersion


@dataclass(frozen=True)
class PartialGroup:
    """Holds the samples of one prompt, as far as they are drawn."""

    place: int
    """Of the prompt in the training order."""
    problem: Problem
    prompt_ids: list[int]
    completions: list[Completion]
    rewards: list[float] = field(default_factory=list)
    """Of the samples; empty until all are finished."""
    terms: dict[str, list[float]] = field(default_factory=dict)
    """By label, where the reward is a sum of several."""

    @property
    def has_spread(self) -> bool:
        """Whether the rewards are there, and not all equal."""
        return bool(self.rewards) and bool(with_spread([self.rewards]))


@dataclass(frozen=True, kw_only=True)
class PartialStep(StepRollout):
    """Holds what a step is trained on, what it drops and leaves, and what it has drawn."""

    settings: RolloutSection
    groups: Sequence[GroupDraw]
    """What it has drawn, in the training order."""
    drawn_by: WeightVersion
    ended: Sequence[PartialGroup]
    """What it is trained on, or drops."""
    left: Sequence[PartialGroup]
    """What later steps go on with, or train on."""

    @property
    def draws(self) -> Sequence[GroupDraw]:
        """The step has drawn these parts."""
        return self.groups

    @property
    def version(self) -> WeightVersion:
        """This version has drawn them."""
        return self.drawn_by

    @property
    def num_prompts(self) -> int:
        """The step has begun so many prompts."""
        return self.rounds * self.settings.prompts_per_step

    @property
    def num_tokens(self) -> int:
        """The step has drawn so many tokens."""
        return sum(group.num_tokens for group in self.groups)

    def drawn_samples(self) -> list[tuple[Sample, int]]:
        """Return as StepRollout, of what the step is trained on and of what it leaves."""
        kept = [self.ended[i] for i in self.kept] + list(self.left)
        groups = {group.completions[0].sample_id: group for group in kept}
        return [
            (drawn_sample(group.prompt_ids, completion), len(group.prompt_ids) + start)
            for draw in self.groups
            if (group := groups.get(draw.first_id)) is not None
            for completion, (start, end) in zip(group.completions, draw.tokens, strict=True)
            if start < end
        ]

    def left_samples(self) -> list[tuple[Sample, int]]:
        """Return what is left and the step's version has drawn newest, with its first token's place
        of that version in each sample."""
        samples = [
            drawn_sample(group.prompt_ids, completion)
            for group in self.left
            for completion in group.completions
            if completion.version_spans[-1].version == self.drawn_by
        ]
        return [(sample, sample.comparable_from) for sample in samples]

    def metrics(self) -> dict[str, float]:
        """Return what became of samples over steps, under rollout/."""
        earlier = self.groups[: -self.num_prompts]
        pending = sum(len(group.pending) for group in self.groups)
        trained = [c for group in self.trained.completions for c in group]
        older = sum(_older_tokens(c, self.drawn_by) for c in trained)
        oldest = min(span.version.step for c in trained for span in c.version_spans)
        return {
            **(super().metrics() if self.settings.dynamic_sampling else {}),
            "rollout/stints": self.rounds,
            "rollout/prompts_drawn": self.num_prompts,
            "rollout/continued_tokens": sum(group.num_tokens for group in earlier),
            "rollout/pending_samples": pending,
            "rollout/waiting_samples": sum(len(g.completions) for g in self.left) - pending,
            "rollout/older_token_fraction": older / sum(len(c.token_ids) for c in trained),
            "rollout/oldest_weight_step": oldest,
        }


class LeftBySteps(dict[int, Sequence[PartialGroup]]):
    """Holds by step what it leaves to later ones: of the last one that was taken, which may be
    dropped, and of the one before."""

    def take(self, step: int, left: Sequence[PartialGroup]) -> None:
        """Add what a step leaves, and forget what those until the one before the last have left."""
        before = self[step - 1]
        self.clear()
        self.update({step - 1: before, step: left})


class Stints:
    """Draws steps in stints, and scores what is finished."""

    def __init__(self, settings: RolloutSection, source: RolloutSource) -> None:
        self._settings, self._source = settings, source

    def draw(
        self,
        step: int,
        begin: int,
        before: Sequence[PartialGroup],
        poll: tuple[Poll, Poll],
        show: Callable[[str], object] = lambda text: None,
    ) -> PartialStep:
        """Draw a step, counted from 0, as draw_step does; before: what the one before has left."""
        settings, source = self._settings, self._source
        guesses, first = source.accept_lengths, begin // settings.prompts_per_step
        groups, stints, kept = list(before), 0, list[PartialGroup]()
        while not stints or (
            len(kept) < settings.prompts_per_step and stints < settings.most_rounds_per_step
        ):
            show(f"stint {stints + 1}: {len(kept)} of {settings.prompts_per_step} prompts")
            groups = self._scored(self._stint(groups, first + stints, poll[0], show), poll[1])
            stints += 1
            kept = [g for g in groups if g.rewards and (g.has_spread or not self._drops)]
        trained = kept[: settings.prompts_per_step]
        dropped = [g for g in groups if g.rewards and self._drops and not g.has_spread]
        require_enough(settings, step, len(kept), len(kept) + len(dropped))
        ended = sorted(trained + dropped, key=lambda g: g.place)
        ended_places, trained_places = ({g.place for g in x} for x in (ended, trained))
        begun = {g.place: g for g in before}
        draws = [self._draw_of(g, begun.get(g.place)) for g in groups]
        return PartialStep(
            self.rollout_of(ended),
            [i for i, g in enumerate(ended) if g.place in trained_places],
            stints - 1,
            source.guesses_since(guesses),
            settings=settings,
            groups=[draw for draw in draws if draw.num_tokens],
            drawn_by=groups[-1].completions[0].version_spans[-1].version,
            ended=ended,
            left=[g for g in groups if g.place not in ended_places],
        )

    def _draw_of(self, group: PartialGroup, before: PartialGroup | None) -> GroupDraw:
        """What was drawn since the group was as it is given, or since it was not begun."""
        completions, ends = group.completions, [len(c.token_ids) for c in group.completions]
        starts = [len(c.token_ids) for c in before.completions] if before else [0] * len(ends)
        pending = (i for i, c in enumerate(completions) if self._is_pending(c))
        tokens = tuple(zip(starts, ends, strict=True))
        return GroupDraw(completions[0].sample_id, tokens, tuple(pending))

    def _is_pending(self, completion: Completion) -> bool:
        """Whether nothing but the budget of its stints has ended it so far."""
        most = self._settings.max_new_tokens
        return completion.finish_reason == "length" and len(completion.token_ids) < most

    def _stint(
        self,
        groups: Sequence[PartialGroup],
        number: int,
        poll: Poll,
        show: Callable[[str], object],
    ) -> list[PartialGroup]:
        """Draw a stint, counted from 0: groups as far as they then are, the ones it begins last."""
        settings = self._settings
        new, most = self._source.training_prompts(number), settings.max_new_tokens
        budget = settings.partial_tokens or most
        pending = [(g, c) for g in groups for c in g.completions if self._is_pending(c)]
        contexts = [[*g.prompt_ids, *c.token_ids] for g, c in pending]
        rooms = [min(budget, most - len(c.token_ids)) for _, c in pending]
        params = [replace(new.params, n=1, max_new_tokens=room) for room in rooms]
        params += [replace(new.params, max_new_tokens=budget)] * len(new.problems)
        ids = [[c.sample_id] for _, c in pending] + new.sample_ids
        drawn = iter(self._source.complete(contexts + new.token_ids, params, ids, poll, show))
        found = [
            replace(
                g,
                completions=[
                    joined(c, *next(drawn)) if self._is_pending(c) else c for c in g.completions
                ],
            )
            for g in groups
        ]
        places = range(number * settings.prompts_per_step, (number + 1) * settings.prompts_per_step)
        parts = zip(places, new.problems, new.token_ids, drawn, strict=True)
        return found + [PartialGroup(*part) for part in parts]

    @property
    def _drops(self) -> bool:
        """Whether prompts whose rewards are all equal are dropped."""
        return self._settings.dynamic_sampling

    def _scored(self, groups: Sequence[PartialGroup], poll: Poll) -> list[PartialGroup]:
        """The groups, those that are finished with their rewards."""
        done = [g for g in groups if not any(map(self._is_pending, g.completions))]
        done = [g for g in done if not g.rewards]
        if not done:
            return list(groups)
        rollout = self.rollout_of(done)
        self._source.score(rollout, poll)
        found = {}
        for i, group in enumerate(done):
            terms = {label: values[i] for label, values in rollout.terms.items()}
            found[group.place] = replace(group, rewards=rollout.rewards[i], terms=terms)
        return [found.get(group.place, group) for group in groups]

    def rollout_of(self, groups: Sequence[PartialGroup]) -> Rollout:
        """Return groups that are finished, as far as they are scored."""
        parts = ([g.problem for g in groups], [g.prompt_ids for g in groups])
        found = self._source.rollout(*parts, [g.completions for g in groups])
        found.rewards = [g.rewards for g in groups]
        labels = groups[0].terms
        found.terms = {label: [g.terms[label] for g in groups] for label in labels}
        return found


def joined(begun: Completion, more: Completion) -> Completion:
    """Return the sample that `more` goes on, which was drawn after the prompt and begun.token_ids.

    Other weights than those of its newest tokens have computed what stands before anew.
    """
    start, (first, *others) = len(begun.token_ids), more.version_spans
    spans = [replace(span, start=start + span.start) for span in others]
    if first.version != begun.version_spans[-1].version:
        spans.insert(0, replace(first, start=start, recomputed=True))
    return replace(
        more,
        token_ids=begun.token_ids + more.token_ids,
        logprobs=begun.logprobs + more.logprobs,
        version_spans=(*begun.version_spans, *spans),
    )


def _older_tokens(completion: Completion, version: WeightVersion) -> int:
    """How many of its tokens weights before this version have drawn."""
    newer = [span.start for span in completion.version_spans if span.version == version]
    return newer[0] if newer else len(completion.token_ids)
