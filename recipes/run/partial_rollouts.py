"""A run's rollouts with rollout.partial_tokens: long samples are drawn over several steps.

A step draws in stints. A stint begins the next prompts_per_step prompts of the training order, and
in it every sample that is unfinished, of them or of earlier ones, draws at most partial_tokens
further tokens: after its prompt and what it has drawn, as a prompt of these tokens would. Stints
end once the samples of prompts_per_step prompts are all finished; the first of these prompts are
trained on, in their order, and the others go on in the next step, by its weights. With dynamic
sampling finished prompts whose rewards are all equal are dropped and do not count. So what is drawn
when, and trained on when, is a function of seed, data and weights, never of time.

Partial rollouts: Kimi Team 2025, "Kimi k1.5", arXiv 2501.12599.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from sys import intern
from typing import Any

import numpy as np
import torch

from samebit.recipes.config import GrpoRun
from samebit.recipes.data.rewards import Poll
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.batches import own_micro_batches, rows_by_sample
from samebit.recipes.run.dynamic_sampling import StepRollout, require_enough, with_spread
from samebit.recipes.run.sampling import Rollout, RolloutSource
from samebit.recipes.run.signals import StopSignals
from samebit.recipes.run.step_rollouts import StepRollouts
from samebit.recipes.run.training_metrics import PhaseTimer
from samebit.recipes.run.waiting_rollouts import packed, unpacked
from samebit.rollout.types import Completion
from samebit.trainer.checkpoint import Checkpoint
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first
from samebit.trainer.stats import Comparison
from samebit.trainer.types import Sample, StepStats

STATE = "partial_rollouts"


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
    """Holds what a step is trained on, and what it drops, and counts all that it has drawn."""

    settings: RolloutSection
    stints: int
    begun: int
    """Prompts that it has begun."""
    tokens: int
    """It has drawn so many."""
    continued: int
    """So many of them go on samples of earlier steps."""
    pending: int
    """Samples that are left unfinished."""
    waiting: int
    """Samples that are finished, and are not trained on yet."""
    older_fraction: float
    """Of the tokens that are trained on, how many earlier weights drew."""

    @property
    def num_prompts(self) -> int:
        """The step has begun so many prompts."""
        return self.begun

    @property
    def num_tokens(self) -> int:
        """The step has drawn so many tokens."""
        return self.tokens

    def metrics(self) -> dict[str, float]:
        """Return what became of samples over steps, under rollout/."""
        return {
            **(super().metrics() if self.settings.dynamic_sampling else {}),
            "rollout/stints": self.stints,
            "rollout/prompts_drawn": self.begun,
            "rollout/continued_tokens": self.continued,
            "rollout/pending_samples": self.pending,
            "rollout/waiting_samples": self.waiting,
            "rollout/older_token_fraction": self.older_fraction,
        }


class PartialRollouts(StepRollouts):
    """Has samples of several steps drawn a part at a time.

    With rollout.check_stale what a step has drawn and does not train on is compared with one more
    forward pass of the weights that drew it, before they change.
    """

    def __init__(
        self,
        run: GrpoRun,
        source: RolloutSource,
        trainer: MegatronTrainer,
        resumed: Checkpoint | None,
    ) -> None:
        super().__init__(run, source)
        self._trainer = trainer
        self._left: dict[int, list[PartialGroup]] = {0: []}
        """By step, what it leaves to later ones, by place: of the last step that was taken, which
        may be dropped, and of the one before."""
        self._left_compared = Comparison()
        if resumed is not None:
            state, wanted = next(resumed.load_all())[STATE], run.rollout.prompts_per_step
            self._left = {resumed.step: list(_of_state(state, source, wanted))}

    def take(
        self, step: int, begin: int, stop: StopSignals, show: Callable[[str], object]
    ) -> StepRollout:
        """Draw a step's stints, and return what it is trained on, scored. Raises TooFewGroupsError
        as draw_step does."""
        settings, before = self._run.rollout, self._left[step - 1]
        guesses, first = self._source.accept_lengths, begin // settings.prompts_per_step
        groups, stints, kept = before, 0, list[PartialGroup]()
        while not stints or (
            len(kept) < settings.prompts_per_step and stints < settings.most_stints_per_step
        ):
            show(f"stint {stints + 1}: {len(kept)} of {settings.prompts_per_step} prompts")
            groups = self._stint(groups, first + stints, stop.poll, show)
            groups = self._scored(groups, stop.poll_alone)
            stints += 1
            kept = [g for g in groups if g.rewards and (g.has_spread or not self._drops)]
        trained = kept[: settings.prompts_per_step]
        dropped = [g for g in groups if g.rewards and self._drops and not g.has_spread]
        require_enough(settings, step - 1, len(kept), len(kept) + len(dropped))
        ended = sorted(trained + dropped, key=lambda g: g.place)
        ended_places, trained_places = ({g.place for g in x} for x in (ended, trained))
        left = [g for g in groups if g.place not in ended_places]
        self._left = {step - 1: before, step: left}
        samples = [c for g in left for c in g.completions]
        pending, earlier = sum(map(self._is_pending, samples)), {g.place for g in before}
        drawn, known = _num_tokens(groups), _num_tokens(before)
        older = (_older_tokens(c, self._trainer.step) for g in trained for c in g.completions)
        return PartialStep(
            self._rollout(ended),
            [i for i, g in enumerate(ended) if g.place in trained_places],
            stints - 1,
            self._source.guesses_since(guesses),
            settings=settings,
            stints=stints,
            begun=stints * settings.prompts_per_step,
            tokens=drawn - known,
            continued=_num_tokens(g for g in groups if g.place in earlier) - known,
            pending=pending,
            waiting=len(samples) - pending,
            older_fraction=sum(older) / _num_tokens(trained),
        )

    def compare_taken(self, timer: PhaseTimer) -> Comparison:
        """Compare what is left to later steps, as far as the present weights drew it."""
        self._left_compared = Comparison()
        samples = [
            drawn_sample(group.prompt_ids, completion)
            for group in self._left[max(self._left)]
            for completion in group.completions
            if completion.version_spans[-1].version.step == self._trainer.step
        ]
        if samples and self._run.rollout.check_stale:
            with timer.time("compare"):
                self._left_compared = self._comparison(samples)
        return self._left_compared

    def compared(self, first: StepStats) -> Comparison:
        """Return the comparison of what is left together with that of the optimizer step."""
        return super().compared(first) + self._left_compared

    def state_dict(self, trained: int) -> dict[str, Any]:
        """What step `trained` has left; the first process saves it for all."""
        return {STATE: _to_state(self._left[trained])} if is_first() else {}

    def _is_pending(self, completion: Completion) -> bool:
        """Whether nothing but the budget of its stints has ended it so far."""
        most = self._run.rollout.max_new_tokens
        return completion.finish_reason == "length" and len(completion.token_ids) < most

    def _stint(
        self,
        groups: Sequence[PartialGroup],
        number: int,
        poll: Poll,
        show: Callable[[str], object],
    ) -> list[PartialGroup]:
        """Draw a stint, counted from 0: groups as far as they then are, the ones it begins last."""
        settings = self._run.rollout
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
        return self._run.rollout.dynamic_sampling

    def _scored(self, groups: Sequence[PartialGroup], poll: Poll) -> list[PartialGroup]:
        """The groups, those that are finished with their rewards."""
        done = [g for g in groups if not any(map(self._is_pending, g.completions))]
        done = [g for g in done if not g.rewards]
        if not done:
            return list(groups)
        rollout = self._rollout(done)
        self._source.score(rollout, poll)
        found = {}
        for i, group in enumerate(done):
            terms = {label: values[i] for label, values in rollout.terms.items()}
            found[group.place] = replace(group, rewards=rollout.rewards[i], terms=terms)
        return [found.get(group.place, group) for group in groups]

    def _rollout(self, groups: Sequence[PartialGroup]) -> Rollout:
        """Groups that are finished, as far as they are scored."""
        parts = ([g.problem for g in groups], [g.prompt_ids for g in groups])
        found = self._source.rollout(*parts, [g.completions for g in groups])
        found.rewards = [g.rewards for g in groups]
        labels = groups[0].terms
        found.terms = {label: [g.terms[label] for g in groups] for label in labels}
        return found

    def _comparison(self, samples: list[Sample]) -> Comparison:
        """Of the tokens that the newest weights drew; the same on every rank."""
        settings, temperature = self._run.trainer, self._run.rollout.temperature
        copies = -(-settings.parallel.data // len(samples))  # a micro-batch for every rank
        batches = own_micro_batches(samples * copies, settings, self._trainer, temperature)
        logprobs = rows_by_sample(batches, self._trainer.logprobs(batches))
        found = Comparison()
        for sample in samples:
            newest = np.arange(len(sample.token_ids)) >= sample.comparable_from
            places = torch.from_numpy(np.flatnonzero(newest & sample.loss_mask))
            ours = torch.from_numpy(sample.in_place(logprobs[sample.sample_id], "logprobs"))
            found += Comparison.of_sample(sample, places, ours[places])
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


def _num_tokens(groups: Iterable[PartialGroup]) -> int:
    return sum(len(c.token_ids) for group in groups for c in group.completions)


def _older_tokens(completion: Completion, step: int) -> int:
    """How many of its tokens weights before this optimizer step have drawn."""
    newer = [span.start for span in completion.version_spans if span.version.step == step]
    return newer[0] if newer else len(completion.token_ids)


def _to_state(groups: Sequence[PartialGroup]) -> dict[str, Any]:
    """Groups as tensors and plain values."""
    return {
        "places": [group.place for group in groups],
        "rewards": [group.rewards for group in groups],
        "terms": [
            [(intern(label), values) for label, values in group.terms.items()] for group in groups
        ],
        **packed([c for group in groups for c in group.completions]),
    }


def _of_state(
    state: dict[str, Any], source: RolloutSource, prompts_per_stint: int
) -> Iterator[PartialGroup]:
    """The groups that `_to_state` was given: prompts and ids are those of their stints."""
    places = [(place, *divmod(place, prompts_per_stint)) for place in state["places"]]
    asked = {number: source.training_prompts(number) for number in sorted({x[1] for x in places})}
    sample_ids = [asked[number].sample_ids[i] for _, number, i in places]
    rest = unpacked(state, [sample_id for ids in sample_ids for sample_id in ids])
    scores = zip(state["rewards"], map(dict, state["terms"]), strict=True)
    for (place, number, i), ids, score in zip(places, sample_ids, scores, strict=True):
        parts = asked[number].problems[i], asked[number].token_ids[i], [next(rest) for _ in ids]
        yield PartialGroup(place, *parts, *score)
