"""What a run reads: all of it, every record checked, before anything of an earlier run is removed.

A generated train split is as long as its configuration says; checked are the problems that the run
will use.
"""

import logging
from collections.abc import Sequence

from samebit.kernels.registry import attention_kind
from samebit.recipes.config import DpoRun, GrpoRun, SftRun, check_reference
from samebit.recipes.data.order import MAX_PROMPTS, problem_index
from samebit.recipes.data.records import Encoder, Split
from samebit.recipes.data.reward_pool import load_reward
from samebit.recipes.data.rewards import Poll
from samebit.recipes.data.splits import Apart
from samebit.recipes.data.tasks.base import Dataset, Problem
from samebit.recipes.data.tasks.faults import raise_faults
from samebit.recipes.data.tasks.registry import load_datasets
from samebit.recipes.data.text import TextCodec
from samebit.recipes.eagle3_config import Eagle3Run
from samebit.recipes.launch.draft import checked_draft
from samebit.recipes.launch.launched import is_one_of_several, launched_rank
from samebit.recipes.launch.online_draft import checked_online_draft
from samebit.recipes.launch.placement import require_launcher, require_release, require_transport
from samebit.recipes.run.checked_models import checked_critic, checked_model, checked_teacher
from samebit.recipes.run.generation import GenerateFunction
from samebit.recipes.run.signals import Stopped, StopSignals
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import require_taught_end
from samebit.rollout.speculative.making import open_speculation
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.config import require

logger = logging.getLogger(__name__)


def _require_exact_truncation(run: GrpoRun) -> None:
    """ValueError where thresholds would be compared with other logits than those that drew."""
    exact = attention_kind(run.numerics.attention).is_invariant or not run.rollout.truncates
    meaning = f"full with numerics.attention={run.numerics.attention}, which is not invariant: "
    meaning += "the trainer would not find what could be drawn"
    require(exact, "rollout.logprobs", run.rollout.logprobs, meaning)


def require_engine(run: GrpoRun | Eagle3Run, model: ModelConfig) -> None:
    """ValueError or OSError unless the longest sample fits the model's context and the KV cache,
    and what is to guess tokens is there."""
    if not (isinstance(run, GrpoRun) and run.draft.is_online):
        open_speculation(run.engine, model)
    longest = run.rollout.longest
    lengths = "rollout.max_prompt_len + rollout.max_new_tokens"
    model.require_context(longest, lengths)
    engines = {"engine": run.engine}
    if isinstance(run, GrpoRun) and run.distillation is not None:
        engines["distillation.engine"] = run.distillation.engine
    for key, engine in engines.items():
        tokens, page = engine.kv_cache_tokens, engine.page_size
        if tokens is not None and tokens // page * page < longest:
            raise ValueError(
                f"{lengths} = {longest} tokens; {key}.kv_cache_tokens is {tokens}, whole pages of "
                f"{page} tokens: give at least {-(-longest // page) * page}"
            )


class Unwritable:
    """Finds labels that come out otherwise as tokens: the vocabulary lacks a part of them."""

    def __init__(self, text: TextCodec) -> None:
        self._text = text
        self._found: list[str] = []

    def look(self, problems: Sequence[Problem]) -> None:
        """Count those of some problems, rejected answers too."""
        named = [(p.name, x) for p in problems for x in (*_answers(p), p.rejected) if x]
        texts = self._text.rewritten([label for _, label in named])
        for (name, label), text in zip(named, texts, strict=True):
            if text.strip() != label.strip():
                self._found.append(f"{name}: {label!r:.80} becomes {text!r:.80}")

    def warn(self, outcome: str) -> None:
        """Say how many there are, what that means, and the first."""
        if self._found:
            logger.warning(
                "%d labels cannot be written with the model's tokens, so %s: %s",
                *(len(self._found), outcome, self._found[0]),
            )


