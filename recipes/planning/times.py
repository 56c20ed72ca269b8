"""How long the phases of a training step take, by measured shares of the hardware's rates.

Every sample counts with its most tokens. Rewards, evaluation and checkpoints take no time here.
"""

import math
from dataclasses import dataclass

from samebit.recipes.bench.config import Workload
from samebit.recipes.bench.roofline import roofline_bounds
from samebit.recipes.bench.timing import CardRates
from samebit.recipes.plan_config import PlanRun
from samebit.recipes.planning.layout import Layout
from samebit.recipes.planning.measured import Measured
from samebit.rollout.models.config import ModelConfig
from samebit.trainer.algorithms.registry import make_algorithm
from samebit.trainer.flops import train_flops


@dataclass(frozen=True)
class StepTimes:
    """Holds the seconds of a training step. mfu: as `perf/train_mfu` counts it."""

    rollout_s: float
    train_s: float
    sync_s: float | None
    rollout_tokens_s: float
    mfu: float

    @property
    def step_s(self) -> float:
        """All phases, one after another."""
        return self.rollout_s + self.train_s + (self.sync_s or 0.0)


@dataclass(frozen=True)
class StepModel:
    """Computes the times of a run's phases on a cluster."""

    run: PlanRun
    model: ModelConfig
    layout: Layout
    measured: Measured

    def times(self, kv_tokens: int, sync_s: float | None) -> StepTimes:
        """Of a step whose engines have a KV cache of so many tokens."""
        run, layout = self.run, self.layout
        rollout_s, train_s = self.rollout_s(kv_tokens), self.train_s()
        drawn = run.samples_per_step * run.rollout.max_new_tokens
        flops = train_flops(self.model, [run.rollout.longest]) * run.samples_per_step
        mfu = flops / train_s / (layout.parallel.num_processes * layout.cluster.gpu.flops_s)
        return StepTimes(rollout_s, train_s, sync_s, drawn / rollout_s, mfu)

    def at_once(self, kv_tokens: int) -> int:
        """Samples that an engine draws at a time; a group's prompt is kept once."""
        rollout = self.run.rollout
        each = rollout.max_new_tokens + math.ceil(
            rollout.max_prompt_len / rollout.samples_per_prompt
        )
        return max(1, min(self.run.engine.max_num_seqs, kv_tokens // each))

    def rollout_s(self, kv_tokens: int) -> float:
        """Of the engine with the most prompts: as many turns as its samples do not fit at once."""
        rollout, layout, own = self.run.rollout, self.layout, self.measured.rollout
        prompts = math.ceil(rollout.prompts_per_step / layout.num_engines)
        n, at_once = rollout.samples_per_prompt, self.at_once(kv_tokens)
        turns = math.ceil(prompts * n / at_once)
        workload = Workload(
            math.ceil(prompts / turns),
            n if prompts >= turns else math.ceil(prompts * n / turns),
            *(rollout.max_prompt_len, rollout.max_new_tokens),
        )
        gpu, tensor = layout.cluster.gpu, layout.parallel.tensor
        rates = CardRates(gpu.hbm_bytes_s * tensor, gpu.flops_s * tensor)
        bounds = roofline_bounds(self.model, workload, rates)
        steps = workload.output_len - 1
        sums = self.sums_s(workload.num_prompts * workload.input_len, 1)
        sums += steps * self.sums_s(workload.num_seqs, 1)
        return turns * (
            bounds.prefill_s / own.prefill
            + bounds.weights_s / own.weights
            + bounds.keys_s / own.keys
            + steps * own.step_s
            + sums
        )

    def sums_s(self, tokens: float, directions: int) -> float:
        """Of a layer's two sums over tensor ranks, in all layers, of bf16 rows."""
        tensor, links = self.layout.parallel.tensor, self.measured.links
        if tensor == 1:
            return 0.0
        rate = links.sums * self.layout.cluster.gpu.nvlink_bytes_s
        payload = 2 * tokens * self.model.hidden_size * 2 * (tensor - 1) / tensor
        count = 2 * self.model.num_layers * directions
        return count * (links.sum_s + payload / rate)

    def train_s(self) -> float:
        """Of all optimizer steps, and of a reference's forward where the algorithm asks for it."""
        run, parallel = self.run, self.layout.parallel
        longest, gpu = run.rollout.longest, self.layout.cluster.gpu
        samples = math.ceil(run.batch_size / parallel.data)
        packed = run.trainer.micro_batch_tokens // longest
        micro_batches = math.ceil(samples / packed)
        split = parallel.tensor * parallel.context * parallel.pipeline
        tokens = samples * longest
        products = 2 * self.model.num_matmul_weights * tokens / split / gpu.flops_s
        attention = samples * self.model.attention_flops(longest) / split / gpu.flops_s
        products /= self.measured.training.products
        attention /= self.measured.training.attention
        sums = self.sums_s(tokens / parallel.context / parallel.pipeline, 2)
        compute = self._passes() * (products + attention) + sums + self._context_s(tokens)
        bubble = (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline)
        reduce_s = self.reduce_s()
        if parallel.overlap_grad_reduce:
            reduce_s = max(0.0, reduce_s - 2 / 3 * compute / micro_batches)
        return run.updates_per_step * (compute * (1 + bubble) + reduce_s)

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
        """Of keys and values, and their gradients, that context ranks gather in every layer."""
        p, layout = self.layout.parallel, self.layout
        if p.context == 1:
            return 0.0
        kv = self.model.kv_layout
        width = 2 * kv.num_heads // p.tensor * kv.head_dim * 2
        sent = 2 * tokens * width * kv.num_layers / p.pipeline * (p.context - 1) / p.context
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
