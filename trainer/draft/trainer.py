"""DraftTrainer: optimizer steps of a draft model, on one process or on data parallel ones.

Its parameters have the model's dtype, bf16 on a GPU, and fp32 masters; on a CPU they are the
masters. Gradients are sums in fp32 over rows, passes, micro-batches and ranks, in that order, and
are divided once by the rows that count. The same samples on the same device give the same bytes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from samebit.kernels.reduce import ALONE, RankGroup, gather_rows, reduce_ref
from samebit.kernels.sample import signed64
from samebit.rollout.models.draft.config import EMBEDDING, OUTPUT, DraftConfig
from samebit.rollout.models.draft.decoder import DraftDecoder
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.draft.acceptance import accept_lengths
from samebit.trainer.draft.batch import DraftBatch, TargetHead
from samebit.trainer.draft.config import TttConfig
from samebit.trainer.draft.optimizer import MasterAdamW, learning_rate
from samebit.trainer.draft.ttt import TttTotals, loss_gradients, unroll
from samebit.trainer.types import MicroBatch, NonFiniteError
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.objects import gather_objects


@dataclass(frozen=True, kw_only=True)
class DraftStats:
    """What draft training measured on an optimizer step's rows, or on others without a step."""

    loss: float
    """The sum over passes of decayed losses, a mean over pass 0's rows."""
    num_rows: int
    """Rows that count in pass 0."""
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of each pass: loss, share of rows with the target's first choice, acceptance at temperature
    1; the target's entropy in nats, over the draft vocabulary; the share of rows whose first choice
    is in that; evaluated, accept_length."""


class DraftTrainer:
    """A draft, its target's head and embedding, and an optimizer.

    `params` are the live parameters of config.param_specs, in the model's dtype; they are filled by
    `fill` and rewritten by each step. An embedding of its own stays as it was filled.
    """

    def __init__(
        self,
        config: DraftConfig,
        vocabulary: DraftVocabulary,
        target: TargetHead,
        target_embedding: Tensor,
        optimizer: OptimizerConfig,
        num_steps: int,
        ttt: TttConfig | None = None,
        ranks: RankGroup = ALONE,
    ) -> None:
        """target_embedding [V, Dt], or the rows of one of target.ranks: read unless the draft has
        its own. ranks: the data parallel ones, each with its own micro-batches. num_steps: of the
        learning rate's schedule."""
        if len(vocabulary) != config.draft_vocab_size:
            raise ValueError(
                f"a vocabulary of {len(vocabulary)} tokens for a draft of {config.draft_vocab_size}"
            )
        self.config, self.vocabulary = config, vocabulary
        self.ttt, self.ranks = ttt or TttConfig(), ranks
        self.ttt.require_enough(config.is_block)
        self.device, self.dtype = target.output_weight.device, target.output_weight.dtype
        self.specs = config.param_specs()
        self.step = 0
        self._target, self._settings, self._num_steps = target, optimizer, num_steps
        self.params: Mapping[str, Tensor] = {
            spec.name: torch.zeros(spec.shape, dtype=self.dtype, device=self.device)
            for spec in self.specs
        }
        trained = {name: p for name, p in self.params.items() if name != EMBEDDING}
        same = self.dtype == torch.float32
        self._masters = {name: p if same else p.float() for name, p in trained.items()}
        self._grads = {
            name: torch.zeros_like(m, dtype=torch.float32) for name, m in self._masters.items()
        }
        # The matrices' gradients go to _grads unrounded, the vectors' to their fp32 leaves.
        self._vectors = {n: m.requires_grad_() for n, m in self._masters.items() if m.dim() == 1}
        matrices = {n: p.requires_grad_() for n, p in trained.items() if n not in self._vectors}
        embedding = self.params.get(EMBEDDING, target_embedding).detach()
        self._draft = DraftDecoder(
            config,
            matrices | self._vectors,
            embedding,
            ALONE if config.owns_embedding else target.ranks,
            main_grads={name: self._grads[name] for name in matrices},
        )
        self._adam = MasterAdamW(self._masters, optimizer)
        self._token_ids = vocabulary.token_ids.to(self.device)
        positions = config.max_position + max(self.ttt.passes, self.ttt.eval_passes)
        self._rope_table = config.rope_table(positions, self.device)
        self._totals = TttTotals.zeros(self.ttt.passes, self.device)
        self._asked = 0  # rows of the last step or evaluation

    @torch.no_grad()
    def fill(self, load: Callable[[Mapping[str, Tensor]], object]) -> None:
        """Let `load` fill the parameters in place; the masters are theirs, the optimizer's anew."""
        load(self.params)
        for name, master in self._masters.items():
            master.copy_(self.params[name])
        self._adam.reset()
        self.step = 0

    def train_step(
        self, batches: Iterable[DraftBatch], poll: Callable[[], object] = lambda: None
    ) -> DraftStats:
        """One optimizer step on this rank's micro-batches; `poll` is called before each of them.

        Raises NonFiniteError, and writes nothing, for a loss or gradient that is NaN or infinite,
        and ValueError for micro-batches of other streams or without a row that counts.
        """
        self.begin_step()
        for data in batches:
            poll()
            self.take(data)
        if (stats := self.end_step()) is None:
            raise _no_row(self._asked, self.vocabulary)
        return stats

    def begin_step(self) -> None:
        """Begin an optimizer step; what an earlier one took in that has not ended is forgotten."""
        for name, grad in self._grads.items():
            grad.zero_()
            self._masters[name].grad = None  # of a step that was broken off
        self._totals = TttTotals.zeros(self.ttt.passes, self.device)

    def take(self, data: DraftBatch) -> None:
        """Add a micro-batch's gradients to those of the step; ValueError for other streams."""
        totals, finals = self._totals, self.unroll(data, self.ttt.passes)
        output_grad = self._grads[OUTPUT][: self.config.draft_vocab_size]
        grads = loss_gradients(
            self._draft, finals, data, self._target, self._token_ids, self.ttt, output_grad, totals
        )
        torch.autograd.backward(finals, grads)
        for name, vector in self._vectors.items():
            assert vector.grad is not None, name
            self._grads[name] += vector.grad
            vector.grad = None

    def end_step(self) -> DraftStats | None:
        """End the step on what all ranks have taken; without a row that counts none is made: None.

        Raises NonFiniteError, and writes nothing, for a loss or gradient that is NaN or infinite.
        """
        stats = self._stats(self._totals)
        if stats is None:
            return None
        grads = {name: self._summed(grad) for name, grad in self._grads.items()}
        for grad in grads.values():
            grad /= stats.num_rows
        norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()])
        norm = float(torch.linalg.vector_norm(norms))
        if not torch.isfinite(torch.tensor([norm, stats.loss])).all():
            raise NonFiniteError(
                f"the draft: loss {stats.loss} and gradient norm {norm} at its step "
                f"{self.step + 1}; its weights are unchanged"
            )
        limit = self._settings.clip_grad
        if 0 < limit < norm:
            for grad in grads.values():
                grad *= limit / norm
        lr = learning_rate(self._settings, self.step, self._num_steps)
        self._adam.step(grads, lr)
        self._publish()
        self.step += 1
        return replace(stats, grad_norm=norm, learning_rate=lr)

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[DraftBatch], temperature: float = 0.0, seed: int = 0
    ) -> DraftStats:
        """The same measures of ttt.eval_passes passes without a step, and the accept length: tokens
        that a step would have yielded in an engine with as many guesses which drew the samples at
        this temperature, by this seed. A last token that there is no room to guess for is a step,
        too, which Engine.accept_lengths leaves out. All ranks call it."""
        totals = TttTotals.zeros(self.ttt.eval_passes, self.device)
        for data in batches:
            finals = self.unroll(data, self.ttt.eval_passes)
            loss_gradients(
                self._draft, finals, data, self._target, self._token_ids, self.ttt, None, totals
            )
            batch = data.batch
            drafted = self.choices(finals, batch, temperature, seed).cpu().numpy()
            ids, rows = (x.cpu().numpy() for x in (batch.input_ids, batch.rows))
            lengths = accept_lengths(drafted, ids, rows, batch.seq_lens)
            totals.accepted[0] += sum(lengths)
            totals.accepted[1] += len(lengths)
        if (stats := self._stats(totals)) is None:
            raise _no_row(self._asked, self.vocabulary)
        return stats

    def unroll(self, data: DraftBatch, passes: int) -> list[Tensor]:
        """The states [T, D] that give each pass's logits (ttt.unroll); no more passes than
        ttt.passes or ttt.eval_passes says."""
        data.require(self.config, self._target.num_layers)
        return unroll(self._draft, data, passes, self._rope_table)

    @torch.no_grad()
    def choices(
        self, finals: Sequence[Tensor], batch: MicroBatch, temperature: float = 0.0, seed: int = 0
    ) -> Tensor:
        """[passes, T] int64: the target's id of each pass's choice in every column.

        A column's choice in pass i is for the token i + 2 places on. At a temperature it is made by
        the noise that this token was drawn with (docs/contract.md), as an engine's draft does.
        """
        lens = torch.tensor(batch.seq_lens, device=self.device)
        ids = torch.tensor([signed64(s.sample_id) for s in batch.samples], device=self.device)
        sample_ids = ids.repeat_interleave(lens)
        seeds = torch.full_like(sample_ids, signed64(seed))
        greedy = torch.full_like(sample_ids, temperature == 0, dtype=torch.bool)
        divisors = torch.full_like(sample_ids, temperature or 1.0, dtype=torch.float32)
        rows = max(1, (1 << 22) // self.config.vocab_size)
        chosen = []
        for i, final in enumerate(finals):
            told = divisors, seeds, batch.positions + 2 + i, sample_ids, greedy
            for part, *own in zip(*(x.split(rows) for x in (final, *told)), strict=True):
                chosen.append(self._draft.choose(part, self._token_ids, *own))
        return torch.cat(chosen).view(len(finals), -1)

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from, to the same bytes; `params` are what is served."""
        params = {name: p.detach() for name, p in self.params.items()}
        return {
            "step": self.step,
            "params": params,
            "optimizer": self._adam.state_dict(),
            "vocabulary": self.vocabulary.token_ids,
        }

    def digest(self) -> str:
        """The weights digest of the parameters, under the names of the sglang dialect."""
        return weights_digest(self.specs, self.params)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict; ValueError for another draft's."""
        if not torch.equal(state["vocabulary"], self.vocabulary.token_ids):
            raise ValueError("the state is another draft's: its vocabulary holds other tokens")
        self._adam.load_state_dict(state["optimizer"])
        if EMBEDDING in self.params:
            self.params[EMBEDDING].copy_(state["params"][EMBEDDING])
        self._publish()
        self.step = state["step"]

    @torch.no_grad()
    def _publish(self) -> None:
        """Round the masters into the parameters."""
        for name, master in self._masters.items():
            if self.params[name] is not master:
                self.params[name].copy_(master)

    def _summed(self, grad: Tensor) -> Tensor:
        """Over the data parallel ranks, in rank order."""
        if self.ranks.size == 1:
            return grad
        return reduce_ref(list(gather_rows(grad, self.ranks).chunk(self.ranks.size)), torch.float32)

    def _stats(self, totals: TttTotals) -> DraftStats | None:
        """Of all ranks' rows; None if none counts."""
        own = [x.tolist() for x in totals.tensors()]
        each = gather_objects(own, self.ranks.group) if self.ranks.size > 1 else [own]
        rows, loss, matches, acceptance, entropy, asked, accepted = (
            torch.tensor(parts, dtype=torch.float64).sum(0) for parts in zip(*each, strict=True)
        )
        self._asked = int(asked)
        if not rows[0]:
            return None
        decay = self.ttt.loss_decay ** torch.arange(len(loss), dtype=torch.float64)
        metrics = {
            "vocabulary_share": float(rows[0] / asked[0]),
            "entropy": float(entropy[0] / rows[0]),
        }
        if accepted[1]:
            metrics["accept_length"] = float(accepted[0] / accepted[1])
        per_pass = {"loss": loss, "match": matches, "acceptance": acceptance}
        for name, sums in per_pass.items():
            means = (sums / rows.clamp(min=1)).tolist()
            metrics |= {f"{name}_{i}": mean for i, mean in enumerate(means)}
        return DraftStats(
            loss=float((loss * decay).sum() / rows[0]), num_rows=int(rows[0]), metrics=metrics
        )


def _no_row(asked: int, vocabulary: DraftVocabulary) -> ValueError:
    return ValueError(
        f"none of {asked} rows counts: what the target would say is not in the draft vocabulary of "
        f"{len(vocabulary)} tokens, or no sample has three tokens"
    )
