"""samebit bench trainer: GRPO optimizer steps on random weights and samples: tokens/s, MFU, memory.

The forward is also timed by itself, with our operations and with torch's in their place. Samples
carry the trainer's own log-probs, so that a step is on-policy; the first one compares them, so what
is compared is the trainer's forward with gradients and the one without, and no engine's rollout.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from samebit.kernels.profile import numerics_profile
from samebit.kernels.registry import attention_kind
from samebit.recipes.bench.config import BenchTrainerRun, Pack
from samebit.recipes.bench.idle import Activity, recorded
from samebit.recipes.bench.output import REPORT_FILE, BenchError, format_table, model_fields
from samebit.recipes.bench.timing import Spread, timed
from samebit.recipes.bench.variants import torch_trainer_kernels
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import device_name, write_result
from samebit.rollout.device import DeviceError, resolve_device
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_dummy
from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.flops import PEAK_SOURCE, peak_flops, train_flops
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import MicroBatch, Sample
from samebit.weight_sync.objects import gather_objects


def make_batches(
    trainer: MegatronTrainer, pack: Pack, tokens_per_step: int, seed: int
) -> list[MicroBatch]:
    """Micro-batches of this data rank for one step, whose log-probs are the trainer's own."""
    generator = torch.Generator().manual_seed(seed)
    model, data = trainer.model, trainer.parallel.data
    count = data * -(-tokens_per_step // (pack.num_tokens * data)) * pack.num_seqs
    ids = torch.randint(model.vocab_size, (count, pack.seq_len), generator=generator).tolist()
    advantages = torch.randn(count, generator=generator).tolist()
    samples = [
        Sample.of_response(
            sample_id=i,
            token_ids=tuple(ids[i]),
            prompt_len=max(1, pack.seq_len // 8),
            advantage=advantages[i],
        )
        for i in range(count)
    ]

    def packed(samples: list[Sample]) -> list[MicroBatch]:
        batches = pack_samples(samples, pack.num_tokens, device=trainer.device, model=model)
        return trainer.own_batches(batches)

    own = packed(samples)
    found = [x.tolist() for x in trainer.logprobs(own)]
    with_logprobs = []
    for batch, values in zip(own, found, strict=True):
        rows = iter(values)
        with_logprobs += [
            s.with_logprobs([next(rows) for _ in range(s.num_trained)]) for s in batch.samples
        ]
    return pack_samples(with_logprobs, pack.num_tokens, device=trainer.device, model=model)


def _seconds(action: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Of each of `repeats` calls, after one that warms up."""
    return [timed(action, device)[1] for _ in range(repeats + 1)][1:]


def communication(activities: Iterable[Activity]) -> dict[str, float]:
    """Seconds in sums and gathers over tensor ranks and in NCCL; a rank waits there for others."""
    found = {"sums_s": 0.0, "nccl_s": 0.0}
    for start, end, name in activities:
        if name in ("_sum_kernel", "_gather_kernel"):
            found["sums_s"] += (end - start) / 1e6
        elif name.startswith("ncclDevKernel"):
            found["nccl_s"] += (end - start) / 1e6
    return found


def measure(trainer: MegatronTrainer, pack: Pack, run: BenchTrainerRun) -> dict[str, Any]:
    """Forward and whole steps of one kind of pack."""
    device = trainer.device
    batches = make_batches(trainer, pack, run.tokens_per_step, run.seed)
    num_tokens = trainer.parallel.data * sum(b.num_tokens for b in batches)
    found: dict[str, Any] = {"tokens_per_step": num_tokens, "micro_batches": len(batches)}
    forward = _seconds(lambda: trainer.logprobs(batches), run.repeats, device)
    found["forward_s"] = asdict(Spread.of(forward))
    if run.compare:
        with torch_trainer_kernels(device.type) as calls:
            theirs = _seconds(lambda: trainer.logprobs(batches), run.repeats, device)
        if not calls.count:
            raise BenchError("compare: the trainer does not use what torch's kernels replace")
        found["forward_torch_s"] = asdict(Spread.of(theirs))
    algorithm = Grpo()
    first = trainer.train_step(batches, algorithm)
    if first.logprob_mismatches or not first.logprob_tokens_compared:
        raise BenchError(
            f"{pack}: {first.logprob_mismatches} of {first.logprob_tokens_compared} log-probs "
            "differ between the forward with gradients and the one without"
        )
    found["own_logprobs_compared"] = first.logprob_tokens_compared
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _seconds(lambda: trainer.train_step(batches, algorithm), run.repeats, device)
    found["step_s"] = asdict(Spread.of(seconds))
    found["tokens_s"] = num_tokens / Spread.of(seconds).median
    if device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "cuda" and trainer.parallel.num_processes > 1:

        def step() -> None:
            gather_objects(None)  # begin together: who records first would wait in its first sum
            trainer.train_step(batches, algorithm)

        trace = run.run_dir / f"trace_{pack}_{dist.get_rank()}.json"
        _, activities = recorded(step, step, trace)
        found |= communication(activities)
    if peak := peak_flops(device):
        lens = [n for b in batches for n in b.seq_lens] * trainer.parallel.data
        per_device = train_flops(trainer.model, lens) / trainer.parallel.num_processes
        found["mfu"] = per_device / Spread.of(seconds).median / peak
    return found


def _rows(packs: dict[str, Any]) -> list[list[str]]:
    names = ("tok/s", "step s", "min", "max", "MFU", "forward s", "x torch", "peak GiB")
    rows = [["pack", *names, "sums", "NCCL"]]
    for pack, found in packs.items():
        step, forward = found["step_s"], found["forward_s"]["median"]
        theirs = found.get("forward_torch_s")
        rows.append(
            [
                pack,
                f"{found['tokens_s']:,.0f}",
                *(f"{step[k]:.3f}" for k in ("median", "min", "max")),
                f"{found['mfu']:.1%}" if "mfu" in found else "-",
                f"{forward:.3f}",
                f"{forward / theirs['median']:.3f}" if theirs else "-",
                f"{found['peak_memory_gib']:.1f}" if "peak_memory_gib" in found else "-",
                *(
                    f"{found[key] / step['median']:.1%}" if key in found else "-"
                    for key in ("sums_s", "nccl_s")
                ),
            ]
        )
    return rows


def peak_words(device: torch.device) -> str:
    """What MFU is a share of."""
    if peak := peak_flops(device):
        return f"{device_name(device)}: {peak / 1e12:.0f} TFLOP/s, {PEAK_SOURCE}"
    return f"unknown for {device_name(device)}"


def summary(packs: dict[str, Any], peak: str) -> str:
    """The table and what its columns mean."""
    compared = sum(found["own_logprobs_compared"] for found in packs.values())
    return "\n".join(
        [
            format_table(_rows(packs)),
            f"MFU: of the card's peak ({peak}). peak GiB, sums, NCCL: of the first process; what "
            "torch allocated, and the share of a step in sums over ranks and in NCCL's kernels, "
            "waiting for others included.",
            f"{compared:,} of the trainer's own log-probs compared, forward with gradients against "
            "forward without: all were equal.",
        ]
    )


def main(run: BenchTrainerRun) -> int:
    """The command `samebit bench trainer`."""
    require_own_report(run.run_dir / REPORT_FILE)
    device = resolve_device(run.device)
    if run.compare and device.type != "cuda":
        raise DeviceError("compare=true times torch's flash attention: it needs a CUDA device")
    model = load_model_config(run.model, run.model_family)
    kind, settings = attention_kind(run.numerics.attention), OptimizerConfig()
    trainer = MegatronTrainer(
        model, settings, 1000, device, run.parallel, run.tp_invariant, attention=kind
    )
    trainer.fill(lambda specs, params: load_dummy(specs, params, run.seed))
    profile = numerics_profile(device, run.parallel.tensor, run.tp_invariant, kind)
    packs: dict[str, Any] = {}
    peak = peak_words(device)
    report = {
        **model_fields(run.model),
        "parallel": asdict(run.parallel),
        "numerics": asdict(profile),
        "flops": "6 per token and weight, causal attention, nothing computed again",
        "mfu_peak": peak,
        "packs": packs,
    }
    writes = dist.get_rank() == 0
    for pack in map(Pack.parse, run.packs):
        packs[str(pack)] = measure(trainer, pack, run)
        if writes:
            write_result(run.run_dir / REPORT_FILE, device, report)
    if writes:
        print(summary(packs, peak))
        print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
