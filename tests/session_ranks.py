"""Ranks of one engine that do not all take an update: programs of tests/parallel."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_programs import exact, prompts, start
from safetensors.torch import load_file

from samebit.kernels.memory import ResumeError
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


def refusal(engine):
    return message_of(lambda: engine.generate(prompts()[:1], SamplingParams()))


def paused(rank, size, store, folder, out):
    """Pauses that every rank makes alike, and that rank 0 makes for all; whole tensors between."""
    torch.set_num_threads(1)
    engine = Engine(folder, device="cpu", ranks=start(rank, size, store), overlap=True)
    params = SamplingParams(n=2, max_new_tokens=10, ignore_eos=True)
    ids = [[2 * i, 2 * i + 1] for i in range(len(prompts()))]
    truth = exact(engine.generate(prompts(), params, ids))
    weights = load_file(Path(folder) / "model.safetensors")

    def stepped(mode):
        names = [engine.add_request(p, params, i) for p, i in zip(prompts(), ids, strict=True)]
        found = {}
        while engine.has_unfinished_requests:
            found |= {group[0].request_id: group for group in engine.step()}
            if engine.step_loop.num_drawn % 3 == 0 and engine.weight_version.step < 3:
                engine.pause_generation(mode)
                engine.begin_weight_update()
                engine.update_weights_from_tensor(list(weights.items()))
                engine.end_weight_update()
                engine.continue_generation()
        return exact([found[name] for name in names])

    found = {"alike": [], "led": None}
    for mode in ("keep", "retract"):
        engine.update_weights_from_disk(folder, step=0)
        found["alike"].append(stepped(mode) == truth)
    found["version"] = vars(engine.weight_version)
    found["whole"] = all(torch.equal(engine.get_weights_by_name(n), w) for n, w in weights.items())
    if int(rank) > 0:
        engine.follow()
    else:
        with engine.leading():
            found["led"] = exact(asyncio.run(_led(engine, params, ids))) == truth
    found["after"] = exact(engine.generate(prompts(), params, ids)) == truth
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


async def _led(engine, params, ids):
    """A call that is paused again and again by another task; then one that is aborted."""
    call = asyncio.create_task(engine.agenerate(prompts(), params, ids))
    for mode in ("keep", "retract", "keep", "retract"):
        await asyncio.sleep(0.02)
        engine.pause_generation(mode)
        engine.continue_generation()
    found = await call
    doomed = asyncio.create_task(engine.agenerate(prompts(), params, ids))
    await asyncio.sleep(0)
    engine.pause_generation("abort")
    engine.continue_generation()
    await doomed
    return found


def without_a_folder(engine, folder):
    """What a rank is told if it, or another, has no folder; nothing has begun, and it serves on."""
    with pytest.raises((FileNotFoundError, WeightSyncError)) as told:
        engine.update_weights_from_disk(folder, 1)
    engine.generate(prompts()[:1], SamplingParams(max_new_tokens=2))
    return str(told.value)


def begun_again(engine, folder, is_bad):
    """Sessions without an end: one that rank 1 alone refused, and one that was aborted."""
    weights = load_file(Path(folder) / "model.safetensors")
    engine.begin_weight_update()
    named = [*list(weights.items())[:2], *([("extra", torch.zeros(3))] if is_bad else [])]
    told = []
    try:
        engine.update_weights_from_tensor(named)
    except WeightSyncError as error:
        told.append(str(error))
    engine.begin_weight_update()
    engine.abort_weight_update("given up")
    told.append(refusal(engine))
    engine.begin_weight_update()
    engine.update_weights_from_tensor(list(weights.items()))
    engine.end_weight_update()
    engine.generate(prompts()[:1], SamplingParams(max_new_tokens=2))
    return told


def short_of_memory(engine, is_bad):
    """Rank 1 alone has no room for the cache, once: none serves, and both try again."""
    engine.release_memory_occupation(["kv_cache"])
    resume = engine.arena.resume
    if is_bad:

        def fail(tags):
            raise ResumeError("kv_cache needs 7 bytes")

        engine.arena.resume = fail
    with pytest.raises(ResumeError) as told:
        engine.resume_memory_occupation()
    engine.arena.resume = resume
    refused = refusal(engine)
    engine.resume_memory_occupation()
    engine.generate(prompts()[:1], SamplingParams(max_new_tokens=2))
    return str(told.value), refused


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

    def fails():
        """As if the digest's tables did not fit any more."""
        session = engine.weight_control.session
        digester = session._digester
        if is_bad:
            session._digester = None
        try:
            engine.copy_weights(good, step=1)
        finally:
            session._digester = digester

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
        "fails": fails,
        "different": lambda: engine.copy_weights(good, step=4 if is_bad else 5),
        "leased": leased,
    }
    for name, fault in faults.items():
        told = message_of(fault), refusal(engine).partition(";")[0]
        engine.copy_weights(good, step=9)
        engine.generate(prompts()[:1], SamplingParams(max_new_tokens=2))
        found[name] = told
    found["begun again"] = begun_again(engine, folder, is_bad)
    found["short"] = short_of_memory(engine, is_bad)
    found["no folder"] = without_a_folder(engine, "/nowhere" if is_bad else folder)
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
