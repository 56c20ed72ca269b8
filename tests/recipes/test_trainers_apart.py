"""Trainers of several processes beside engines apart: to the bit what they are with their own."""

import asyncio
import json
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from run_children import be_rank, engine_here, run_cli_as_rank
from test_engine_replicas import dying
from test_online_draft import ONLINE

from samebit.recipes.launch import led_engine, placement
from samebit.recipes.launch.led_engine import LedEngine, told
from samebit.recipes.rollout_config import RolloutSection
from samebit.recipes.run.draws_ahead import DrawsAhead
from samebit.recipes.run.generation import GenerateError
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.signals import Stopped
from samebit.rollout.remote_ranks import RemoteEngineError
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron.setup import start_processes
from samebit.trainer.megatron.trainer import MegatronTrainer
from samebit.trainer.ranks import is_first, on_first
from samebit.trainer.types import NonFiniteError
from samebit.weight_sync.failures import CrashError, may_pass
from samebit.weight_sync.meeting import is_loopback
from samebit.weight_sync.objects import gather_objects
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.trainer_ranks import TrainerRanks
from samebit.weight_sync.types import LostMemberError, WeightSyncError

PAIR = "placement.engine_tensor=2"
WORDS = ("trainer.parallel.data=2", "trainer.num_steps=3")
APART = ("placement=process", "placement.replicas=2")
SEGMENTS = ("numerics.grad_segments=2", "trainer.num_steps=3")
"""With which one process comes to the weights of two."""
STALE = ("rollout.max_staleness=1", "placement=process")
TENSOR = ("numerics.tp_invariant=true", "trainer.parallel.tensor=2", "trainer.num_steps=2")
LONG = pytest.mark.long


def result_of(runs, name):
    """Summary, metrics without times, samples."""
    folder = runs.folder / name
    summary = json.loads((folder / "summary.json").read_text())
    return summary, runs.rows(name), read_rows(folder / "samples.jsonl")


def run_and_let_die(rank, *arguments):
    """As run_cli_as_rank; a replica dies while it draws, and one as weights are about to move."""
    if rank == "0":
        dying(pytest.MonkeyPatch(), [("_take", 4), ("send", 2)])
    run_cli_as_rank(rank, *arguments)


@pytest.fixture(scope="module")
def beside(make_runs, run_ranks, tmp_path_factory):
    """Two processes that train and draw in turns: their folder, and what they gave in `result`."""
    runs = make_runs(tmp_path_factory.mktemp("beside"))
    codes, said = run_ranks(runs.arguments("beside", *WORDS))
    assert codes == [0, 0], said
    runs.result = result_of(runs, "beside")
    return runs


@pytest.mark.parametrize(
    "words",
    [
        STALE,
        pytest.param((*STALE, "rollout.partial_tokens=2"), marks=pytest.mark.long),
        pytest.param(("placement=process",), marks=pytest.mark.long),
    ],
    ids=["ahead", "ahead in parts", "in turns"],
)
def test_two_train_beside_an_engine(runs, run_ranks, monkeypatch, words):
    """Tokens, metrics and weights are those of one process that trains, also where later steps are
    drawn meanwhile; all are compared. One process may go on for the two."""
    codes, said = run_ranks(runs.arguments("two", *SEGMENTS, *words, "trainer.parallel.data=2"))
    assert codes == [0, 0], said
    monkeypatch.setattr(placement, "_start_apart", engine_here)
    result = runs.train("one", *SEGMENTS, *words)
    assert result_of(runs, "two") == result
    summary, *_ = result
    assert summary["logprob_mismatches"] == 0
    assert summary["logprob_tokens_compared"] > 100
    shutil.rmtree(runs.folder / "two" / "checkpoints" / "step_00000003")
    (runs.folder / "two" / "summary.json").unlink()
    assert runs.train("two", *SEGMENTS, *words, "resume=true") == result


