"""What a target answers, and its streams of those answers, a micro-batch at a time.

The answers of a step are drawn in one call. Then each micro-batch is prefilled once more for its
streams, which have the bits that drawing would have given: so never more than one micro-batch's
streams exist, and a large batch draws as fast as ever. Held-out prompts are answered once, because
the target stays as it is: all evaluations of a run look at the same answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from samebit.recipes.data.order import SampleIds
from samebit.recipes.data.records import Split
from samebit.recipes.data.rewards import Poll
from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.sampling import PromptOrder, Prompts
from samebit.recipes.run.suffix_lengths import suffix_accept_length
from samebit.rollout.engine import Engine
from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.types import SamplingParams
from samebit.trainer.draft.batch import DraftBatch, pack_streams
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import MicroBatch, Sample

_COUNTING = (1 << 31) - 1  # a step that no run takes
_PREFILL = SamplingParams(temperature=0.0, max_new_tokens=1, logprobs=False)


def _progress(poll: Poll) -> Callable[[int, int], None]:
    def progress(_done: int, _num_tokens: int) -> None:
        poll()

    return progress


@dataclass(frozen=True)
class HeldOut:
    """The answers to the held-out prompts at a temperature, and what the suffix drafter would have
    been worth: see suffix_accept_length."""

    samples: list[Sample]
    temperature: float
    suffix_accept_length: float | None


class AnswerSource(PromptOrder):
    """Has the target answer the prompts whose turn it is, and read what it answered."""

    def __init__(
        self,
        settings: RolloutSection,
        seed: int,
        splits: tuple[Split, Split],
        engine: Engine,
        config: DraftConfig,
    ) -> None:
        """splits: to train on, and held out; config: the draft's."""
        super().__init__(settings, seed, *splits)
        self._engine = engine
        self._layers = sorted({*config.captured_layers, engine.model_config.num_layers})
        self._held_out: list[HeldOut] = []

    def draw(
        self, prompts: Prompts, temperature: float | None = None, poll: Poll = lambda: None
    ) -> list[Sample]:
        """The target's answers in order; temperature: another than the prompts' own."""
        params = prompts.params
        if temperature is not None:
            n = 1 if temperature == 0 else params.n
            params = replace(params, temperature=temperature, n=n)
        ids = [some[: params.n] for some in prompts.sample_ids]
        groups = self._engine.generate(prompts.token_ids, params, ids, progress=_progress(poll))
        pairs = zip(prompts.token_ids, groups, strict=True)
        return [drawn_sample(prompt, c) for prompt, group in pairs for c in group]

    def held_out(self, num_guesses: int, poll: Poll = lambda: None) -> list[HeldOut]:
        """The answers at rollout.eval_temperature, then the greedy ones; drawn by the first call,
        with the sample ids of the evaluation before the first step. num_guesses: of suffix."""
        if not self._held_out:
            prompts = self.held_out_prompts(0)
            temperatures = prompts.params.temperature, 0.0
            drawn = [self.draw(prompts, temperature, poll) for temperature in temperatures]
            self._held_out = [
                HeldOut(samples, temperature, self._suffix_length(prompts, samples, num_guesses))
                for samples, temperature in zip(drawn, temperatures, strict=True)
            ]
        return self._held_out

    def _suffix_length(
        self, prompts: Prompts, samples: Sequence[Sample], num_guesses: int
    ) -> float | None:
        size = len(samples) // len(prompts.token_ids)
        answers = [
            [sample.token_ids[len(prompt) :].tolist() for sample in samples[i * size :][:size]]
            for i, prompt in enumerate(prompts.token_ids)
        ]
        most = prompts.params.max_new_tokens
        return suffix_accept_length(prompts.token_ids, answers, num_guesses, most)

    def batches(self, samples: Sequence[Sample], max_tokens: int) -> Iterator[DraftBatch]:
        """Micro-batches of at most max_tokens tokens with their streams, one at a time."""
        model, device = self._engine.model_config, self._engine.device
        for batch in pack_samples(samples, max_tokens, device=device, model=model):
            yield DraftBatch(batch=batch, streams=self._streams(batch))

    def _streams(self, batch: MicroBatch) -> dict[int, Tensor]:
        """By layer, [T, Dt]. Nothing reads those of a sample's last token, which is left out."""
        contexts = [sample.token_ids[:-1].tolist() for sample in batch.samples]
        done = self._engine.generate(contexts, _PREFILL, return_hidden_states=self._layers)
        parts = [completion.hidden_states for [completion] in done]
        return pack_streams(parts, batch.seq_lens, self._engine.device)

    def vocabulary(self, size: int, num_prompts: int, poll: Poll) -> DraftVocabulary:
        """The tokens that the target says most often, to the first prompts in training order."""
        vocab_size = self._engine.model_config.vocab_size
        if size == vocab_size:
            return DraftVocabulary.whole(vocab_size)
        problems, r = self._train_set, self._settings
        indices = [problems.index_at(i, self._seed) for i in range(num_prompts)]
        token_ids = [problems.encoded(problems[i]).prompt_ids.tolist() for i in indices]
        ids = SampleIds().of_step(_COUNTING, num_prompts, 1)
        params = SamplingParams(temperature=r.temperature, max_new_tokens=r.max_new_tokens)
        groups = self._engine.generate(token_ids, params, ids, progress=_progress(poll))
        said = np.array([token for [c] in groups for token in c.token_ids], np.int64)
        return DraftVocabulary.most_frequent(np.bincount(said, minlength=vocab_size), size)
