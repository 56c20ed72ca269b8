"""Ranks of one engine that do not all take an update: programs of tests/parallel."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from rank_programs import prompts, start

from samebit.rollout.engine import Engine
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import ParamMeta, WeightSyncError

NORM = "decoder.final_layernorm.weight"


def message_of(call):
    try:
        call()
    except WeightSyncError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def refused(rank, size, store, folder, out):
    """What every rank is told of updates that rank 1 alone refuses, each in another way."""
    torch.set_num_threads(1)
    engine = Engine(folder, device="cpu", ranks=start(rank, size, store))
    good = {name: param.clone() for name, param in engine.weights.items()}
    is_bad = int(rank) == 1

    def copied(**changed):
        return engine.copy_weights(good | (changed if is_bad else {}), step=1)

    def by_hand():
        """As a transport does: whatever happens, a commit at the end."""
        engine.sink.begin(10)
        metas = [ParamMeta(n, tuple(p.shape), str(p.dtype), 0) for n, p in good.items()]
        if is_bad:
            message_of(lambda: engine.sink.bucket_for([ParamMeta("x", (1,), "torch.float32", 0)]))
        else:
            engine.weight_control.session.expect(metas)
            engine.weight_control.session.arrived(metas)
        engine.sink.commit("")

    def leased():
        engine.bind_weights(good)
        engine.sink.begin(3)
        engine.sink.receive_in_place(good if not is_bad else good | {NORM: good[NORM].clone()})
        engine.sink.commit("")

    found = {}
    faults = {
        "shape": lambda: copied(**{NORM: torch.zeros(3)}),
        "missing": lambda: engine.copy_weights(good if not is_bad else {}, step=1),
        "extra": lambda: copied(extra=torch.zeros(3)),
        "NaN": lambda: copied(**{NORM: torch.full_like(good[NORM], torch.nan)}),
        "by hand": by_hand,
        "leased": leased,
    }
    for name, fault in faults.items():
        told = message_of(fault)
        served = message_of(lambda: engine.generate(prompts()[:1], SamplingParams()))
        engine.copy_weights(good, step=9)
        engine.generate(prompts()[:1], SamplingParams(max_new_tokens=2))
        found[name] = told, served.partition(";")[0]
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