@pytest.mark.long
@pytest.mark.parametrize("words", [(), ("rollout.max_staleness=1",)], ids=["in turns", "ahead"])
def test_two_train_and_two_draw_some_of_which_die(runs, run_ranks, words):
    target = "test_trainers_apart", "run_and_let_die"
    own = *SEGMENTS, *APART, *words
    arguments = runs.arguments("two", *own, "trainer.parallel.data=2")
    codes, said = run_ranks(arguments, target=target)
    assert codes == [0, 0], said
    assert said.count("which was replica") == 2, said
    assert result_of(runs, "two") == runs.train("one", *own)


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        (*APART, "placement.delta=true"),
        (*APART, "placement.launcher=ray"),
        (*APART, "rollout.generate=run_children:two_turns"),
    ],
    ids=["delta", "ray", "in turns"],
)
def test_engines_apart_change_no_bit(beside, run_ranks, words):
    name, expected = words[-1].replace(":", "-"), beside.result
    codes, said = run_ranks(beside.arguments(name, *WORDS, *words))
    assert codes == [0, 0], said
    if generate := [word for word in words if word.startswith("rollout.generate")]:
        codes, said = run_ranks(beside.arguments("turns", *WORDS, *generate))
        assert codes == [0, 0], said
        expected = result_of(beside, "turns")
    assert result_of(beside, name) == expected


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("rollout.partial_tokens=2",)], ids=["whole", "in parts"])
def test_a_run_with_draws_ahead_goes_on(runs, run_ranks, more):
    """To the bytes of the whole: what was drawn and not trained on is part of every checkpoint."""
    words = *STALE, "trainer.parallel.data=2", *more
    for name, last in (("whole", ()), ("cut", ()), ("cut", ("resume=true",))):
        target = ("run_children", "run_cli_as_rank")
        if name == "cut" and not last:
            target = ("test_trainers_apart", "run_until_the_third_update")
        codes, said = run_ranks(runs.arguments(name, *words, *last), target=target)
        assert codes == ([9, 9] if target[1] != "run_cli_as_rank" else [0, 0]), said
    assert result_of(runs, "cut") == result_of(runs, "whole")


class Asked:
    """In place of an engine: it answers agenerate once it may."""

    def __init__(self):
        self.may = threading.Event()

    async def agenerate(self, prompt_ids, *_, **__):
        self.may.wait()
        assert prompt_ids == [[1]]
        return []

    def close(self):
        pass


FAILURES = [
    KeyError("a bug"),
    RemoteEngineError("it died"),
    NonFiniteError("a log-prob"),
    OSError("full"),
    Stopped("SIGTERM"),
]
# How processes are told of a failure, and what the others raise where it may pass, or may not.
WAYS = {
    (RemoteEngineError, GenerateError): lambda call: told(
        call if is_first() else None, GenerateError
    ),
    (LostMemberError, WeightSyncError): lambda call: TrainerRanks.of_world().told(call),
    (CrashError, GenerateError): lambda call: on_first(call, GenerateError),
}
BOTH = OSError("a port"), LostMemberError("somebody")


def call_as_rank(rank, *place):
    """Calls of the first process's engine that fail; one that succeeds while the main threads
    gather."""
    be_rank(rank, *place[:3])
    start_processes(torch.device("cpu"), ParallelConfig(data=2))

    def fail(failure):
        raise failure

    first, trainers = rank == "0", TrainerRanks.of_world()
    calls = [partial(way, partial(fail, failure)) for way in WAYS.values() for failure in FAILURES]
    for call in [*calls, lambda: trainers.agreed(partial(fail, BOTH[int(rank)]))]:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - what is looked at
            print(f"{rank}: {type(error).__name__}, {error}, {may_pass(error)}")
    engine = Asked() if first else None
    led, asked = LedEngine(engine), threading.Event()

    def gather(value):
        asked.set()
        return gather_objects(value)

    led_engine.gather_objects = gather
    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(lambda: asyncio.run(led.agenerate([[1]])))
        if engine is None:
            asked.wait()
        print(f"{rank}: {gather_objects(rank)}")
        if engine is not None:
            engine.may.set()
        print(f"{rank}: {drawn.result()}")
    led.close()


