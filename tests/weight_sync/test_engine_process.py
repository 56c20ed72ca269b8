"""The process of a remote engine: what it answers, and when it does what it is asked."""

import pickle
import threading
from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from serving import local_engine

from samebit.rollout import engine_process
from samebit.rollout.engine import Engine
from samebit.rollout.messages import Ask, Done, Draw, Ended, Failed, Generate, LeaveOff
from samebit.rollout.types import SamplingParams

PROMPTS = [[5, 9, 200, 31], [7]]
ENDLESS = SamplingParams(max_new_tokens=1000, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(old):
    return local_engine(old.folder)


def test_an_update_comes_after_the_calls_before_it(old):
    """Which are unfinished then: it is refused, and does not begin as they are admitted."""
    answers, entered, leave = {}, threading.Event(), threading.Event()
    connection = SimpleNamespace(send_bytes=lambda sent: answers.setdefault(*pickle.loads(sent)))
    server = engine_process._Server(connection)
    server.engine = Engine(old.folder, device="cpu", kv_cache_tokens=1024)
    loop = server.engine.loop

    def drive():
        with loop._driving():
            entered.set()
            assert leave.wait(60)

    driver = threading.Thread(target=drive)
    driver.start()
    assert entered.wait(60)
    server.handle(1, Generate(PROMPTS, ENDLESS, None))
    update = Ask(Engine.update_weights_from_disk, (old.folder, 5), {})
    updater = threading.Thread(target=server.handle, args=(2, update))
    updater.start()
    updater.join(0.2)
    leave.set()
    for thread in (driver, updater):
        thread.join()
    assert "needs an idle engine: 2 requests" in str(answers[2].error)
    server.engine.close()
    assert [c.finish_reason for [c] in answers[1].value] == ["abort"] * 2


class TwoPartError(Exception):
    """An error whose copy lacks an argument."""

    def __init__(self, what, why):
        super().__init__(f"{what}: {why}")


def test_an_error_that_cannot_be_sent_is_told_by_another():
    copy = engine_process._portable(TwoPartError("the disk", "full"))
    assert (type(copy), str(copy)) == (RuntimeError, "TwoPartError: the disk: full")
    assert type(engine_process._portable(KeyError("x"))) is KeyError


def server_of(engine):
    """What it answers, as it is sent, and what handles messages for an engine."""
    sent = []
    connection = SimpleNamespace(send_bytes=lambda told: sent.append(pickle.loads(told)))
    server = engine_process._Server(connection)
    server.engine = engine
    return sent, server


def test_each_call_is_answered_once(engine, monkeypatch):
    """By its own number, also where the engine's loop does not take it up."""
    sent, server = server_of(engine)
    submit = engine.loop.submit

    def late(call):
        submit(call)
        call.result.exception(timeout=60)
        refuse(call)

    def refuse(call):
        raise MemoryError("no thread can be started")

    requests = engine.requests.generation(PROMPTS, SamplingParams(max_new_tokens=2), None, ())
    for replaced, kind in ((refuse, Failed), (late, Done)):
        monkeypatch.setattr(engine.loop, "submit", replaced)
        server.handle(engine_process.START, Draw({7: [requests[0]], 8: [requests[1]]}))
        assert [number for number, _ in sent] == [7, 8]
        assert {type(answer) for _, answer in sent} == {kind}
        sent.clear()


def test_what_has_no_room_is_refused(engine):
    """Who asks goes by the room of an engine that this one has replaced. It would wait for ever."""
    sent, server = server_of(engine)
    [request] = engine.requests.generation([[5]], SamplingParams(max_new_tokens=2), None, ())
    longer = replace(request, params=SamplingParams(max_new_tokens=engine.kv_capacity))
    server.handle(engine_process.START, Draw({7: [longer]}))
    [(number, answer)] = sent
    assert number == 7
    error = (
        "a request to an engine's process: 1 prompt tokens [+] .* max_new_tokens exceed the .* of"
    )
    with pytest.raises(ValueError, match=error):
        raise answer.error


def test_samples_that_end_before_others_are_told(engine):
    """Of each request that a Draw begins, as they end, but for those of its last step."""
    sent = SimpleQueue()
    connection = SimpleNamespace(send_bytes=lambda told: sent.put(pickle.loads(told)))
    server = engine_process._Server(connection)
    server.engine = engine
    told = {7: [], 8: []}
    server.endings.add = lambda number, num_samples: told[number].append(num_samples)
    stops = SamplingParams(n=12, max_new_tokens=40, stop_token_ids=tuple(range(0, 331, 9)))
    requests = engine.requests.generation(PROMPTS, stops, None, ())
    server.handle(engine_process.START, Draw({7: [requests[0]], 8: [requests[1]]}))
    groups = {number: answer.value for number, answer in (sent.get(), sent.get())}
    for number, group in groups.items():
        assert len({len(completion.token_ids) for completion in group}) > 3
        assert len(told[number]) > 3
        assert min(told[number]) > 0
        assert 0 < len(group) - sum(told[number]) < 4


def test_requests_of_one_call_are_answered_together(engine):
    """What one replica has left of a request: those that end before the others are told."""
    sent = SimpleQueue()
    connection = SimpleNamespace(send_bytes=lambda told: sent.put(pickle.loads(told)))
    server = engine_process._Server(connection)
    server.engine = engine
    told = []
    server.endings.add = lambda number, num_samples: told.append((number, num_samples))
    lengths = (2, 3, 9)
    params = [SamplingParams(n=2, max_new_tokens=count, ignore_eos=True) for count in lengths]
    requests = engine.requests.generation([[5], [6], [7]], params, None, ())
    server.handle(engine_process.START, Draw({7: requests}))
    number, answer = sent.get()
    assert number == 7
    assert [len(completion.token_ids) for completion in answer.value] == [2, 2, 3, 3, 9, 9]
    assert told == [(7, 2), (7, 2)]


def test_calls_are_left_off_where_enough_may_be_left(engine):
    """Over what another engine would compute again; told behind their answers. A number that was
    answered, or never given, is none."""
    sent = SimpleQueue()
    connection = SimpleNamespace(send_bytes=lambda told: sent.put(pickle.loads(told)))
    server = engine_process._Server(connection)
    server.engine = engine
    short, long = (SamplingParams(n=2, max_new_tokens=x, ignore_eos=True) for x in (20, 400))
    prompts = [[5] * 120, [6]]
    first, second = engine.requests.generation(prompts, [short, long], None, ())
    server.handle(engine_process.START, Draw({7: [first], 8: [second]}))
    server.handle(3, LeaveOff([7, 8, 9]))
    told = [sent.get() for _ in range(3)]
    answers = dict(told)
    assert {c.finish_reason for c in answers[7].value} == {"length"}
    assert {c.finish_reason for c in answers[8].value} == {"abort"}
    numbers = [number for number, _ in told]
    assert numbers.index(8) < numbers.index(3)
    server.handle(4, LeaveOff([7, 8]))
    assert sent.get() == (4, Done(None))


def test_samples_that_end_are_told_together():
    """Unless their call is answered meanwhile."""
    told = []
    endings = engine_process.Endings(lambda *message: told.append(message))
    for number in (7, 8, 7):
        endings.add(number, 2)
    endings.forget(8)
    assert told == []
    endings.tell()
    endings.tell()
    assert told == [(engine_process.START, Ended({7: 4}))]


def test_who_has_room_hears_of_it_soon():
    """The first ending is told whatever comes behind it."""
    told = SimpleQueue()
    endings = engine_process.Endings(lambda *message: told.put(message))
    threading.Thread(target=endings.run, daemon=True).start()
    for number in (7, 8):
        endings.add(number, 1)
        assert told.get(timeout=60) == (engine_process.START, Ended({number: 1}))


def test_answers_bring_tensors_along():
    """Whoever reads them would else come back for the memory, and wait for who stands still."""
    told = []
    server = engine_process._Server(SimpleNamespace(send_bytes=told.append))
    server.send(3, Done(torch.arange(5)))
    assert b"reductions" not in told[0]
    assert pickle.loads(told[0])[1].value.tolist() == [0, 1, 2, 3, 4]


def test_what_is_asked_runs_between_steps(engine):
    """No call may be admitted, in the loop's thread, in the midst of an update of the weights."""
    sent, server = server_of(engine)

    def drives(asked, *, of):
        return asked is engine and asked.loop._driver == of

    server.handle(7, Ask(drives, (), {"of": threading.get_ident()}))
    assert sent == [(7, Done(True))]