def _answers(problem: Problem) -> list[str]:
    if not problem.is_answered or isinstance(problem.prompt, str):
        return [problem.label]
    return [m.get("content", "") for m in problem.prompt if m["role"] == "assistant"]


class GrpoInputs:
    """Reads what a GRPO run reads. Raises OSError or ValueError for what cannot be used, and
    Stopped by a signal."""

    def __init__(self, run: GrpoRun, stop: StopSignals | None = None) -> None:
        poll = _polled(stop)
        self.model = checked_model(run)
        self.draft = checked_online_draft(run, self.model) if run.draft.is_online else None
        self.critic = checked_critic(run, self.model)
        _require_exact_truncation(run)
        train_set, eval_set = load_datasets(run.data)
        require_launcher(run)
        require_transport(run)
        require_release(run)
        self.text = TextCodec(run.model.path, run.data.chat)
        self.teacher = checked_teacher(run, self.model, self.text)
        check_reference(run.trainer, make_algorithm(run.algorithm).has_reference)
        wanted = run.rollout.generate is not None
        self.generate = GenerateFunction(run.rollout, self.model.vocab_size) if wanted else None
        self.reward = load_reward(run.reward, poll)
        encoder = Encoder(
            text=self.text,
            vocab_size=self.model.vocab_size,
            max_len=run.rollout.max_prompt_len,
            limit="rollout.max_prompt_len",
            policy=run.data.overlong_prompts,
        )
        self.train_set = Split("train split", train_set, encoder)
        self.eval_set = Split("held-out split", eval_set, encoder)
        unwritable = Unwritable(self.text)
        try:
            require_engine(run, self.model)
            most = run.rollout.most_prompts_named
            if most > MAX_PROMPTS:
                raise ValueError(
                    f"rollout.prompts_per_step is {run.rollout.prompts_per_step}, with its refills "
                    f"up to {most} prompts a step; sample ids can name {MAX_PROMPTS}"
                )
            used = _used(train_set, run.rollout.most_prompts(run.trainer.num_steps), run.seed)
            names = {function.name for function in run.reward.functions.values()}
            compared = unwritable if "exact_match" in names else None
            self._prepare(used, compared, Apart(run.data), poll)
        except BaseException:
            self.reward.close()
            raise
        if launched_rank() > 0:
            self.reward.close()  # the first process scores
        unwritable.warn("exact_match never rewards them")

    @property
    def records(self) -> dict[str, Dataset]:
        """A checkpoint is bound to the contents of these."""
        train = self.train_set.contents("training records")
        return train | self.eval_set.contents("held-out records")

    def close(self) -> None:
        """Let go of the reward's processes and the event loop. A second call does nothing."""
        self.reward.close()
        if self.generate is not None:
            self.generate.close()

    def _prepare(
        self, used: Sequence[int], unwritable: Unwritable | None, apart: Apart, poll: Poll
    ) -> None:
        faults: list[str] = []

        def check(problems: Sequence[Problem]) -> list[str]:
            if unwritable is not None:
                unwritable.look(problems)
            return self.reward.check(problems, poll)

        self.train_set.prepare(used, apart.noting(check), faults)
        self.eval_set.prepare(range(len(self.eval_set)), apart.comparing(check), faults)
        raise_faults(faults)