def test_what_the_others_are_told_of_a_call(run_ranks):
    """Whether starting again may help is the same on all. Calls of asyncio gather beside the main
    threads."""
    codes, said = run_ranks([], target=("test_trainers_apart", "call_as_rank"))
    assert codes == [0, 0], said
    own = [f"0: {type(e).__name__}, {e}, {may_pass(e)}" for e in [*FAILURES * 3, BOTH[0]]]
    others = ["1: WeightSyncError, a port, False"]
    for kinds in WAYS:
        where = "rank 0: " if CrashError in kinds else ""
        others += [
            f"1: {kinds[not may_pass(e)].__name__}, {where}{e}, {may_pass(e)}" for e in FAILURES
        ]
    gathered = [f"{rank}: {each}" for rank in (0, 1) for each in (["0", "1"], [])]
    found = [line for line in said.splitlines() if line[:3] in ("0: ", "1: ")]
    assert sorted(found) == sorted([*own, *others, *gathered])
    assert [may_pass(e) for e in FAILURES] == [True, True, False, False, False]


def close_as_rank(rank, *place):
    """The first process closes while its second draw goes on and a third is to follow; the other
    one later."""
    be_rank(rank, *place[:3])
    start_processes(torch.device("cpu"), ParallelConfig(data=2))
    first, begun, closing = rank == "0", [], threading.Event()

    def draw(step, begin, poll):
        begun.append(gather_objects(step))
        if first and step == 2:
            closing.wait()
        return SimpleNamespace(num_prompts=1)

    ahead = DrawsAhead(draw, RolloutSection(max_staleness=2), 3)
    if first:
        ahead._ended = closing
    ahead.begin(0, 0)
    ahead.take(1, lambda: None)
    if first:
        ahead.close()
    gather_objects("the first one is closed")
    ahead.close()
    gather_objects("all are")
    print(f"{rank}: {begun}")


def test_a_run_ends_while_draws_wait(run_ranks):
    codes, said = run_ranks([], target=("test_trainers_apart", "close_as_rank"))
    assert codes == [0, 0], said
    assert {line[3:] for line in said.splitlines() if line[:3] in ("0: ", "1: ")} == {
        "[[1, 1], [2, 2]]"
    }


def run_until_the_third_update(rank, *arguments):
    """As run_cli_as_rank; both die before they train a third time."""
    inner, count = MegatronTrainer.train_step, []

    def train_step(self, *args):
        count.append(self.step)
        if len(count) == 4:
            os._exit(9)
        return inner(self, *args)

    MegatronTrainer.train_step = train_step
    run_cli_as_rank(rank, *arguments)


def run_as_on_two_machines(rank, *arguments):
    """As run_cli_as_rank; in what the transport is told the other process is on another machine,
    which reaches the first one at this machine's own address."""
    inner, init = TrainerRanks.address, WeightGroup.__init__
    found = [each for of_one in psutil.net_if_addrs().values() for each in of_one]
    own = [x.address for x in found if x.family == socket.AF_INET and not is_loopback(x.address)]

    def address(self):
        os.environ |= {"MASTER_ADDR": own[0], "LOCAL_WORLD_SIZE": "1"}
        return inner(self)

    def met(self, *args, **more):
        init(self, *args, **more)
        print(f"rank {self.rank} of {self.world_size} is local: {self.is_local}")

    TrainerRanks.address, WeightGroup.__init__ = address, met
    run_cli_as_rank(rank, *arguments)


@pytest.mark.long
def test_trainers_of_several_machines_are_not_met_at_the_loopback(beside, run_ranks):
    target = "test_trainers_apart", "run_as_on_two_machines"
    codes, said = run_ranks(beside.arguments("far", *WORDS, *APART), target=target)
    assert codes == [0, 0], said
    assert all(f"rank {rank} of 4 is local: False" in said for rank in (0, 1))
    assert result_of(beside, "far") == beside.result


@pytest.mark.long
def test_stages_of_a_pipeline_and_an_engine_apart(runs, run_ranks):
    """Each sends its layers."""
    words = "trainer.parallel.pipeline=2", "trainer.num_steps=3"
    for name, more in (("beside", ("placement.transport=stages",)), ("apart", APART)):
        codes, said = run_ranks(runs.arguments(name, *words, *more))
        assert codes == [0, 0], said
    assert result_of(runs, "apart") == result_of(runs, "beside")


