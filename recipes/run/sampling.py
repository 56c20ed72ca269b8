"""A rollout: the prompts whose turn it is, their completions and what those are worth."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samebit.recipes.config import GrpoRun
from samebit.recipes.data.conversation import GenerateError, GenerateRequest, Response
from samebit.recipes.data.order import SampleIds
from samebit.recipes.data.records import Split
from samebit.recipes.data.reward_sum import RewardSum
from samebit.recipes.data.rewards import Poll, RewardError, score
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.data.tasks.base import Problem
from samebit.recipes.launch.led_engine import LedEngine
from samebit.recipes.launch.replicas import ReplicatedEngine
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.generation import GenerateFunction
from samebit.recipes.run.inputs import GrpoInputs
from samebit.recipes.run.signals import Stopped
from samebit.rollout.client import EngineClient, Progress
from samebit.rollout.speculative.accept_lengths import AcceptLengths
from samebit.rollout.types import Completion, SamplingParams
from samebit.trainer.ranks import on_first
from samebit.trainer.types import Sample
from samebit.weight_sync.types import WeightVersion

_SHOW_S = 0.5


@dataclass(frozen=True)
class Prompts:
    """Says what the engine is asked for."""

    problems: list[Problem]
    token_ids: list[list[int]]
    sample_ids: list[list[int]]
    """[prompts][samples]."""
    params: SamplingParams


@dataclass
class Rollout:
    """Holds completions of some problems, groups in prompt order."""

    problems: list[Problem]
    prompt_ids: list[list[int]]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards: list[list[float]] = field(default_factory=list)
    """Empty until the completions are scored."""
    terms: dict[str, list[list[float]]] = field(default_factory=dict)
    """By label, where the reward is a sum of several: each one's rewards, without its weight."""

    def select(self, places: Sequence[int]) -> "Rollout":
        """Return the groups at these places, in their order."""
        return Rollout(
            problems=[self.problems[i] for i in places],
            prompt_ids=[self.prompt_ids[i] for i in places],
            completions=[self.completions[i] for i in places],
            texts=[self.texts[i] for i in places],
            rewards=[self.rewards[i] for i in places],
            terms={label: [groups[i] for i in places] for label, groups in self.terms.items()},
        )

    def extend(self, other: "Rollout") -> None:
        """Put the groups of another rollout behind these."""
        self.problems += other.problems
        self.prompt_ids += other.prompt_ids
        self.completions += other.completions
        self.texts += other.texts
        self.rewards += other.rewards
        for label, groups in other.terms.items():
            self.terms[label] += groups

    @property
    def reward_mean(self) -> float:
        """This is the mean over all samples."""
        scale = scale_of(self.rewards)
        flat = [r / scale for group in self.rewards for r in group]
        return sum(flat) / len(flat) * scale

    @property
    def reward_tensor(self) -> Tensor:
        """These are the rewards [prompts, samples] in fp64; fp32 would lose small differences."""
        return torch.tensor(self.rewards, dtype=torch.float64)

    def samples(self) -> list[list[Sample]]:
        """Return the completions [prompts][samples] as what is trained on, without advantages."""
        groups = zip(self.prompt_ids, self.completions, strict=True)
        return [[drawn_sample(prompt, c) for c in group] for prompt, group in groups]


class PromptOrder:
    """Chooses whose turn it is."""

    def __init__(
        self, settings: RolloutSection, seed: int, train_set: Split, eval_set: Split
    ) -> None:
        self._settings, self._seed = settings, seed
        self._train_set, self._eval_set = train_set, eval_set
        self._sample_ids = SampleIds()

    def training_prompts(self, step: int, begin: int | None = None, refill: int = 0) -> Prompts:
        """Return the prompts of a step, counted from 0; raises ValueError the second time.

        begin: the step's first place in the training order, if not all steps before it have drawn
        prompts_per_step. refill: 0, or which of the step's refills, each behind the one before.
        """
        r, problems = self._settings, self._train_set
        first = step * r.prompts_per_step if begin is None else begin
        places = r.places_of(refill)
        indices = [problems.index_at(first + i, self._seed) for i in places]
        params = SamplingParams(
            n=r.samples_per_prompt,
            temperature=r.temperature,
            max_new_tokens=r.max_new_tokens,
            truncated_logprobs=r.truncates,
            **r.limits,
        )
        n = r.samples_per_prompt
        ids = self._sample_ids.of_step(step, len(indices), n, first_prompt=places.start)
        return _prompts(problems, indices, ids, params)

    def held_out_prompts(self, step: int) -> Prompts:
        """Return the held-out prompts, for the evaluation after `step` steps; raises as above."""
        r, problems = self._settings, self._eval_set
        indices = range(len(problems))
        params = SamplingParams(
            n=r.eval_samples_per_prompt,
            temperature=r.eval_temperature,
            max_new_tokens=r.max_new_tokens,
            **r.eval_limits,
        )
        ids = self._sample_ids.of_step(
            step, len(indices), r.eval_samples_per_prompt, evaluation=True
        )
        return _prompts(problems, indices, ids, params)


