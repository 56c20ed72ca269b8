"""How long the phases of a training step take, by measured shares of the hardware's rates.

Every sample counts with its most tokens. Rewards, evaluation and checkpoints take no time here.
With rollout.partial_tokens a step is one stint, in which as many prompts are drawn of every age as
a step begins; samples that go on compute their whole contexts anew, each by itself. With
rollout.max_staleness steps, or stints, are drawn while others are trained: ahead.py.
"""

import math
from dataclasses import dataclass

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.roofline import Bounds, roofline_bounds
from samebit.recipes.bench.timing import CardRates
from samebit.recipes.plan_config import PlanRun
from samebit.recipes.planning.ahead import Phases, seconds_of_a_step, stale_share
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import Measured, row_bytes
from samebit.recipes.rollout_config import RolloutSection
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.flops import train_flops


@dataclass(frozen=True)
class Part:
    """Says what the samples of one age draw in a stint: tokens [begun, begun + drawn) of them."""

    begun: int
    drawn: int

    @classmethod
    def all_of(cls, rollout: RolloutSection) -> "tuple[Part, ...]":
        """Return those of a sample, in the order in which it draws them; one, if it is whole."""
        most = rollout.max_new_tokens
        budget = rollout.partial_tokens or most
        return tuple(cls(begun, min(budget, most - begun)) for begun in range(0, most, budget))

    def workload(self, num_prompts: int, rollout: RolloutSection) -> Workload:
        """What the engine is asked for: a prompt is shared by the samples that begin with it."""
        n, prompt_len = rollout.samples_per_prompt, rollout.max_prompt_len
        if self.begun:
            return Workload(num_prompts * n, 1, prompt_len + self.begun, self.drawn)
        return Workload(num_prompts, n, prompt_len, self.drawn)


@dataclass(frozen=True)
class StepTimes:
    """Holds the seconds of a training step. mfu: as `perf/train_mfu` counts it.

    first_rollout_s: of the run's first step, which draws a stint for every part of a sample.
    rollout_wait_s: in which nobody trains or compares meanwhile. compare_s: of the forward pass of
    what is compared besides: parts of samples that a step leaves to later ones, or what older
    weights drew. sync_s: of updates, to each step its share.
    """

    rollout_s: float
    first_rollout_s: float
    rollout_wait_s: float
    compare_s: float
    train_s: float
    sync_s: float | None
    rollout_tokens_s: float
    mfu: float

    @property
    def step_s(self) -> float:
        """All phases, one after another."""
        return self.rollout_wait_s + self.compare_s + self.train_s + (self.sync_s or 0.0)


