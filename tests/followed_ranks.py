"""Rank programs in which rank 0 leads and the other follows; see rank_programs."""

import asyncio
import json
import threading
from contextlib import aclosing, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from rank_programs import PARAMS, exact, prompts, start

from samebit.rollout.engine import Engine
from samebit.rollout.runtime.call import Call
from samebit.rollout.runtime.sampler import NonFiniteError
from samebit.rollout.types import SamplingParams

IDS = [list(range(10 * i, 10 * i + params.n)) for i, params in enumerate(PARAMS)]
ENDLESS = SamplingParams(max_new_tokens=100, ignore_eos=True)


def led(rank, size, store, folder, out):
    """Concurrent callers of rank 0, which the other follows; then both are called alike again."""
    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    settings = {"max_num_seqs": 4, "page_size": 16, "overlap": True}
    one = Engine(folder, device="cpu", ranks=ranks, seed=3, **settings)
    found = {"alike": exact(one.generate(prompts(), PARAMS, IDS)), "led": []}
    wrong = one.follow if ranks.rank == 0 else one.leading().__enter__
    calls = (wrong, lambda: asyncio.run(one.agenerate(prompts())))
    found["refused"] = [error_of(call) for call in calls]
    for _ in range(2):
        if ranks.rank == 0:
            with one.leading():
                found["led"].append(asyncio.run(concurrent_calls(one)))
        else:
            one.follow()
    found["unfinished"] = one.has_unfinished_requests
    one.add_request(prompts()[0], PARAMS[0])
    [group] = [group for _ in range(20) for group in one.step()]
    found["after"] = [exact([group]), [c.sample_id for c in group], group[0].request_id]
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def error_of(call):
    """What a call that is refused says."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("it was not refused")


async def concurrent_calls(one):
    """Each prompt by a call of its own, at another step; beside calls that are given up."""

    async def drawn(i):
        await asyncio.sleep(0.004 * i)
        if i % 2:
            return exact(await one.agenerate([prompts()[i]], PARAMS[i], [IDS[i]]))[0]
        samples = {number: [[], [], None] for number in IDS[i]}
        async for part in one.stream([prompts()[i]], PARAMS[i], [IDS[i]]):
            tokens, values, _ = samples[part.sample_id]
            tokens += part.token_ids
            values += [v.hex() for v in part.logprobs]
            samples[part.sample_id][2] = part.finish_reason
        return list(samples.values())

    async def given_up():
        async with aclosing(one.stream(prompts()[1:3], ENDLESS)) as stream:
            async for part in stream:
                if part.sample_id % 2:
                    return

    doomed = asyncio.create_task(one.agenerate(prompts()[:1], ENDLESS))
    *calls, _ = await asyncio.gather(*map(drawn, range(len(PARAMS))), given_up())
    one.flush_cache()
    doomed.cancel()
    with suppress(asyncio.CancelledError):
        await doomed
    return calls


def drained(one):
    """What callers hear whose NaN is still in flight as they go, and as rank 0 stops leading; and
    who comes too late for that."""
    book, calls = one.loop.book, []
    one.step_loop.depth = 1
    with one.loop._driving(), one.leading():
        for goes in (True, False):
            calls.append(Call(one.requests.generation(prompts(), ENDLESS, None, ())))
            book.admit(calls[-1])
            book.step()
            if goes:
                with suppress(NonFiniteError):
                    book.abandon(calls[-1])
        late = Call(one.requests.generation(prompts(), ENDLESS, None, ()))
        caller = threading.Thread(target=one.loop.submit, args=(late,))
        caller.start()
        caller.join()
    one.step_loop.depth = 0
    return [str(call.result.exception(60)) for call in (*calls, late)]


def parted(rank, size, store, folder, out):
    """A NaN on both ranks is the caller's error; a step that fails on one rank parts them."""
    torch.set_num_threads(1)
    ranks = start(rank, size, store)
    one = Engine(folder, device="cpu", ranks=ranks, seed=3)
    weight = one.weights["decoder.final_layernorm.weight"]
    whole, found = weight.clone(), {}
    take_in = one.step_loop._take_in

    def failing(flight):
        if ranks.rank == 1 and len(flight.step.decode):
            raise RuntimeError("a card fell off")
        return take_in(flight)

    def call():
        asyncio.run(one.agenerate(prompts(), ENDLESS))

    weight.fill_(torch.nan)
    if ranks.rank == 0:
        with one.leading():
            found["nan"] = error_of(call)
        found["drained"] = drained(one)
    else:
        one.follow()
        one.step_loop.depth = 1
        one.follow()
        one.step_loop.depth = 0
    weight.copy_(whole)
    found["alike"] = exact(one.generate(prompts(), PARAMS, IDS))
    one.step_loop._take_in = failing
    if ranks.rank == 0:
        with suppress(RuntimeError), one.leading():
            found["parted"], found["again"] = error_of(call), error_of(call)
    else:
        found["parted"] = error_of(one.follow)
    Path(out).with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
