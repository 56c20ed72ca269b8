"""Optimizer steps with gradient segments on one GPU and on several: the same weights, at what cost.

    python tests/programs/elastic.py OUT.json [device=cuda] [model=FOLDER] [copies=1,2] [segments=4]
        [steps=4] [samples=64] [max_len=2048] [micro_batch_tokens=8192] [seed=0]

Each case is a trainer of so many processes in processes of its own, on random weights of the
model's shape (a Hugging Face folder of which config.json is read; Qwen3-0.6B's by default). It
takes GRPO steps with a reference on made-up samples of uneven lengths, which carry the log-probs of
the first weights, and clips. With segments every number of copies must come to the same digest, the
same norm and the same loss after every step; of optimizers that are whole and split over the copies
each by itself, and whether the two agree is written down. Cases without segments are there for the
time of a step, of which the first, that warms up, is left out. Exit code 1 if a case fails, trains
nothing, a log-prob differs or digests do.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from samebit.recipes.bench.timing import timed
from samebit.recipes.launch.processes import launch
from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_dummy
from samebit.trainer.algorithms.grpo import Grpo
from samebit.trainer.config import GrpoConfig, OptimizerConfig, ParallelConfig
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.packing import pack_samples
from samebit.trainer.types import MicroBatch, Sample
from samebit.weight_sync.objects import gather_objects

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "device": "cuda",
    "model": str(ROOT / "recipes/bench/shapes/qwen3-0.6b"),
    "copies": "1,2",
    "segments": "4",
    "steps": "4",
    "samples": "64",
    "max_len": "2048",
    "micro_batch_tokens": "8192",
    "seed": "0",
}


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Options over their defaults."""
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise ValueError(f"'{unknown[0]}' is none of {', '.join(OPTIONS)}")
    return OPTIONS | given