@dataclass(frozen=True)
class StepModel:
    """Computes the times of a run's phases on a cluster."""

    run: PlanRun
    model: ModelConfig
    layout: Layout
    measured: Measured

    @property
    def parts(self) -> tuple[Part, ...]:
        """What a step draws beside one another, each of as many samples."""
        return Part.all_of(self.run.rollout)

    def times(self, kv_tokens: int, sync_s: float | None) -> StepTimes:
        """Of a step whose engines have a KV cache of so many tokens; sync_s: of an update."""
        run, layout, rollout = self.run, self.layout, self.run.rollout
        stints_s, train_s = self.stints_s(kv_tokens), self.train_s()
        flops = train_flops(self.model, [rollout.longest]) * run.samples_per_step
        mfu = flops / train_s / (layout.parallel.num_processes * layout.cluster.gpu.flops_s)
        rollout_s, compare_s = stints_s[-1], self.compare_s()
        wait_s = rollout_s
        if rollout.max_staleness:
            own = Phases(rollout_s, self.compare_all_s(), train_s, sync_s or 0.0, compare_s)
            share = stale_share(rollout)
            compare_s = share * own.compare_s + (1 - share) * own.left_s
            sync_s = None if sync_s is None else sync_s / rollout.weight_sync_steps
            others_s = compare_s + train_s + (sync_s or 0.0)
            wait_s = max(0.0, seconds_of_a_step(rollout, own) - others_s)
        tokens_s = run.samples_per_step * rollout.max_new_tokens / rollout_s
        phases = rollout_s, sum(stints_s), wait_s, compare_s, train_s, sync_s
        return StepTimes(*phases, tokens_s, mfu)

    def at_once(self, kv_tokens: int) -> int:
        """Samples that an engine draws at a time; a group's prompt is kept once while it begins."""
        rollout, parts = self.run.rollout, self.parts
        kept = [
            part.begun
            + part.drawn
            + math.ceil(rollout.max_prompt_len / (1 if part.begun else rollout.samples_per_prompt))
            for part in parts
        ]
        each = math.ceil(sum(kept) / len(kept))
        return max(1, min(self.run.engine.max_num_seqs, kv_tokens // each))

    def rollout_s(self, kv_tokens: int) -> float:
        """Of the engine with the most prompts, in turns where not all samples fit at once."""
        return self.stints_s(kv_tokens)[-1]

    def stints_s(self, kv_tokens: int) -> list[float]:
        """Of every stint of the run's first step; the last is that of every later step, too."""
        rollout, own, parts = self.run.rollout, self.measured.rollout, self.parts
        prompts = math.ceil(rollout.prompts_per_step / self.layout.num_engines)
        samples, at_once = prompts * rollout.samples_per_prompt, self.at_once(kv_tokens)
        contexts_s, found, tensor = 0.0, list[float](), self.layout.engine_tensor
        for ages, part in enumerate(parts, 1):
            workload = part.workload(prompts, rollout)
            bounds = self._bounds(workload)
            contexts_s += bounds.prefill_s / own.prefill + bounds.keys_s / own.keys
            contexts_s += self.sums_s(workload.num_prompts * workload.input_len, 1, tensor)
            turns, decode_s = math.ceil(samples * ages / at_once), 0.0
            # The newest draw as the oldest do, but for the last part of a sample, which is short.
            for steps, drawing in ((part.drawn - 1, ages), (parts[0].drawn - part.drawn, ages - 1)):
                seqs = math.ceil(samples * drawing / turns)
                bounds = self._bounds(Workload(seqs, 1, 1, steps + 1))
                rows_s = seqs * row_bytes(self.model) / self._rates.memory_bytes_s / own.rows
                each_s = own.step_s + rows_s + self.sums_s(seqs, 1, tensor)
                decode_s += bounds.weights_s / own.weights + steps * each_s
            found.append(contexts_s + turns * decode_s)
        return found

    @property
    def _rates(self) -> CardRates:
        """Of the GPUs of an engine together."""
        gpu, tensor = self.layout.cluster.gpu, self.layout.engine_tensor
        return CardRates(gpu.hbm_bytes_s * tensor, gpu.flops_s * tensor)

    def _bounds(self, workload: Workload) -> Bounds:
        return roofline_bounds(self.model, workload, self._rates)

    def sums_s(self, tokens: float, directions: int, tensor: int) -> float:
        """Of a layer's two sums over so many tensor ranks, in all layers, of bf16 rows."""
        links = self.measured.links
        if tensor == 1:
            return 0.0
        rate = links.sums * self.layout.cluster.gpu.nvlink_bytes_s
        payload = 2 * tokens * self.model.hidden_size * 2 * (tensor - 1) / tensor
        count = 2 * self.model.num_layers * directions
        return count * (links.sum_s + payload / rate)

    def train_s(self) -> float:
        """Of all optimizer steps, and of a reference's forward where the algorithm asks for it."""
        run, parallel = self.run, self.layout.parallel
        longest, samples = run.rollout.longest, math.ceil(run.batch_size / parallel.data)
        tokens, bubble = samples * longest, self._bubble(samples, longest)
        sums = self.sums_s(tokens / parallel.context / parallel.pipeline, 2, parallel.tensor)
        compute = self._passes() * self._forward_s(samples, longest) + sums
        compute += 2 * self._context_s(tokens)
        reduce_s = self.reduce_s()
        if parallel.overlap_grad_reduce:
            last = compute / self._micro_batches(samples, longest)
            reduce_s = max(0.0, reduce_s - 2 / 3 * last)
        return run.updates_per_step * (compute * (1 + bubble) + reduce_s)

    def compare_s(self) -> float:
        """Of one forward pass of all parts but the last, which a step leaves to later ones."""
        return sum(map(self._compare_s, self.parts[:-1]))

    def compare_all_s(self) -> float:
        """Of one forward pass of all that a step has drawn, by the weights that drew it."""
        return sum(map(self._compare_s, self.parts))

    def _compare_s(self, part: Part) -> float:
        """Of samples that end with this part of them."""
        if not self.run.rollout.check_stale:
            return 0.0
        parallel = self.layout.parallel
        length = self.run.rollout.max_prompt_len + part.begun + part.drawn
        samples = math.ceil(self.run.samples_per_step / parallel.data)
        tokens = samples * length
        sums = self.sums_s(tokens / parallel.context / parallel.pipeline, 1, parallel.tensor)
        compute = self._forward_s(samples, length) + sums + self._context_s(tokens)
        return compute * (1 + self._bubble(samples, length))

    def _forward_s(self, samples: int, length: int) -> float:
        """Of a data rank's products and attention over samples of equal length."""
        gpu, parallel = self.layout.cluster.gpu, self.layout.parallel
        split = parallel.tensor * parallel.context * parallel.pipeline
        products = 2 * self.model.num_matmul_weights * samples * length / split / gpu.flops_s
        attention = samples * self.model.attention_flops(length) / split / gpu.flops_s
        own = self.measured.training
        return products / own.products + attention / own.attention

    def _micro_batches(self, samples: int, length: int) -> int:
        return math.ceil(samples / (self.run.trainer.micro_batch_tokens // length))

    def _bubble(self, samples: int, length: int) -> float:
        """Of the time that stages compute, the share that they wait for each other besides."""
        parallel = self.layout.parallel
        turns = self._micro_batches(samples, length) * parallel.virtual_pipeline
        return (parallel.pipeline - 1) / turns

    def _passes(self) -> float:
        """Forward passes that a step is worth: a backward is two."""
        refers = make_algorithm(self.run.algorithm).has_reference
        products = self.model.layer_products
        again = {"none": 0.0, "full": 1.0, "selective": 0.0}[self.run.trainer.parallel.recompute]
        if self.run.trainer.parallel.recompute == "selective":
            mlp = sum(products[name].n * products[name].k for name in ("gate_up", "down"))
            again = mlp / sum(product.n * product.k for product in products.values())
        return 3.0 + again + refers

    def _context_s(self, tokens: float) -> float:
        """Of keys and values that context ranks gather in every layer; their gradients take as
        long again."""
        p, layout = self.layout.parallel, self.layout
        if p.context == 1:
            return 0.0
        kv = self.model.kv_layout
        width = 2 * kv.num_heads // p.tensor * kv.head_dim * 2
        sent = tokens * width * kv.num_layers / p.pipeline * (p.context - 1) / p.context
        return sent / self._link(layout.spans_nodes(p.tensor, p.context))

    def reduce_s(self) -> float:
        """Of the sum of a stage's fp32 gradients over the copies, as a ring.

        Where these share the optimizer each gets its part of the sums, then all bf16 weights.
        """
        p, layout = self.layout.parallel, self.layout
        copies = p.data * p.context
        elements = sum(math.prod(s.shape) for s in self.model.param_specs((0, p.tensor)))
        each = 4 + (2 if p.distributed_optimizer else 4)
        sent = (copies - 1) / copies * each * elements / p.pipeline
        return sent / self._link(layout.spans_nodes(p.tensor, copies))

    def _link(self, across_nodes: bool) -> float:
        cluster = self.layout.cluster
        rate = cluster.network_bytes_s if across_nodes else cluster.gpu.nvlink_bytes_s
        return rate * self.measured.links.transfer
