"""Weights of one layout into engines of another, shard to shard: bits, bytes and seconds.

    torchrun --nproc-per-node N tests/programs/weight_transfers.py FOLDER out.json \\
        [trainer=2x1] [engine=1] [engines=1] [at=2] [backend=nccl] [device=cuda] [updates=4] \\
        [delta=0]

trainer: tensor x pipeline ranks, the first ones, which hold random weights of the folder's shape.
engine: tensor parallel ranks of each engine; engines: how many there are; at: rank of the first of
them, which may be a trainer's too. Each update brings other weights; with delta=1 one bit in every
50th element is another, and what has changed is sent alone. The window is from
pause_generation to the first token after continue_generation, digests checked. After the last one
every engine draws what a fresh engine on those weights draws, with the CUDA graphs that it captured
before. Exit code 1 if a bit differs, or if the transfer plan's bytes are not those that the
receivers hold.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samebit.kernels.reduce import ALONE, RankGroup
from samebit.recipes.run.provenance import write_result
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_dummy
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import ParamSpec
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.transports.data_planes import make_data_plane
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.shards import Held, ShardReceiver, ShardSender

DEFAULTS = {
    "trainer": "1x1", "engine": "1", "engines": "1", "at": "1", "backend": "nccl",
    "device": "cuda", "updates": "4", "delta": "0",
}  # fmt: skip
PARAMS = SamplingParams(n=8, max_new_tokens=32, ignore_eos=True, seed=3)
FIRST = SamplingParams(max_new_tokens=1)


def stage_of(specs: list[ParamSpec], stage: int, count: int, num_layers: int) -> list[ParamSpec]:
    """Return what a stage of a pipeline holds."""

    def here(spec: ParamSpec) -> bool:
        parts = spec.name.split(".")
        if parts[1] == "layers":
            return int(parts[2]) // (num_layers // count) == stage
        return stage == (0 if parts[0] == "embedding" else count - 1)

    return [spec for spec in specs if here(spec)]


class Roles:
    """Holds what this rank is, of a trainer and of an engine."""

    def __init__(self, options: dict[str, str]) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.tensor, self.pipeline = map(int, options["trainer"].split("x"))
        self.num_trainers = self.tensor * self.pipeline
        size, first = int(options["engine"]), int(options["at"])
        every = [
            list(range(start, start + size))
            for start in range(first, first + size * int(options["engines"]), size)
        ]
        if max(self.num_trainers, every[-1][-1] + 1) != self.world:
            raise ValueError(f"{options} are not {self.world} processes")
        self.trains = self.rank < self.num_trainers
        self.trainers = dist.new_group(range(self.num_trainers))
        self.ranks: RankGroup | None = None
        for members in every:
            group = dist.new_group(members)
            if self.rank in members:
                place = members.index(self.rank)
                self.ranks = ALONE if size == 1 else RankGroup(place, size, group)


def meet(roles: Roles, options: dict[str, str], trainer: Held | None, engine: Engine | None) -> Any:
    """Make this rank's end: a ShardSender for a trainer's, else a ShardReceiver."""
    listener = loopback_listener() if roles.rank == 0 else None
    place = gather_objects(listener.getsockname() if listener else ())[0]
    address, port = place
    group = WeightGroup(address, port, roles.rank, roles.world, 120.0, listener=listener)
    receives = None if engine is None else Held(engine.specs, engine.weights)
    device = next(iter((trainer or receives).params.values())).device  # type: ignore[union-attr]
    data = make_data_plane(options["backend"], device)
    if trainer is None:
        assert receives is not None
        return ShardReceiver(group, data, receives)
    both = None if engine is None or receives is None else (engine.sink, receives)
    return ShardSender(group, data, trainer, engine=both, delta=options["delta"] == "1")


def update(end: Any, params: dict[str, Tensor], step: int, digest: str, engine: Any) -> float:
    """Run one update on this rank; returns the seconds of its window."""
    dist.barrier()
    start = time.perf_counter()
    if engine is not None:
        engine.pause_generation("retract")
    if isinstance(end, ShardSender):
        end.begin(step)
        end.send(params)
        end.commit(digest)
    else:
        end.receive(engine.sink)
    if engine is not None:
        engine.continue_generation()
        engine.generate([[1, 2, 3, 4]], FIRST)
    return time.perf_counter() - start


def change_weights(
    specs: list[ParamSpec], params: dict[str, Tensor], step: int, last: int, delta: bool
) -> None:
    """Make a step's weights: the last one's are those of this seed for a fresh engine too."""
    load_dummy(specs, params, last if delta else step)
    if delta and (last - step) % 2:
        for spec in specs:
            chosen = params[spec.name][: spec.num_rows].view(-1)[::50]
            bits = torch.int16 if chosen.dtype.itemsize == 2 else torch.int32
            chosen.copy_((chosen.view(bits) ^ 1).view(chosen.dtype))


def draw(engine: Engine) -> list[Any]:
    """Return tokens and log-probs of some prompts, long and short."""
    vocab = engine.model_config.vocab_size
    prompts = [[(7 * i + j * j) % vocab for j in range(n)] for i, n in enumerate((5, 64, 257, 700))]
    groups = engine.generate(prompts, PARAMS)
    return [(c.token_ids, c.logprobs) for group in groups for c in group]


def measure(folder: Path, options: dict[str, str], device: torch.device) -> dict[str, Any]:
    """Update the engines again and again, and compare what they draw in the end."""
    roles, model = Roles(options), load_model_config(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine: Engine | None = None

    def make_engine(seed: int) -> Engine:
        assert roles.ranks is not None
        settings: dict[str, Any] = {"load_format": "dummy", "seed": seed, "max_model_len": 1024}
        capacity = {"kv_cache_tokens": 1 << 15, "max_num_seqs": 64}
        return Engine(folder, device=device, ranks=roles.ranks, **settings, **capacity)

    if roles.ranks is not None:
        engine = make_engine(99)
        draw(engine)  # captures the graphs
    specs, params = list[ParamSpec](), dict[str, Tensor]()
    if roles.trains:
        tensor, stage = roles.rank % roles.tensor, roles.rank // roles.tensor
        specs = model.param_specs((tensor, roles.tensor))
        specs = stage_of(specs, stage, roles.pipeline, model.num_layers)
        params = {s.name: torch.empty(s.shape, dtype=dtype, device=device) for s in specs}
    end = meet(roles, options, Held(specs, params) if roles.trains else None, engine)
    found: dict[str, Any] = {"rank": roles.rank, "windows_s": [], "seconds": [], "sent_bytes": []}
    last = int(options["updates"])
    for step in range(1, last + 1):
        digest = ""
        if roles.trains:
            change_weights(specs, params, step, last, options["delta"] == "1")
            digest = weights_digest(specs, params, roles.trainers)
        found["windows_s"].append(update(end, params, step, digest, engine))
        if roles.trains:
            found["seconds"].append(dict(end.seconds))
            found["sent_bytes"].append(end.sent_bytes)
    plan, receivers = end._member.plan, end._member._receivers
    got = {rank: plan.bytes_to(i) for i, rank in enumerate(receivers)}
    found |= {"plan": plan.digest, "rounds": len(plan.rounds), "bytes": got.get(roles.rank, 0)}
    if engine is not None:
        padding = {s.name: s.shape[0] - sum(b.num_rows for b in s.blocks) for s in engine.specs}
        held = sum(p[: len(p) - padding[n]].nbytes for n, p in engine.weights.items())
        fresh = make_engine(last)
        expected, drawn = draw(fresh), draw(engine)
        found["mismatches"] = sum(a != b for a, b in zip(expected, drawn, strict=True))
        found["is_right"] = held == found["bytes"] and not found["mismatches"]
        found["digest"] = engine.weight_version.digest
        found["fresh_digest"] = fresh.weight_version.digest
    return found


def main(arguments: list[str]) -> int:
    """Run it; returns the exit code."""
    folder, out, *rest = arguments
    given = dict(argument.split("=", 1) for argument in rest)
    if unknown := set(given) - set(DEFAULTS):
        raise ValueError(f"{sorted(unknown)}: known are {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    dist.init_process_group("cpu:gloo,cuda:nccl" if options["device"] == "cuda" else "gloo")
    device = torch.device(options["device"])
    if device.type == "cuda":
        torch.cuda.set_device(dist.get_rank())
        device = torch.device("cuda", dist.get_rank())
    ranks = gather_objects(measure(Path(folder), options, device))
    if dist.get_rank() == 0:
        write_result(Path(out), device, {"options": options, "ranks": ranks}, ["python", *sys.argv])
        for found in ranks:
            print(json.dumps(found))
    dist.destroy_process_group()
    return 0 if all(found.get("is_right", True) for found in ranks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