class RolloutSource(PromptOrder):
    """Has an engine complete the prompts whose turn it is, and scores the completions."""

    def __init__(self, run: GrpoRun, inputs: GrpoInputs, engine: EngineClient) -> None:
        super().__init__(run.rollout, run.seed, inputs.train_set, inputs.eval_set)
        self._inputs = inputs
        self._engine = engine

    @property
    def accept_lengths(self) -> AcceptLengths | None:
        """What the engine's guesses have come to so far; None if it does not speculate."""
        return self._engine.accept_lengths

    @property
    def weight_version(self) -> WeightVersion:
        """The version that the engine serves."""
        return self._engine.weight_version

    def guesses_since(self, earlier: AcceptLengths | None) -> AcceptLengths | None:
        """What has come to earlier `accept_lengths` since."""
        now = self.accept_lengths
        return None if now is None or earlier is None else now - earlier

    def draw(
        self,
        prompts: Prompts,
        poll: Poll = lambda: None,
        show: Callable[[str], object] = lambda text: None,
    ) -> Rollout:
        """Have the engine complete the prompts; `show` is told now and then how fast it goes."""
        if self._inputs.generate is not None:
            told = _told(poll, show)
            groups = self._in_turns(self._inputs.generate, prompts, told)
        else:
            params = [prompts.params] * len(prompts.token_ids)
            groups = self.complete(prompts.token_ids, params, prompts.sample_ids, poll, show)
        return self.rollout(prompts.problems, prompts.token_ids, groups)

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        sample_ids: Sequence[Sequence[int]],
        poll: Poll,
        show: Callable[[str], object],
    ) -> list[list[Completion]]:
        """Have the engine go on after each context, as its params say; otherwise as `draw`."""
        return self._engine.generate(contexts, params, sample_ids, progress=_told(poll, show))

    def rollout(
        self,
        problems: list[Problem],
        prompt_ids: list[list[int]],
        completions: list[list[Completion]],
    ) -> Rollout:
        """Return finished groups of these problems with their texts, not yet scored."""
        texts = [[self._inputs.text.decode(c) for c in group] for group in completions]
        return Rollout(problems, prompt_ids, completions, texts)

    def _in_turns(
        self, generate: GenerateFunction, prompts: Prompts, progress: Progress
    ) -> list[list[Completion]]:
        """The samples that the user's function makes of the prompts, [prompts][samples]."""
        params = replace(prompts.params, n=1)
        parts = zip(prompts.problems, prompts.token_ids, prompts.sample_ids, strict=True)
        requests = [
            GenerateRequest(
                sample_id=sample_id,
                prompt_ids=tuple(prompt),
                problem=problem,
                max_new_tokens=params.max_new_tokens,
                text=self._inputs.text,
            )
            for problem, prompt, sample_ids in parts
            for sample_id in sample_ids
        ]

        def work(client: EngineClient, own: Sequence[GenerateRequest]) -> list[Response]:
            return generate.draw(client, own, params, progress)

        if isinstance(self._engine, ReplicatedEngine | LedEngine):
            found = self._engine.shared(requests, work, GenerateError)
        else:
            found = work(self._engine, requests)
        rest = iter(found)
        return [[next(rest) for _ in ids] for ids in prompts.sample_ids]

    def score(self, rollout: Rollout, poll: Poll = lambda: None) -> None:
        """Give a rollout its rewards [prompts][samples], which the first process finds for all.

        Where `poll` raises Stopped there, it ends the scoring on every process.
        """
        reward, texts = self._inputs.reward, rollout.texts
        problems = [p for p, group in zip(rollout.problems, texts, strict=True) for _ in group]
        flat = [text for group in texts for text in group]

        def score_all() -> list[list[float]] | str:
            """The rewards of all samples, and those of each term, if there are several."""
            try:
                if not isinstance(reward, RewardSum):
                    return [score(reward, flat, problems, poll)]
                terms = reward.score_terms(flat, problems, poll)
                return [reward.sums(terms, flat, problems), *terms]
            except Stopped as stopped:
                return str(stopped)

        found = on_first(score_all, RewardError)
        if isinstance(found, str):
            raise Stopped(found)
        labels = reward.labels if isinstance(reward, RewardSum) else ()
        rollout.rewards, *terms = (_in_groups(values, texts) for values in found)
        rollout.terms = dict(zip(labels, terms, strict=True))


def scale_of(groups: Iterable[Iterable[float]]) -> float:
    """Return what rewards are divided by, so that no sum of their squares is infinite: 1, or where
    one of them is huge a power of two, which rounds nothing that their sum would keep."""
    _, exponent = math.frexp(max(abs(x) for group in groups for x in group))
    return 2.0 ** max(0, exponent - 480)


def _told(poll: Poll, show: Callable[[str], object]) -> Progress:
    """What an engine's progress is told to: it polls, and shows now and then how fast it goes."""
    start = shown = time.perf_counter()

    def progress(_done: int, num_tokens: int) -> None:
        nonlocal shown
        poll()
        now = time.perf_counter()
        if num_tokens and now - shown > _SHOW_S:
            shown = now
            show(f"rollout: {num_tokens / (now - start):.0f} tok/s")

    return progress


def _in_groups(values: Sequence[float], texts: Sequence[Sequence[str]]) -> list[list[float]]:
    rest = iter(values)
    return [[next(rest) for _ in group] for group in texts]


def _prompts(
    split: Split, indices: Sequence[int], sample_ids: list[list[int]], params: SamplingParams
) -> Prompts:
    problems = [split[i] for i in indices]
    token_ids = [split.encoded(problem).prompt_ids.tolist() for problem in problems]
    return Prompts(problems, token_ids, sample_ids, params)