def cases(options: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Every number of copies without segments and with, there with either optimizer."""
    segments = int(options["segments"])
    for copies in map(int, options["copies"].split(",")):
        yield {"copies": copies, "segments": 0, "split": False}
        for split in (False, True):
            yield {"copies": copies, "segments": segments, "split": split}


def make_samples(options: Mapping[str, str], vocab_size: int) -> list[Sample]:
    """Random tokens of random lengths: the same in every process."""
    generator = torch.Generator().manual_seed(int(options["seed"]))
    count, longest = int(options["samples"]), int(options["max_len"])
    lens = torch.randint(max(4, longest // 8), longest + 1, (count,), generator=generator).tolist()
    advantages = torch.randn(count, generator=generator).tolist()
    return [
        Sample.of_response(
            sample_id=i,
            token_ids=torch.randint(vocab_size, (length,), generator=generator).tolist(),
            prompt_len=max(1, length // 8),
            advantage=advantages[i],
        )
        for i, length in enumerate(lens)
    ]


def own_batches(
    trainer: MegatronTrainer, samples: list[Sample], options: Mapping[str, str]
) -> list[MicroBatch]:
    """Those of this process's copy of the model."""
    segments = trainer.grad_segments
    packed = pack_samples(
        samples,
        int(options["micro_batch_tokens"]),
        device=trainer.device,
        at_least=1 if segments else trainer.parallel.data,
        num_segments=segments or 1,
    )
    return trainer.own_batches(packed)


def with_logprobs(
    trainer: MegatronTrainer, samples: list[Sample], options: Mapping[str, str]
) -> list[Sample]:
    """The samples with the log-probs of the present weights, each computed by one rank."""
    own, found = own_batches(trainer, samples, options), dict[int, list[float]]()
    for batch, values in zip(own, trainer.logprobs(own), strict=True):
        parts = values.split(batch.row_counts.tolist())
        found |= {s.sample_id: x.tolist() for s, x in zip(batch.samples, parts, strict=True)}
    logprobs = {key: x for rank in gather_objects(found) for key, x in rank.items()}
    return [sample.with_logprobs(logprobs[sample.sample_id]) for sample in samples]


def measure(case: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """In one of a case's processes: the steps."""
    device, segments = resolve_device(options["device"]), case["segments"]
    torch.set_num_threads(1)  # of a CPU, on which bits depend on it
    model = load_model_config(options["model"])
    trainer = MegatronTrainer(
        model,
        OptimizerConfig(lr=1e-4, clip_grad=1e-3),
        1000,
        device,
        ParallelConfig(data=case["copies"], distributed_optimizer=case["split"]),
        grad_segments=segments,
    )
    trainer.fill(lambda specs, params: load_dummy(specs, params, int(options["seed"])))
    trainer.freeze_reference()
    samples = with_logprobs(trainer, make_samples(options, model.vocab_size), options)
    batches = own_batches(trainer, samples, options)
    algorithm, steps, seconds = Grpo(GrpoConfig(kl_coef=0.1)), list[list[Any]](), list[float]()
    first = trainer.digest()
    for _ in range(int(options["steps"])):
        gather_objects(None)  # begin together
        stats, taken = timed(lambda: trainer.train_step(batches, algorithm), device)
        steps.append([trainer.digest(), stats.grad_norm.hex(), stats.loss.hex()])
        seconds.append(taken)
        if len(steps) == 1:
            compared, unequal = stats.logprob_tokens_compared, stats.logprob_mismatches
    found = {
        "initial_digest": first,
        "steps": steps,
        "logprob_tokens_compared": compared,
        "logprob_mismatches": unequal,
        "seconds": seconds,
        "step_s": statistics.median(seconds[1:] or seconds),
        "micro_batches_of_rank_0": len(batches),
    }
    if device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def run_case(case: dict[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    """Start its processes, one of them as a command without a launcher; what the first found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        told = [json.dumps(case), json.dumps(dict(options)), str(out)]
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--case", *told]
        if case["copies"] == 1:
            code = subprocess.run(command).returncode
        else:
            size = SimpleNamespace(num_processes=case["copies"], device=options["device"])
            code = launch(command, size)
        return case | (
            json.loads(out.read_text()) if code == 0 else {"failed": f"exit code {code}"}
        )


def problems(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against the promise, in a line each."""
    said, expected = [], dict[bool, tuple[str, Any]]()
    for case in found:
        name = f"{case['copies']} copies, {case['segments']} segments, split {case['split']}"
        if failed := case.get("failed"):
            said.append(f"{name}: {failed}")
            continue
        if case["logprob_mismatches"] or not case["logprob_tokens_compared"]:
            counts = case["logprob_mismatches"], case["logprob_tokens_compared"]
            said.append(f"{name}: {counts[0]} of {counts[1]} log-probs differ")
        digests = [case["initial_digest"], *(step[0] for step in case["steps"])]
        if len(set(digests)) < len(digests):
            said.append(f"{name}: a step trained nothing")
        if case["segments"]:
            other, steps = expected.setdefault(case["split"], (name, case["steps"]))
            if case["steps"] != steps:
                said.append(f"{name}: its steps are not those of {other}")
    return said if found else ["no case was run"]


def optimizers_agree(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a whole optimizer and a split one come to the same steps with segments."""
    steps = [case["steps"] for case in found if case["segments"] and "steps" in case]
    return all(each == steps[0] for each in steps)


def costs(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The time of a step with segments over that without, by copies and optimizer."""
    done = [case for case in found if "failed" not in case]
    plain = {case["copies"]: case["step_s"] for case in done if not case["segments"]}
    return {
        f"{case['copies']} copies, {'split' if case['split'] else 'whole'} optimizer": round(
            case["step_s"] / plain[case["copies"]], 4
        )
        for case in done
        if case["segments"] and case["copies"] in plain
    }


def main(out: str, *arguments: str) -> int:
    """Run every case, write the report."""
    if out == "--case":
        case, options, file = arguments
        found = measure(json.loads(case), json.loads(options))
        if os.environ.get("RANK", "0") == "0":
            Path(file).write_text(json.dumps(found))
        return 0
    chosen = parse(arguments)
    results = list[dict[str, Any]]()
    for case in cases(chosen):
        results.append(run_case(case, chosen))
        print(json.dumps({k: v for k, v in results[-1].items() if k != "steps"}), flush=True)
    against = problems(results)
    report = {
        "weights": "random, made on the spot",
        **{key: value for key, value in chosen.items() if key != "model"},
        "shape": Path(chosen["model"]).name,
        "problems": against,
        "optimizers_agree": optimizers_agree(results),
        "step_time_over_none": costs(results),
        "cases": results,
    }
    write_result(Path(out), resolve_device(chosen["device"]), report, ["python", *sys.argv])
    print(json.dumps(report["step_time_over_none"]))
    for line in against:
        print(f"elastic: {line}", file=sys.stderr)
    return 1 if against else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
