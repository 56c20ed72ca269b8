"""samebit bench draft: optimizer steps of a draft on random streams of a target's shape.

What the target does, whose streams a run has anyway (online) or computes (offline), is no part of
it. Memory is told three times: all that torch allocated at most; how much of it lies above the
weights, which are the draft's and the target's head and embedding; and how much above all that
stays between steps, to which the draft's masters, gradients and moments belong, too.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from samebit.kernels.profile import numerics_profile
from samebit.recipes.bench.config import BenchDraftRun, Pack
from samebit.recipes.bench.output import REPORT_FILE, format_table, model_fields
from samebit.recipes.bench.timing import Spread, free_memory, timed
from samebit.recipes.bench.trainer import peak_words
from samebit.recipes.config import ConfigError
from samebit.recipes.launch.draft import USUAL_VOCABULARY, make_trainer_of, require_dense
from samebit.recipes.run.folder import require_own_report
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device
from samebit.rollout.models.decoder import EMBEDDING, FINAL_NORM, OUTPUT, DenseModel
from samebit.rollout.models.draft.config import DraftConfig
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_dummy
from samebit.trainer.config import OptimizerConfig
from samebit.trainer.draft.batch import DraftBatch
from samebit.trainer.draft.trainer import DraftTrainer
from samebit.trainer.flops import peak_flops
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import Sample

_GIB = 2**30


def draft_of(run: BenchDraftRun, target: DenseModel) -> DraftConfig:
    """A new draft of the target; ValueError for what does not fit the target."""
    size = run.draft_vocab_size or min(USUAL_VOCABULARY, target.vocab_size)
    if size > target.vocab_size:
        raise ConfigError(f"draft_vocab_size is {size}; the target has {target.vocab_size} tokens")
    for pack in map(Pack.parse, run.packs):
        target.require_context(pack.seq_len, f"packs: {pack}")
    layers = None if run.draft_layers is None else tuple(run.draft_layers)
    try:
        return DraftConfig.of_target(target, size, layers)
    except ValueError as error:
        raise ConfigError(f"draft_layers: {error}") from error


def target_weights(
    run: BenchDraftRun, target: DenseModel, device: torch.device
) -> dict[str, Tensor]:
    """What a draft's training reads of its target: a random embedding, final norm and output layer,
    by engine names."""
    specs = [s for s in target.param_specs() if s.name in (EMBEDDING, FINAL_NORM, OUTPUT)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {spec.name: torch.empty(spec.shape, dtype=dtype, device=device) for spec in specs}
    load_dummy(specs, weights, run.seed)
    return weights


def make_trainer(
    run: BenchDraftRun, target: DenseModel, config: DraftConfig, weights: Mapping[str, Tensor]
) -> DraftTrainer:
    """A trainer of a new draft, whose target has these weights."""
    vocabulary = DraftVocabulary(torch.arange(config.draft_vocab_size), target.vocab_size)
    return make_trainer_of(
        *(target, weights, None, config, vocabulary),
        optimizer=OptimizerConfig(),
        num_steps=1000,
        ttt=run.ttt,
        seed=run.seed,
    )


def make_batch(
    pack: Pack, target: DenseModel, config: DraftConfig, like: Tensor, seed: int
) -> DraftBatch:
    """A micro-batch of random samples, an eighth of each its prompt, and of random streams with the
    dtype and on the device of `like`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(target.vocab_size, (pack.num_seqs, pack.seq_len), generator=generator)
    samples = [
        Sample.of_response(sample_id=i, token_ids=tuple(row), prompt_len=max(1, pack.seq_len // 8))
        for i, row in enumerate(ids.tolist())
    ]
    [batch] = pack_samples(samples, pack.num_tokens, device=like.device)
    noise = torch.Generator(like.device).manual_seed(seed)
    streams: Mapping[int, Tensor] = {
        layer: torch.randn(
            (batch.num_tokens, target.hidden_size),
            dtype=like.dtype,
            device=like.device,
            generator=noise,
        )
        for layer in sorted({*config.captured_layers, target.num_layers})
    }
    return DraftBatch(batch=batch, streams=streams)


def step_flops(config: DraftConfig, data: DraftBatch, passes: int) -> int:
    """Of one step: products forward and backward, but for gradients of streams; the target's head
    forward; causal attention in each pass."""
    D, Dh, Vd = config.hidden_size, config.head_dim, config.draft_vocab_size
    tokens, rows = data.num_tokens, len(data.batch.rows)
    heads = config.num_heads + 2 * config.num_kv_heads
    layer = 2 * D * heads * Dh + config.num_heads * Dh * D + 3 * D * config.ffn_size
    attention = sum(2 * config.num_heads * Dh * n**2 for n in data.batch.seq_lens)
    fused = 4 * tokens * config.num_features * D
    head = 2 * rows * config.target_hidden_size * config.vocab_size
    return fused + head + passes * (6 * tokens * layer + 6 * rows * D * Vd + 3 * attention)


def measure(
    trainer: DraftTrainer, data: DraftBatch, run: BenchDraftRun, weights_bytes: int
) -> dict[str, Any]:
    """Whole optimizer steps of one micro-batch each, after one that warms up."""
    device, repeats = trainer.device, range(run.repeats)
    trainer.train_step([data])
    free_memory(device)
    found: dict[str, Any] = {"rows": len(data.batch.rows)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        stays = torch.cuda.memory_allocated(device)
    seconds = Spread.of([timed(lambda: trainer.train_step([data]), device)[1] for _ in repeats])
    found |= {"step_s": asdict(seconds), "tokens_s": data.num_tokens / seconds.median}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        streams = sum(stream.nbytes for stream in data.streams.values())
        found["peak_memory_gib"] = peak / _GIB
        found["above_weights_gib"] = (peak - weights_bytes) / _GIB
        found["above_state_gib"] = (peak - stays + streams) / _GIB
    if rate := peak_flops(device):
        flops = step_flops(trainer.config, data, trainer.ttt.passes)
        found["mfu"] = flops / seconds.median / rate
    return found


def summary(packs: dict[str, Any], peak: str) -> str:
    """The table and what its columns mean."""
    names = ("tok/s", "step s", "min", "max", "MFU")
    rows = [["pack", *names, "peak GiB", "above weights", "above state"]]
    for pack, found in packs.items():
        step = found["step_s"]
        rows.append(
            [
                pack,
                f"{found['tokens_s']:,.0f}",
                *(f"{step[k]:.3f}" for k in ("median", "min", "max")),
                f"{found['mfu']:.1%}" if "mfu" in found else "-",
                *(
                    f"{found[key]:.2f}" if key in found else "-"
                    for key in ("peak_memory_gib", "above_weights_gib", "above_state_gib")
                ),
            ]
        )
    return (
        f"{format_table(rows)}\nMFU: of the card's peak ({peak}). peak GiB: what torch allocated; "
        "above weights: of that all but the draft and the target's head and embedding; above "
        "state: the streams and what a step makes, without masters, gradients and moments."
    )


def main(run: BenchDraftRun) -> int:
    """The command `samebit bench draft`."""
    require_own_report(run.run_dir / REPORT_FILE)
    device = resolve_device(run.device)
    target = require_dense(load_model_config(run.model, run.model_family))
    config = draft_of(run, target)
    weights = target_weights(run, target, device)
    trainer = make_trainer(run, target, config, weights)
    weights_bytes = sum(x.nbytes for x in (*trainer.params.values(), *weights.values()))
    packs: dict[str, Any] = {}
    peak = peak_words(device)
    report = {
        **model_fields(run.model),
        "numerics": asdict(numerics_profile(device)),
        "draft": {"vocab_size": config.draft_vocab_size, "layers": list(config.captured_layers)},
        "ttt": asdict(run.ttt),
        "mfu_peak": peak,
        "weights_gib": weights_bytes / _GIB,
        "packs": packs,
    }
    for pack in map(Pack.parse, run.packs):
        data = make_batch(pack, target, config, next(iter(trainer.params.values())), run.seed)
        packs[str(pack)] = measure(trainer, data, run, weights_bytes)
        del data
        write_result(run.run_dir / REPORT_FILE, device, report)
    print(summary(packs, peak))
    print(f"{run.run_dir / REPORT_FILE} holds the report.")
    return 0
