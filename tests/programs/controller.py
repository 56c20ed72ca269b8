"""What the controller's own work costs: the real pool and queue, replicas that have no model.

    python tests/programs/controller.py OUT.json [replicas=64] [room=256] [samples=8000]
        [per_prompt=1,8] [prompt_tokens=512] [new_tokens=512] [repeats=5]

Each replica is a process that answers what it is asked to draw at once, with tokens of its own
choice; what it says of samples that end before others of their prompt it says as an engine does.
Counted is the processor's time of the controller's process, all its threads and the system on their
behalf: checks, queue, messages there and back, and the garbage collections that they cause (which
pass over what was imported before). Waiting costs nothing.
"""

import gc
import itertools
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from samebit.recipes.bench.output import format_table
from samebit.recipes.run.provenance import write_result
from samebit.rollout.engine_pool import EnginePool
from samebit.rollout.engine_process import START, Endings
from samebit.rollout.messages import Abandon, Ask, Done, Draw, Stop
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import Launched
from samebit.rollout.types import Completion, Request, SamplingParams, VersionSpan
from samebit.weight_sync.types import WeightVersion

OPTIONS = {
    "replicas": "64",
    "room": "256",
    "samples": "8000",
    "per_prompt": "1,8",
    "prompt_tokens": "512",
    "new_tokens": "512",
    "repeats": "5",
}
LIMITS = {
    "vocab_size": 151936,
    "num_layers": 36,
    "max_model_len": 40960,
    "kv_capacity": 1 << 20,
    "eos_token_ids": (151645,),
}
SPANS = (VersionSpan(start=0, version=WeightVersion(step=0, digest="0" * 16), recomputed=False),)
FORK = multiprocessing.get_context("fork")  # a replica needs nothing that a spawned one would load


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Options over their defaults."""
    given = dict(argument.split("=", 1) for argument in arguments)
    if unknown := sorted(given.keys() - OPTIONS.keys()):
        raise ValueError(f"'{unknown[0]}' is none of {', '.join(OPTIONS)}")
    return OPTIONS | given


def drawn(request: Request) -> list[Completion]:
    """A group as an engine would have made it."""
    length = request.params.max_new_tokens
    return [
        Completion(
            request_id=request.request_id,
            sample_id=sample_id,
            token_ids=tuple((sample_id * 31 + i * 7919) % 151936 for i in range(length)),
            logprobs=tuple(-((sample_id + i) % 97) / 8 for i in range(length)),
            finish_reason="length",
            version_spans=SPANS,
        )
        for sample_id in request.sample_ids
    ]


def serve(connection: Connection) -> None:
    """A replica. It takes in what it is asked while it answers, as an engine's process does."""
    _, _ = connection.recv()
    connection.send((START, Done(None)))
    heard: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
    threading.Thread(target=hear, args=(connection, heard), daemon=True).start()
    endings, sending = Endings(lambda *told: send(connection, sending, told)), threading.Lock()
    threading.Thread(target=endings.run, daemon=True).start()
    while (asked := heard.get()) is not None:
        number, message = asked
        if isinstance(message, Ask):
            send(connection, sending, (number, Done(LIMITS)))
        elif isinstance(message, Draw):
            for each, requests in message.requests.items():
                group = [completion for request in requests for completion in drawn(request)]
                for _ in group[1:]:
                    endings.add(each, 1)
                endings.forget(each)
                send(connection, sending, (each, Done(group)))
        elif isinstance(message, Abandon):  # of what was answered
            send(connection, sending, (number, Done(None)))


def send(connection: Connection, sending: threading.Lock, told: tuple[int, Any]) -> None:
    """Say something, one thread at a time."""
    with sending:
        connection.send(told)


def hear(connection: Connection, heard: SimpleQueue[tuple[int, Any] | None]) -> None:
    """Take in messages until the last."""
    while not isinstance((asked := connection.recv())[1], Stop):
        heard.put(asked)
    heard.put(None)


def make_pool(replicas: int, room: int) -> EnginePool:
    """Replicas that were forked before this process had a thread, in a pool."""
    launched = []
    for _ in range(replicas):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        launched.append(Launched(process, ours))
    return EnginePool(
        lambda place: RemoteEngine("", launch=lambda *_: [launched[place]], waits=False),
        replicas,
        room,
    )


def measure(pool: EnginePool, options: dict[str, str], per_prompt: int) -> dict[str, Any]:
    """Milliseconds of 1,000 samples, and seconds from the first request to the last answer."""
    samples = int(options["samples"])
    prompts = [
        tuple((i * 131 + j * 17) % 151936 for j in range(int(options["prompt_tokens"])))
        for i in range(samples // per_prompt)
    ]
    params = SamplingParams(n=per_prompt, max_new_tokens=int(options["new_tokens"]))
    fresh = itertools.count()
    own, took = [], []
    for _ in range(int(options["repeats"])):
        ids = [list(itertools.islice(fresh, per_prompt)) for _ in prompts]
        began, busy = time.perf_counter(), time.process_time()
        groups = pool.generate(prompts, params, ids)
        own.append((time.process_time() - busy) / samples * 1e6)
        took.append(time.perf_counter() - began)
        assert [[c.sample_id for c in group] for group in groups] == ids
    return {
        "samples_per_prompt": per_prompt,
        "requests": len(prompts),
        "samples": samples,
        "ms_per_1000": statistics.median(own),
        "ms_per_1000_min": min(own),
        "ms_per_1000_max": max(own),
        "seconds": statistics.median(took),
    }


def main(out: str, *arguments: str) -> None:
    options = parse(arguments)
    pool = make_pool(int(options["replicas"]), int(options["room"]))
    gc.freeze()
    try:
        rows = [measure(pool, options, int(n)) for n in options["per_prompt"].split(",")]
    finally:
        pool.close()
    body = {"options": options, "rows": rows}
    write_result(Path(out), torch.device("cpu"), body, ["python", *sys.argv])
    columns = "samples_per_prompt", "ms_per_1000", "ms_per_1000_min", "ms_per_1000_max", "seconds"
    table = [[f"{row[name]:.4g}" for name in columns] for row in rows]
    print(format_table([list(columns), *table]))


if __name__ == "__main__":
    main(*sys.argv[1:])