class SftInputs:
    """Reads what a supervised run reads, or one of dpo. Raises as GrpoInputs does."""

    def __init__(self, run: SftRun, stop: StopSignals | None = None) -> None:
        poll = _polled(stop)
        self.model = checked_model(run)
        train_set, eval_set = load_datasets(run.data)
        self.text = TextCodec(run.model.path, run.data.chat)
        require_taught_end(run.model.path, self.text.end_token_id)
        limits = {
            "trainer.micro_batch_tokens": run.trainer.micro_batch_tokens,
            "the model's max_position_embeddings": self.model.max_position,
        }
        pair_len = limits.pop("trainer.micro_batch_tokens") if isinstance(run, DpoRun) else None
        limit = min(limits, key=lambda name: limits[name])
        encoder = Encoder(
            text=self.text,
            vocab_size=self.model.vocab_size,
            max_len=limits[limit],
            limit=limit,
            policy=run.data.overlong_prompts,
            with_labels=True,
            pair_len=pair_len,
        )
        self.train_set = Split("train split", train_set, encoder)
        self.eval_set = Split("held-out split", eval_set, encoder) if len(eval_set) else None
        count = run.trainer.num_steps * (run.trainer.batch_size or 0)
        faults, unwritable, apart = list[str](), Unwritable(self.text), Apart(run.data)

        def check(problems: Sequence[Problem]) -> list[str]:
            poll()
            unwritable.look(problems)
            return [""] * len(problems)

        used = _used(train_set, count, run.seed)
        self.train_set.prepare(used, apart.noting(check), faults)
        if self.eval_set is not None:
            self.eval_set.prepare(range(len(eval_set)), apart.comparing(check), faults)
        raise_faults(faults)
        copies = run.numerics.copies_to_fill(run.trainer.parallel)
        held_out = self.eval_set
        if held_out is not None and len(held_out) < copies:
            raise ValueError(
                f"{len(held_out)} records are held out (data.eval_size, data.eval_path), and "
                f"trainer.parallel.data is {copies}: give each copy of the model at least one"
            )
        unwritable.warn("something else is taught")

    @property
    def records(self) -> dict[str, Dataset]:
        """A checkpoint is bound to the contents of these."""
        held_out = {} if self.eval_set is None else self.eval_set.contents("held-out records")
        return self.train_set.contents("training records") | held_out


class Eagle3Inputs:
    """Reads what a draft's training reads; of the draft's folder the headers alone. Raises as
    GrpoInputs does."""

    def __init__(self, run: Eagle3Run, stop: StopSignals | None = None) -> None:
        poll = _polled(stop)
        self.model = checked_model(run)
        require_engine(run, self.model)
        self.draft, self.config = checked_draft(run, self.model)
        train_set, eval_set = load_datasets(run.data.of_prompts())
        encoder = Encoder(
            text=TextCodec(run.model.path, run.data.chat),
            vocab_size=self.model.vocab_size,
            max_len=run.rollout.max_prompt_len,
            limit="rollout.max_prompt_len",
            policy=run.data.overlong_prompts,
        )
        self.train_set = Split("train split", train_set, encoder)
        self.eval_set = Split("held-out split", eval_set, encoder)
        faults, apart = list[str](), Apart(run.data)

        def check(problems: Sequence[Problem]) -> list[str]:
            poll()
            return [""] * len(problems)

        count = run.trainer.num_steps * run.rollout.prompts_per_step
        if run.draft.path is None and self.config.draft_vocab_size < self.model.vocab_size:
            count = max(count, run.draft.vocab_prompts)
        used = _used(train_set, count, run.seed)
        self.train_set.prepare(used, apart.noting(check), faults)
        self.eval_set.prepare(range(len(eval_set)), apart.comparing(check), faults)
        raise_faults(faults)

    @property
    def records(self) -> dict[str, Dataset]:
        """A checkpoint is bound to the contents of these."""
        train = self.train_set.contents("training records")
        return train | self.eval_set.contents("held-out records")


def _used(train_set: Dataset, count: int, seed: int) -> range | list[int]:
    """Of a generated split what the first `count` positions of the order hold; all of a file."""
    size = len(train_set)
    if isinstance(train_set, list) or count >= size:
        return range(size)
    return sorted({problem_index(position, size, seed) for position in range(count)})


def _polled(stop: StopSignals | None) -> Poll:
    def poll() -> None:
        # One of several processes must not leave the others alone.
        if stop is not None and not is_one_of_several():
            try:
                stop.poll()
            except Stopped as name:
                raise Stopped(f"{name}: stopped before the first step, nothing to save") from None

    return poll