@pytest.mark.parametrize(
    ("size", "layout", "words"),
    [
        (2, (), ("placement=process",)),
        pytest.param(2, ("sequence=true",), (*APART, "placement.delta=true"), marks=LONG),
        pytest.param(2, (), (*APART, "placement.launcher=ray"), marks=LONG),
        pytest.param(2, (), (*APART, *ONLINE), marks=LONG),
        pytest.param(4, ("data=2",), APART, marks=LONG),
        pytest.param(4, ("context=2",), ("placement=process",), marks=LONG),
        pytest.param(4, ("pipeline=2",), APART, marks=LONG),
        pytest.param(2, (), ("placement=process", PAIR), marks=LONG),
        pytest.param(2, (), (*APART, PAIR, "numerics.tp_invariant=false"), marks=LONG),
        pytest.param(2, (), (*APART, PAIR, *ONLINE), marks=LONG),
        pytest.param(4, ("pipeline=2",), (*APART, PAIR, "placement.delta=true"), marks=LONG),
    ],
    ids=[
        *("one", "sequence, delta", "ray", "draft", "data", "context", "pipeline"),
        *("pair", "pairs, one size", "pairs, draft", "pairs, pipeline, delta"),
    ],
)
def test_tensor_parallel_trainers_and_engines_apart(runs, run_ranks, size, layout, words):
    """Each sends its part of every layer; an engine has the whole model in one process, or each of
    its processes a part."""
    own = [*TENSOR, *(f"trainer.parallel.{key}" for key in layout)]
    beside = ["placement.transport=stages"] if "pipeline=2" in layout else []
    beside += [word for word in words if not word.startswith("placement")]
    for name, more in (("beside", beside), ("apart", words)):
        codes, said = run_ranks(runs.arguments(name, *own, *more), size)
        assert codes == [0] * size, said
    assert (result := result_of(runs, "apart")) == result_of(runs, "beside")
    summary, *_ = result
    assert summary["logprob_mismatches"] == 0
    assert summary["logprob_tokens_compared"] > 80


@LONG
def test_tensor_parallel_trainers_and_draws_ahead(runs, run_ranks):
    """Two copies, each of two processes, beside two engines, of two as well, all of which die once
    and go on: as one copy beside one engine."""
    own = *TENSOR, SEGMENTS[0], *STALE, "trainer.num_steps=4"
    codes, said = run_ranks(runs.arguments("one", *own))
    assert codes == [0, 0], said
    target = ("test_trainers_apart", "run_until_the_third_update")
    four = *own, "trainer.parallel.data=2", "placement.replicas=2", PAIR
    codes, said = run_ranks(runs.arguments("two", *four), 4, target)
    assert codes == [9] * 4, said
    codes, said = run_ranks(runs.arguments("two", *four, "resume=true"), 4)
    assert codes == [0] * 4, said
    assert (result := result_of(runs, "two")) == result_of(runs, "one")
    assert result[0]["logprob_mismatches"] == 0
    assert result[0]["logprob_tokens_compared"] > 100


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("trainer.parallel.tensor=2", "=2 unless numerics.tp_invariant=true: another number of"),
        (
            PAIR,
            "2; it must be 1 with placement.engine=process and trainer.parallel.tensor=1 ",
        ),
        ("placement.transport=ipc placement.replicas=1", "gloo or nccl with placement=process and"),
        ("placement.transport=a:B", "gloo or nccl with placement=process and 2 processes of the"),
        ("placement.transport=nccl", "nccl needs CUDA devices: 4, there are 0"),
    ],
)
def test_refusals(runs, words, reason):
    """`tensor` is in place of copies."""
    layout = [] if "tensor" in words else ["trainer.parallel.data=2"]
    with pytest.raises(ValueError, match=reason):
        placement.require_transport(runs.resolve("refused", *APART, *layout, *words.split()))
